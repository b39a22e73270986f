package bootlab

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"unicode/utf16"

	"meshupd/install"
)

// efiKind is firmware that starts the kernel of a slot by itself: a boot option for each, with the kernel's command line.
var efiKind = Kind{
	Name: "efi",
	FS:   "efivarfs",
	EFI:  true,
	Loader: func(boot, _ string) (install.Loader, error) {
		return install.EFI{Vars: boot, A: "1001", B: "1002"}, nil
	},
	Tree: func() (map[string][]byte, error) {
		kernel, err := FindKernel()
		if err != nil {
			return nil, err
		}
		image, err := os.ReadFile(kernel.Image)
		return map[string][]byte{"slots/a.efi": image, "slots/b.efi": image}, err
	},
	Turn: func(vars []byte, _ string) (Turn, error) { return turnOfVars(vars) },
	Vars: func(blank []byte) ([]byte, error) {
		for n, slot := range []install.SlotName{install.SlotA, install.SlotB} {
			var err error
			if blank, err = addVar(blank, fmt.Sprintf("Boot%04X", 0x1001+n), loadOption(slot)); err != nil {
				return nil, err
			}
		}
		return addVar(blank, "BootOrder", []byte{0x01, 0x10})
	},
}

// turnOfVars is the boot manager of the UEFI specification, section 3.1: BootNext once, else the first of BootOrder. Where
// that is not an option of a slot, the firmware tries others, which is chance.
func turnOfVars(flash []byte) (Turn, error) {
	vars, err := readVars(flash)
	if err != nil {
		return Turn{}, err
	}
	slot := func(list []byte) install.SlotName {
		if len(list) < 2 {
			return ""
		}
		return map[uint16]install.SlotName{0x1001: install.SlotA, 0x1002: install.SlotB}[binary.LittleEndian.Uint16(list)]
	}
	turn := Turn{Default: slot(vars["BootOrder"])}
	if turn.Next = slot(vars["BootNext"]); turn.Next == "" {
		turn.Next = turn.Default
	}
	if turn.Default == "" {
		return Turn{}, fmt.Errorf("BootOrder is % x, which names no slot", vars["BootOrder"])
	}
	for _, name := range []string{"Boot1001", "Boot1002"} {
		if len(vars[name]) == 0 {
			return Turn{}, fmt.Errorf("the option %s is gone", name)
		}
	}
	return turn, nil
}

// loadOption is an EFI_LOAD_OPTION (UEFI specification, section 3.1.3): a path on the ESP, and what the kernel reads as its
// command line.
func loadOption(slot install.SlotName) []byte {
	path := utf16z(fmt.Sprintf(`\slots\%s.efi`, slot))
	esp := layout[PartESP]
	var node []byte
	node = append(node, 4, 1, 42, 0) // a partition
	node = binary.LittleEndian.AppendUint32(node, PartESP)
	node = binary.LittleEndian.AppendUint64(node, uint64(esp.at/512))
	node = binary.LittleEndian.AppendUint64(node, uint64(esp.size/512))
	node = append(append(node, guid(espUUID)...), 2, 2)    // GPT, known by its GUID
	node = append(node, 4, 4, byte(4+len(path)), 0)        // a file on it
	node = append(append(node, path...), 0x7f, 0xff, 4, 0) // the end
	out := binary.LittleEndian.AppendUint32(nil, 1)        // active
	out = binary.LittleEndian.AppendUint16(out, uint16(len(node)))
	out = append(append(out, utf16z("Slot "+string(slot))...), node...)
	return append(out, utf16z(kernelLine(slot, "efi"))...)
}

func utf16z(s string) (out []byte) {
	for _, c := range append(utf16.Encode([]rune(s)), 0) {
		out = binary.LittleEndian.AppendUint16(out, c)
	}
	return out
}

// guid is the mixed-endian form of a UUID.
func guid(text string) []byte {
	var raw []byte
	if _, err := fmt.Sscanf(strings.ReplaceAll(text, "-", ""), "%x", &raw); err != nil || len(raw) != 16 {
		panic("a constant is no UUID")
	}
	for _, part := range [][]byte{raw[:4], raw[4:6], raw[6:8]} {
		for i, j := 0, len(part)-1; i < j; i, j = i+1, j-1 {
			part[i], part[j] = part[j], part[i]
		}
	}
	return raw
}

// The store of variables of EDK II (MdeModulePkg/Include/Guid/VariableFormat.h), authenticated variant.
const (
	globalGUID   = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
	varStoreGUID = "aaf32c78-947b-439a-a180-2e144ec37792"
	varHeader    = 60
	varStart     = 0x55aa
	varAdded     = 0x3f
	varLeaving   = 0xfe // cleared bit: its successor is being written
)

// varStore finds the variables in the flash.
func varStore(flash []byte) (from, to int, err error) {
	bad := errors.New("the flash holds no store of variables")
	if len(flash) < 0x100 || !bytes.Equal(flash[0x28:0x2c], []byte("_FVH")) {
		return 0, 0, bad
	}
	at := int(binary.LittleEndian.Uint16(flash[0x30:]))
	if at+28 > len(flash) || !bytes.Equal(flash[at:at+16], guid(varStoreGUID)) {
		return 0, 0, bad
	}
	size := int(binary.LittleEndian.Uint32(flash[at+16:]))
	if size < 28 || at+size > len(flash) {
		return 0, 0, bad
	}
	return at + 28, at + size, nil
}

// eachVar calls do with each variable that is there, and returns where the next one would be written.
func eachVar(flash []byte, do func(name string, state byte, data []byte)) (end int, err error) {
	at, to, err := varStore(flash)
	if err != nil {
		return 0, err
	}
	for at+varHeader <= to && binary.LittleEndian.Uint16(flash[at:]) == varStart {
		names, size := int(binary.LittleEndian.Uint32(flash[at+36:])), int(binary.LittleEndian.Uint32(flash[at+40:]))
		if names < 0 || size < 0 || names > to || size > to || at+varHeader+names+size > to {
			return at, nil // a header that a cut has left unfinished
		}
		text := flash[at+varHeader : at+varHeader+names]
		if bytes.Equal(flash[at+44:at+60], guid(globalGUID)) {
			var name []uint16
			for i := 0; i+3 < len(text); i += 2 {
				name = append(name, binary.LittleEndian.Uint16(text[i:]))
			}
			do(string(utf16.Decode(name)), flash[at+2], flash[at+varHeader+names:at+varHeader+names+size])
		}
		at += (varHeader + names + size + 3) &^ 3
	}
	return at, nil
}

// readVars reads the global variables. One that is about to be replaced counts until its successor is there.
func readVars(flash []byte) (map[string][]byte, error) {
	vars, sure := make(map[string][]byte), make(map[string]bool)
	_, err := eachVar(flash, func(name string, state byte, data []byte) {
		switch {
		case state == varAdded:
			vars[name], sure[name] = data, true
		case state == varAdded&varLeaving && !sure[name]:
			vars[name] = data
		}
	})
	return vars, err
}

// addVar adds a global variable to a copy of the flash.
func addVar(flash []byte, name string, data []byte) ([]byte, error) {
	flash = bytes.Clone(flash)
	at, err := eachVar(flash, func(string, byte, []byte) {})
	if err != nil {
		return nil, err
	}
	text := utf16z(name)
	v := make([]byte, varHeader)
	binary.LittleEndian.PutUint16(v, varStart)
	v[2], v[4] = varAdded, 7 // non-volatile, boot service, runtime
	binary.LittleEndian.PutUint32(v[36:], uint32(len(text)))
	binary.LittleEndian.PutUint32(v[40:], uint32(len(data)))
	copy(v[44:], guid(globalGUID))
	v = append(append(v, text...), data...)
	if at+len(v) > len(flash) {
		return nil, fmt.Errorf("the flash has no room for %s", name)
	}
	copy(flash[at:], v)
	return flash, nil
}

// BootVars are the global variables of the firmware.
func (d Disk) BootVars() (map[string][]byte, error) {
	flash, err := os.ReadFile(d.Vars)
	if err != nil {
		return nil, err
	}
	return readVars(flash)
}
