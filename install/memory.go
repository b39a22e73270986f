package install

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io"
	"maps"
	"strconv"
	"sync"

	"meshupd/verify"
)

// MemoryConfig says how a Memory behaves.
type MemoryConfig struct {
	FactoryVersion string
	Starts         int   // of a trial; 1 when zero
	Space          int64 // bytes that both slots may hold together; 0: no limit

	// Restart is told which slot is started with what content; an error is an E-RESTART. May be nil.
	Restart func(ctx context.Context, slot SlotName, content Content) error
	// Step runs each durable step and the restart by its name (boot.save, boot.point, record.save, record.remove,
	// slot.clear, image.fill, image.commit, image.open, restart). A test scripts faults with it: an error without
	// calling do is a step that failed and is lost, an error after it one that failed but is kept. May be nil.
	Step func(name string, do func() error) error
}

// Memory is a device's slots in memory, for simulations and tests. It runs the same steps in the same order as Files,
// above stores that remember instead of disks.
type Memory struct {
	*pair
	media *memoryMedia
}

// NewMemory makes a device with a whole factory slot a that is booted.
func NewMemory(cfg MemoryConfig) *Memory {
	if cfg.Starts == 0 {
		cfg.Starts = 1
	}
	if cfg.Step == nil {
		cfg.Step = func(_ string, do func() error) error { return do() }
	}
	return memoryOn(cfg, &memoryMedia{
		boot:    bootRecord{Phase: PhaseSettled, Booted: SlotA, Default: SlotA},
		at:      SlotA,
		records: map[SlotName]Content{SlotA: {Version: cfg.FactoryVersion, Whole: true}},
		slots:   map[SlotName]map[string][]byte{SlotA: {}, SlotB: {}},
		power:   1,
	})
}

func memoryOn(cfg MemoryConfig, m *memoryMedia) *Memory {
	view := &memoryView{memoryMedia: m, cfg: cfg}
	power := &pointer{
		keep: view, run: view.runRestart,
		bootID: view.bootID,
		whole:  func(slot SlotName) error { return whole(view, slot) },
	}
	return &Memory{&pair{boot: power, power: power, records: view, cells: view, starts: cfg.Starts}, m}
}

// Reopen returns the same device after its daemon was ended and started, and with powerCut the machine as well. Steps
// that did not happen stay undone. Call Start on it. The old Memory must not be used any more.
func (m *Memory) Reopen(cfg MemoryConfig, powerCut bool) *Memory {
	if cfg.Starts == 0 {
		cfg.Starts = m.starts
	}
	if cfg.Step == nil {
		cfg.Step = func(_ string, do func() error) error { return do() }
	}
	if powerCut {
		m.media.mu.Lock()
		m.media.power++
		m.media.mu.Unlock()
	}
	return memoryOn(cfg, m.media)
}

// Images returns what a slot holds, by name. The bytes are shared: do not change them.
func (m *Memory) Images(slot SlotName) map[string][]byte {
	m.media.mu.Lock()
	defer m.media.mu.Unlock()
	return maps.Clone(m.media.slots[slot])
}

// Pointed is the slot that the next start of the application would use.
func (m *Memory) Pointed() SlotName {
	m.media.mu.Lock()
	defer m.media.mu.Unlock()
	return m.media.at
}

// memoryMedia is what outlasts a power cut.
type memoryMedia struct {
	mu      sync.Mutex // owns all below
	boot    bootRecord
	at      SlotName
	records map[SlotName]Content
	slots   map[SlotName]map[string][]byte
	power   int // starts of the machine
}

// memoryView is the media as one start of the daemon sees them.
type memoryView struct {
	*memoryMedia
	cfg MemoryConfig
}

var (
	_ bootStore   = (*memoryView)(nil)
	_ recordStore = (*memoryView)(nil)
	_ cells       = (*memoryView)(nil)
)

// step changes the media as one step.
func (m *memoryView) step(name string, change func()) error {
	return m.cfg.Step(name, func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		change()
		return nil
	})
}

func (m *memoryView) bootID() (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return strconv.Itoa(m.power), nil
}

func (m *memoryView) runRestart(ctx context.Context, slot SlotName) error {
	content, _, err := m.loadRecord(slot)
	if err != nil {
		return err
	}
	err = m.cfg.Step("restart", func() error {
		if m.cfg.Restart == nil {
			return nil
		}
		return m.cfg.Restart(ctx, slot, content)
	})
	return coded(verify.CodeRestart, "restart to slot "+string(slot), err)
}

func (m *memoryView) loadBoot() (bootRecord, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.boot, nil
}

func (m *memoryView) saveBoot(r bootRecord) error {
	return coded(verify.CodeBoot, "save the boot state", m.step("boot.save", func() { m.boot = r }))
}

func (m *memoryView) pointed() (SlotName, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.at, nil
}

func (m *memoryView) point(slot SlotName) error {
	return coded(verify.CodeBoot, "switch the boot pointer", m.step("boot.point", func() { m.at = slot }))
}

func (m *memoryView) loadRecord(slot SlotName) (Content, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c, found := m.records[slot]
	return c, found, nil
}

func (m *memoryView) saveRecord(slot SlotName, c Content) error {
	return mediumError(m.step("record.save", func() { m.records[slot] = c }), "save the record of slot "+string(slot), 0)
}

func (m *memoryView) removeRecord(slot SlotName) error {
	return mediumError(m.step("record.remove", func() { delete(m.records, slot) }), "remove the record of slot "+string(slot), 0)
}

func (m *memoryView) fits([]verify.Image) error { return nil }

func (m *memoryView) room(slot SlotName) (free, held int64, err error) {
	if m.cfg.Space == 0 {
		return maxContent * maxImages, 0, nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cfg.Space - size(m.slots[SlotA]) - size(m.slots[SlotB]), size(m.slots[slot]), nil
}

func size(images map[string][]byte) (n int64) {
	for _, data := range images {
		n += int64(len(data))
	}
	return n
}

func (m *memoryView) clear(_ context.Context, slot SlotName, keep []verify.Image) error {
	names := imageNames(keep)
	return mediumError(m.step("slot.clear", func() {
		maps.DeleteFunc(m.slots[slot], func(name string, _ []byte) bool { return !names[name] })
	}), "clear slot "+string(slot), 0)
}

func (m *memoryView) put(_ context.Context, slot SlotName, img verify.Image, fill func(io.Writer) error) error {
	what := "write image " + img.Name + " to slot " + string(slot)
	var data bytes.Buffer
	if err := m.cfg.Step("image.fill", func() error { return fill(&data) }); err != nil {
		return mediumError(err, what, img.Content.Size)
	}
	return mediumError(m.step("image.commit", func() { m.slots[slot][img.Name] = data.Bytes() }), what, img.Content.Size)
}

func (m *memoryView) check(ctx context.Context, slot SlotName, img verify.Image, further func()) error {
	var data []byte
	err := m.step("image.open", func() { data = m.slots[slot][img.Name] })
	if err != nil {
		return mediumError(err, "read image "+img.Name+" back", 0)
	}
	return readBack(ctx, io.NopCloser(bytes.NewReader(data)), slot, img, further)
}

// Digests returns the digest of each image that a slot holds.
func (m *Memory) Digests(slot SlotName) map[string]verify.Digest {
	sums := make(map[string]verify.Digest)
	for name, data := range m.Images(slot) {
		sums[name] = sha256.Sum256(data)
	}
	return sums
}
