// Package peer is this device as a member of its site: who it is, whom it
// admits, what they tell each other, and what it does next with a release.
//
// A Mesh (mesh.go) carries signed documents, device status and byte streams
// between admitted devices over libp2p. A Device (device.go) runs the life of a
// release: it observes facts, asks the pure function next (lifecycle.go) for one
// step, does it and waits. Membership limits cost; only verify decides belief.
package peer
