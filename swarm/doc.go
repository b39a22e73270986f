// Package swarm holds image bytes: on disk in a Store, and on the wire as
// BitTorrent between devices.
//
// The pieces are the engine's (anacrolix/torrent, BEP 52); who takes from whom
// is decided here (graph.go). Piece hashes come from a verify.Release, never from
// a neighbour, and the whole image's SHA-256 is checked before it counts as held.
// swarm does not know who may be a neighbour: it dials and accepts through a
// Network that has already admitted them.
//
// Bytes on disk: store.go (whole images and heads), partial.go and bitmap.go
// (images on their way), space.go. On the wire: swarm.go (what a device fetches
// and serves), transfer.go (one image: whom to take it from, when to look
// elsewhere), engine.go, storage.go, window.go and conns.go (the engine below).
package swarm
