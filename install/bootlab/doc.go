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
//
// # Another bootloader
//
// A Kind is all that the replay and the cuts need. Its Turn reads the boot
// partition as the bootloader's own code would, with no journal replayed, and
// fails where the bootloader would start nothing or something by chance. It is
// asked about each different partition once, a few hundred times in a replay, and
// gets folders and partitions that no other call uses. Register it in Kinds, and:
//
//	m.Log, m.Scenario.Marks = path, true   // an empty file; one run of a whole update
//	log, err := ReadLog(path, DiskSize())
//	count := Replay{Kind: k, Story: story, Holds: lab.Holds, Base: disk before the run, Log: log, Seeds: 5, Linux: true}.Run(scratch)
//
// A Story names the slots and versions of the update; Story.Judge has the table of
// what may be started when. A bootloader that counts several starts fits it: while
// a trial is armed the next start may be either slot, and the default is the old
// one. A machine that is no PC needs its own Machine.args; what the guest needs is
// an NVMe disk, the serial number in DMI or lab.scenario= on the kernel's command line.
package bootlab
