package bootlab

import "encoding/binary"

// boardKernel is the smallest thing that U-Boot's booti takes for Linux: the header of an arm64 Image, and code that prints
// the version and the kernel command line out of the device tree, and resets the board by PSCI.
func boardKernel(version string) []byte {
	var out []byte
	for _, word := range boardCode {
		out = binary.LittleEndian.AppendUint32(out, word)
	}
	return append(out, "root=PAR\n"+MarkerPrefix+"BOOT version="+version+" \x00"...)
}

// boardCode is the assembled text of the comments. The first word of the command line is looked for as "root", "=PAR", because the
// values in a device tree begin at multiples of four.
var boardCode = []uint32{
	0x14000010, 0, 0, 0, //       b start; text offset 0
	0x1000, 0, 0xa, 0, //         image size; flags: anywhere, 4 KiB pages
	0, 0, 0, 0, 0, 0, //
	0x644d5241, 0, //             "ARM\x64"
	0xaa0003f3, // start:         mov  x19, x0              the device tree
	0xd2a12014, //                movz x20, #0x0900, lsl #16 the serial port, a PL011
	0x10000401, //                adr  x1, text
	0x94000017, //                bl   puts
	0xb9400662, //                ldr  w2, [x19, #4]        its size, big endian
	0x5ac00842, //                rev  w2, w2
	0x8b020262, //                add  x2, x19, x2
	0x18000323, //                ldr  w3, words
	0x18000324, //                ldr  w4, words+4
	0xeb02027f, // next:          cmp  x19, x2
	0x54000142, //                b.hs over
	0xb8404665, //                ldr  w5, [x19], #4
	0x6b0300bf, //                cmp  w5, w3
	0x54ffff81, //                b.ne next
	0xb9400265, //                ldr  w5, [x19]
	0x6b0400bf, //                cmp  w5, w4
	0x54ffff21, //                b.ne next
	0xd1001273, //                sub  x19, x19, #4
	0xaa1303e1, //                mov  x1, x19
	0x94000007, //                bl   puts
	0x52800141, // over:          mov  w1, #10
	0xb9000281, //                str  w1, [x20]
	0xd2b08000, //                movz x0, #0x8400, lsl #16
	0xf2800120, //                movk x0, #9               SYSTEM_RESET
	0xd4000002, //                hvc  #0
	0x14000000, //                b    .
	0x38401423, // puts:          ldrb w3, [x1], #1
	0x34000063, //                cbz  w3, done
	0xb9000283, //                str  w3, [x20]
	0x17fffffd, //                b    puts
	0xd65f03c0, // done:          ret
	0xd503201f, //                nop
	// words: "root=PAR", text: the rest
}
