package install

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"strings"
	"sync"

	"meshupd/verify"
)

// FakeRAUC is a RAUC with the rules of its GRUB back end, on slots in memory. It outlasts a power cut.
type FakeRAUC struct {
	mu     sync.Mutex // owns:
	order  []string
	ok     map[string]bool
	try    map[string]bool
	booted string
	status map[string]raucSlot
	data   map[string][]byte

	// Activates is activate-installed of system.conf, which is true where nothing is said.
	Activates bool
	// Refuse makes it refuse every bundle with this word.
	Refuse string
	// Dies makes it end in the middle of an installation.
	Dies bool
}

// NewFakeRAUC makes one with the factory's content in slot A, which runs.
func NewFakeRAUC(factory []byte) *FakeRAUC {
	f := &FakeRAUC{order: []string{"A", "B"}, ok: map[string]bool{"A": true}, try: map[string]bool{"A": true},
		booted: "A", status: map[string]raucSlot{}, data: map[string][]byte{"A": factory}}
	for _, s := range []raucSlot{{Name: "rootfs.0", Bootname: "A"}, {Name: "rootfs.1", Bootname: "B"}} {
		s.Class = "rootfs"
		f.status[s.Bootname] = s
	}
	return f
}

var fakeNames = map[string]string{"rootfs.0": "A", "rootfs.1": "B"}

// Turn is a power-on: what grub.cfg does. With dry it changes nothing.
func (f *FakeRAUC) Turn(dry bool) SlotName {
	f.mu.Lock()
	defer f.mu.Unlock()
	pick, last := "", f.order[0]
	for _, slot := range f.order {
		if !f.ok[slot] {
			continue
		}
		last = slot
		if !f.try[slot] && pick == "" {
			pick = slot
		}
	}
	if pick == "" {
		pick = last
	}
	if !dry {
		f.try[pick], f.booted = true, pick
	}
	return SlotName(strings.ToLower(pick))
}

// Holds returns what is in a slot.
func (f *FakeRAUC) Holds(slot SlotName) verify.Digest {
	f.mu.Lock()
	defer f.mu.Unlock()
	return sha256.Sum256(f.data[strings.ToUpper(string(slot))])
}

// Installs puts something into slot B as a person with `rauc install` would.
func (f *FakeRAUC) Installs(ctx context.Context, data []byte, version string) {
	f.put(data, version)
}

func (f *FakeRAUC) put(data []byte, version string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	to := "A"
	if f.booted == "A" {
		to = "B"
	}
	f.ok[to] = false
	f.data[to] = data
	s := f.status[to]
	sum := sha256.Sum256(data)
	s.Status, s.SHA256, s.Version = "ok", hex.EncodeToString(sum[:]), version
	if f.Dies {
		s.Status, f.data[to] = "update", data[:len(data)/2]
	}
	f.status[to] = s
	if f.Activates && !f.Dies {
		f.activate(to)
	}
}

func (f *FakeRAUC) activate(slot string) {
	f.order = []string{slot, map[string]string{"A": "B", "B": "A"}[slot]}
	f.ok[slot], f.try[slot] = true, false
}

func (f *FakeRAUC) slots(context.Context) ([]raucSlot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []raucSlot
	for name, s := range f.status {
		s.State = "inactive"
		if name == f.booted {
			s.State = "booted"
		}
		out = append(out, s)
	}
	return out, nil
}

func (f *FakeRAUC) primary(context.Context) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, slot := range f.order {
		if f.ok[slot] && !f.try[slot] {
			return f.status[slot].Name, nil
		}
	}
	return "", nil
}

func (f *FakeRAUC) mark(_ context.Context, state, slot string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	name := fakeNames[slot]
	switch state {
	case "good":
		f.ok[name], f.try[name] = true, false
	case "bad":
		f.ok[name], f.try[name] = false, false
	case "active":
		f.activate(name)
	}
	return nil
}

func (f *FakeRAUC) describe(_ context.Context, path string) (raucBundle, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return raucBundle{}, err
	}
	sum := sha256.Sum256(data)
	return raucBundle{Images: map[string][]string{"rootfs": {hex.EncodeToString(sum[:])}}}, nil
}

func (f *FakeRAUC) install(_ context.Context, path string, tell func(int)) error {
	if f.Refuse != "" {
		return verify.Refuse(verify.CodeInstaller, "RAUC refused the bundle: %s", f.Refuse)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	tell(40)
	f.put(data, "of RAUC")
	if f.Dies {
		return errors.New("its service ended in the middle")
	}
	tell(100)
	return nil
}

// RAUCWith returns the installer RAUC with a service in the place of the real one.
func RAUCWith(f *FakeRAUC) Installer { return RAUC{service: f} }
