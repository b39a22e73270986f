// Package apply is the half of a device that has the right to write slots, and the other half's way to ask it.
//
// The half that talks to the network (the Client's side) may have been taken over. So the Server takes no bytes and no
// verdict from it: it is told which release to write by a digest of 32 bytes, reads the other half's store itself, takes the head
// through a door of its own (trust chain, counters, recalls in a folder of its own), and the image is hashed while it is
// written and read back. It asks the health command itself before it confirms. What a client that lies can still do is
// refuse service: write nothing, give a trial up, restart, or go back to the release in the other slot, as a person could.
//
// On the wire are lines of JSON over a unix socket. A request has one line; the answer is lines of progress, each of
// which the client answers with {"go":true}, beats, and one last line. When the client goes away, or ends its side, a write
// or check is stopped.
package apply
