package doctor

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
)

// Arch is what a program was built for.
type Arch struct {
	Class   elf.Class
	Data    elf.Data
	Machine elf.Machine
}

func (a Arch) String() string {
	names := map[elf.Machine]string{elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64", elf.EM_ARM: "arm", elf.EM_RISCV: "riscv64", elf.EM_386: "386"}
	if name := names[a.Machine]; name != "" {
		return name
	}
	return fmt.Sprintf("machine %d", a.Machine)
}

// ReadArch reads the first bytes of an ELF file (elf(5)): debug/elf would read all its tables, which a stranger wrote.
func ReadArch(r io.Reader) (Arch, error) {
	var head [20]byte
	if _, err := io.ReadFull(r, head[:]); err != nil || !bytes.HasPrefix(head[:], []byte(elf.ELFMAG)) {
		return Arch{}, fmt.Errorf("it is no ELF program")
	}
	a := Arch{Class: elf.Class(head[elf.EI_CLASS]), Data: elf.Data(head[elf.EI_DATA])}
	order := binary.ByteOrder(binary.LittleEndian)
	if a.Data == elf.ELFDATA2MSB {
		order = binary.BigEndian
	}
	a.Machine = elf.Machine(order.Uint16(head[18:]))
	if kind := elf.Type(order.Uint16(head[16:])); kind != elf.ET_EXEC && kind != elf.ET_DYN {
		return Arch{}, fmt.Errorf("it is an ELF file, but no program")
	}
	return a, nil
}
