// Package bootlab boots real machines in qemu: a disk with a real bootloader, a
// real kernel and, as its first process, the program in bootlab/guest, which runs
// package install. It cuts their power, and it replays what they wrote.
//
// A Machine is one start of qemu on a disk image that Build made without root,
// loop devices or mounts. The guest says on the serial line what it does, one
// Marker a line, so that nobody has to wait for a time to pass. A Kind is what a
// bootloader looks like from outside: where it keeps its choice, and what it
// would start from the bytes of a disk alone.
//
// Killing qemu models a machine whose processor stops: what it handed to its disk
// is kept. A disk that loses or reorders what was not flushed is modelled by the
// Replay of a recorded write log. Neither models a disk that lies about a flush.
package bootlab
