package install

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"meshupd/verify"
)

// EFI is a machine whose firmware chooses by itself (UEFI specification, section 3.1): BootOrder says what is booted,
// and BootNext, which the firmware removes when it uses it, what is booted once before. Each slot has a boot option of its own
// (efibootmgr --create --bootnum 1001); what other options there are stays behind the default slot's.
//
// The numbers should be high. The idle slot's option is not in BootOrder, and firmware built from EDK II takes the lowest number
// that is not there for an option that it makes by itself, for instance of a disk that was plugged in: it would replace a low one.
type EFI struct {
	// Vars is the folder of the EFI variables; /sys/firmware/efi/efivars when empty.
	Vars string
	// A and B are the boot options of the slots, "1001" or "Boot1001", in hexadecimal.
	A, B string
}

const (
	efivars    = "/sys/firmware/efi/efivars"
	efiGUID    = "8be4df61-93ca-11d2-aa0d-00e098032b8c" // EFI_GLOBAL_VARIABLE
	efiAttrs   = 7                                      // non-volatile, boot service, runtime
	maxEFIVar  = 4 << 10
	maxOptions = 512
)

func (e EFI) open(env loaderEnv) (medium, error) {
	if e.Vars == "" {
		e.Vars = efivars
	}
	m := &efi{vars: e.Vars, step: env.step, options: make(map[SlotName]uint16)}
	for slot, text := range map[SlotName]string{SlotA: e.A, SlotB: e.B} {
		n, err := strconv.ParseUint(strings.TrimPrefix(text, "Boot"), 16, 16)
		if err != nil {
			return nil, verify.Refuse(verify.CodeConfig, "the boot option of slot %s is %.20q, not like \"1001\"", slot, text)
		}
		m.options[slot] = uint16(n)
	}
	if m.options[SlotA] == m.options[SlotB] {
		return nil, verify.Refuse(verify.CodeConfig, "both slots have the boot option %04X", m.options[SlotA])
	}
	return m, nil
}

type efi struct {
	vars    string
	options map[SlotName]uint16
	step    func(name string, do func() error) error
}

func (e *efi) most() int { return 1 }

// parseBootOptions reads the file of a variable that is a list of boot options: four bytes of attributes, then
// numbers of two bytes, little endian (Documentation/filesystems/efivarfs.rst). Errors are E-BOOT.
func parseBootOptions(data []byte) (attrs uint32, options []uint16, err error) {
	if len(data) < 4 || len(data)%2 != 0 || len(data) > 4+2*maxOptions {
		return 0, nil, verify.Refuse(verify.CodeBoot, "read an EFI variable: %d bytes are no list of boot options", len(data))
	}
	for rest := data[4:]; len(rest) > 0; rest = rest[2:] {
		options = append(options, binary.LittleEndian.Uint16(rest))
	}
	return binary.LittleEndian.Uint32(data), options, nil
}

func encodeBootOptions(attrs uint32, options []uint16) []byte {
	data := binary.LittleEndian.AppendUint32(nil, attrs)
	for _, n := range options {
		data = binary.LittleEndian.AppendUint16(data, n)
	}
	return data
}

func (e *efi) path(name string) string { return filepath.Join(e.vars, name+"-"+efiGUID) }

// load returns the options of a variable, none when it is not there.
func (e *efi) load(name string) (attrs uint32, options []uint16, err error) {
	data, err := readSmall(e.path(name), maxEFIVar)
	if errors.Is(err, fs.ErrNotExist) {
		return efiAttrs, nil, nil
	}
	if err != nil {
		return 0, nil, verify.Refuse(verify.CodeBoot, "read the EFI variable %s: %w", name, err)
	}
	return parseBootOptions(data)
}

func (e *efi) slot(option uint16) SlotName {
	for slot, n := range e.options {
		if n == option {
			return slot
		}
	}
	return ""
}

func (e *efi) read(context.Context) (choice, error) {
	_, order, err := e.load("BootOrder")
	if err != nil {
		return choice{}, err
	}
	_, next, err := e.load("BootNext")
	if err != nil {
		return choice{}, err
	}
	var c choice
	for _, option := range order {
		if c.Default = e.slot(option); c.Default != "" {
			break
		}
	}
	if c.Default == "" {
		return choice{}, verify.Refuse(verify.CodeBoot, "read BootOrder: it has the option of no slot")
	}
	if len(next) == 1 && e.slot(next[0]) == c.Default.Other() {
		c.Trial, c.Left = c.Default.Other(), 1
	}
	return c, nil
}

// write changes BootOrder before BootNext: a confirmed slot is then booted whatever becomes of the second step.
func (e *efi) write(_ context.Context, c choice) error {
	if err := e.writeOrder(c.Default); err != nil {
		return err
	}
	if c.Trial == "" || c.Left == 0 {
		return e.removeNext()
	}
	if err := e.checkOption(c.Trial); err != nil {
		return err
	}
	want := []uint16{e.options[c.Trial]}
	if _, next, err := e.load("BootNext"); err == nil && slices.Equal(next, want) {
		return nil
	}
	return e.store("BootNext", efiAttrs, want)
}

// autoOption ends an option that firmware built from EDK II has made by itself (mBmAutoCreateBootOptionGuid).
var autoOption = []byte{0x4e, 0xac, 0x08, 0x81, 0x11, 0x9f, 0x59, 0x4d, 0x85, 0x0e, 0xe2, 0x1a, 0x52, 0x2c, 0x59, 0xb2}

// checkOption refuses with E-BOOT a slot whose option is gone, or is the firmware's own by now: its trial would start anything.
func (e *efi) checkOption(slot SlotName) error {
	name := fmt.Sprintf("Boot%04X", e.options[slot])
	data, err := readSmall(e.path(name), maxEFIVar)
	if err != nil {
		return verify.Refuse(verify.CodeBoot, "read the boot option of slot %s: %w", slot, err)
	}
	if bytes.HasSuffix(data, autoOption) {
		return verify.Refuse(verify.CodeBoot, "the firmware has replaced the boot option %s of slot %s by its own: make one with a high number", name, slot)
	}
	return nil
}

// writeOrder puts the default's option first and takes the other slot's out: firmware goes on with the next option when one
// cannot be read, and would else come to a slot that is being written.
func (e *efi) writeOrder(slot SlotName) error {
	attrs, order, err := e.load("BootOrder")
	if err != nil {
		return err
	}
	want := []uint16{e.options[slot]}
	for _, option := range order {
		if e.slot(option) == "" {
			want = append(want, option)
		}
	}
	if slices.Equal(order, want) {
		return nil
	}
	return e.store("BootOrder", attrs, want)
}

// removeNext removes a BootNext that names a slot; another's is left alone.
func (e *efi) removeNext() error {
	_, next, err := e.load("BootNext")
	if err != nil {
		return err
	}
	if len(next) != 1 || e.slot(next[0]) == "" {
		return nil
	}
	err = e.step("efi.remove", func() error {
		if err := os.Remove(e.path("BootNext")); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if _, err := os.Stat(e.path("BootNext")); !errors.Is(err, fs.ErrNotExist) {
			return errors.New("it is still there")
		}
		return nil
	})
	return coded(verify.CodeBoot, "remove the EFI variable BootNext", err)
}

func (e *efi) store(name string, attrs uint32, options []uint16) error {
	data := encodeBootOptions(attrs, options)
	err := e.step("efi.write", func() error {
		// One write: efivarfs hands each write to the firmware as the whole variable, durable when it returns.
		if err := writeOnce(e.path(name), data); err != nil {
			return err
		}
		got, err := readSmall(e.path(name), maxEFIVar)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, data) {
			return errors.New("it reads back otherwise than it was written")
		}
		return nil
	})
	return coded(verify.CodeBoot, "write the EFI variable "+name, err)
}

func writeOnce(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	// efivarfs sets the size itself; a plain file keeps the tail of a longer value.
	if info, err := f.Stat(); err == nil && info.Size() > int64(len(data)) {
		if err := f.Truncate(int64(len(data))); err != nil {
			return err
		}
	}
	return f.Close()
}
