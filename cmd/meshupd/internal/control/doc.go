// Package control is the daemon's local door: HTTP and JSON over a unix socket.
//
// The daemon implements Backend and runs a Server; the commands use a Client.
// Anyone on the machine may read; what changes something is for root, the
// daemon's own user and one group, told by the kernel's peer credentials. The
// daemon never opens a path that a caller names: an import is a stream of bytes.
//
// What it does not promise: a status is a list of claims by other devices. Who
// shows it escapes it.
package control
