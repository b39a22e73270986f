package fleet

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"meshupd/install"
	"meshupd/peer"
	"meshupd/verify"
)

// Result of a scenario.
type Result struct {
	Took     time.Duration   // from the start of the site to the last event
	Events   []time.Duration // when each event was done, since the start of the site
	Releases []Release
	Devices  []Device
}

// Device says what became of one device.
type Device struct {
	Name    string
	ID      string
	On      bool // when the last event was done
	State   peer.DeviceState
	Version string        // that it runs for good
	When    time.Duration // when it came to be so, since the start of the site
	Reason  *peer.Reason
	Lives   []Life
	Trials  int // health checks that were asked for
	Steps   []StepSeen
	History []peer.Event // as this device tells it, newest first
	Booted  install.SlotName
	Slots   map[install.SlotName]Slot

	// LANSent and LANReceived are all bytes on the device's cable, of anything.
	LANSent, LANReceived int64
}

// Life is what a device moved from one start to its end, by image. Sent and
// Received count payload, Received only what was verified; Wasted is what came
// twice or wrong.
type Life struct {
	Sent, Received, Wasted map[verify.Digest]int64
}

// StepSeen is a change of what a device says of itself. Changes that follow each
// other within moments may be seen as one.
type StepSeen struct {
	At      time.Duration
	State   peer.DeviceState
	Version string
}

// Slot is what a slot says it holds, and what is there.
type Slot struct {
	Content install.Content
	Images  map[string]verify.Digest // digest of each file, by name
}

// Sent is the payload of an image that the device sent in all its lives.
func (d Device) Sent(image verify.Digest) (n int64) {
	for _, l := range d.Lives {
		n += l.Sent[image]
	}
	return n
}

// Received is the verified payload of an image that the device received in all its lives.
func (d Device) Received(image verify.Digest) (n int64) {
	for _, l := range d.Lives {
		n += l.Received[image]
	}
	return n
}

// Wasted is the payload of an image that came to the device in vain.
func (d Device) Wasted(image verify.Digest) (n int64) {
	for _, l := range d.Lives {
		n += l.Wasted[image]
	}
	return n
}

// result tells what can be seen while devices run.
func (f *Fleet) result(events []time.Duration) Result {
	r := Result{Took: time.Since(f.begun), Events: events, Releases: f.releases}
	for i, d := range f.devices {
		st, on := f.Status(i)
		r.Devices = append(r.Devices, Device{Name: d.name, ID: d.identity(), On: on,
			State: peer.DeviceState(st.State), Version: st.Version, Reason: st.Reason})
	}
	return r
}

// addRemains adds what can be seen when the devices have ended.
func (f *Fleet) addRemains(r *Result) {
	for i, d := range f.devices {
		out := &r.Devices[i]
		out.LANSent, out.LANReceived = d.host.Counters()
		d.mu.Lock()
		out.Trials, out.Steps, out.History = d.trials, d.steps, d.history
		out.Lives = make([]Life, d.lives)
		for n := range out.Lives {
			out.Lives[n] = d.lifeLocked(n + 1)
		}
		d.mu.Unlock()
		for _, s := range out.Steps {
			if s.State == out.State && s.Version == out.Version {
				out.When = s.At
			}
		}
		out.Booted, out.Slots = d.slots()
	}
}

func (d *device) lifeLocked(n int) Life {
	l := Life{Sent: map[verify.Digest]int64{}, Received: map[verify.Digest]int64{}, Wasted: map[verify.Digest]int64{}}
	for key, t := range d.ledger {
		if key.life != n {
			continue
		}
		for _, bytes := range t.Sent {
			l.Sent[t.Image] += bytes
		}
		for _, bytes := range t.Received {
			l.Received[t.Image] += bytes
		}
		l.Wasted[t.Image] += t.Wasted
	}
	return l
}

// slots reads the disk as a start of the application would: by the pointer.
func (d *device) slots() (booted install.SlotName, slots map[install.SlotName]Slot) {
	if d.lives == 0 {
		return "", nil
	}
	slots = map[install.SlotName]Slot{}
	if target, err := os.Readlink(filepath.Join(d.slotDir(), "current")); err == nil {
		booted = install.SlotName(filepath.Base(target))
	}
	files, err := d.openSlots(d.lives)
	if err != nil {
		return booted, slots
	}
	state, err := files.State(context.Background())
	if err != nil {
		return booted, slots
	}
	for name, content := range state.Slots {
		images, err := digests(filepath.Join(d.slotDir(), string(name)))
		if err == nil {
			slots[name] = Slot{Content: content, Images: images}
		}
	}
	return booted, slots
}

func digests(dir string) (map[string]verify.Digest, error) {
	sums := map[string]verify.Digest{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return err
		}
		sums[e.Name()] = verify.Digest(h.Sum(nil))
		return nil
	})
	return sums, err
}

// Check says what must hold for a site whatever happened to it: the slot that
// the pointer names is whole and is what the device says it runs, and each whole
// slot holds exactly the bytes that were signed.
func (r Result) Check() error {
	var errs []error
	for _, d := range r.Devices {
		if len(d.Lives) > 0 {
			errs = append(errs, d.check(r.Releases))
		}
	}
	return errors.Join(errs...)
}

func (d Device) check(releases []Release) error {
	booted, ok := d.Slots[d.Booted]
	if !ok || !booted.Content.Whole {
		return fmt.Errorf("%s starts from slot %q, which is not whole", d.Name, d.Booted)
	}
	if d.On && d.State == peer.StateConfirmed && booted.Content.Version != d.Version {
		return fmt.Errorf("%s says it runs %s and starts %s", d.Name, d.Version, booted.Content.Version)
	}
	for name, slot := range d.Slots {
		if !slot.Content.Whole || slot.Content.Release.IsZero() {
			continue
		}
		if err := slot.signed(releases); err != nil {
			return fmt.Errorf("%s, slot %s: %w", d.Name, name, err)
		}
	}
	return nil
}

// signed says whether the slot holds what was signed, and nothing else.
func (s Slot) signed(releases []Release) error {
	for _, rel := range releases {
		if rel.ID != s.Content.Release {
			continue
		}
		if len(s.Images) != 1 || s.Images[rel.Image.Name] != rel.Image.Content.SHA256 {
			return fmt.Errorf("the files of release %s are %v, signed was %s", rel.Version, s.Images, rel.Image.Content.SHA256)
		}
		return nil
	}
	return fmt.Errorf("it holds release %s, which nobody made", s.Content.Release)
}
