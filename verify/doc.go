// Package verify decides which bytes a device may believe.
//
// Parties: a publisher signs manifests with release keys; a root, usually the
// same people with other keys, signs the trust documents that name the release
// keys; a device holds the newest trust document it has verified. Bytes arrive
// from a stick, a neighbour, the web or the local socket, and all of them are
// hostile until Door.Check has returned a Release. There is no other way to make one.
//
// What it does not promise: it says nothing about who is on the network, and a
// Release is authentic, not necessarily meant for this device; Release.Fits says that.
package verify
