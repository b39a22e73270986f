package verify_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"pgregory.net/rapid"

	"meshupd/verify"
	"meshupd/verify/publish"
)

// history is all that a publisher, and a thief, signed for one product; a device
// meets any of it in any order.
type history struct {
	factory string
	heads   []*verify.UnverifiedHead
	chains  []*site // by epoch, starting with 1
}

func makeHistory(t *testing.T) *history {
	root, thief := newKey(t, "Root"), newKey(t, "Thief")
	keys := []*publish.SecretKey{newKey(t, "One"), newKey(t, "Two"), newKey(t, "Three")}
	h := &history{}
	s := newSite(t)
	for n, key := range keys {
		doc := s.trust(s.set(1, root), s.set(1, key))
		doc.Line, doc.IssuedAt = uint64(1+n/2), day.AddDate(n, 0, 0)
		s.add(doc, root)
		grown := *s
		grown.files = append([]file{}, s.files...)
		h.chains = append(h.chains, &grown)
	}
	h.factory = s.anchor(1)
	add := func(epoch int, key *publish.SecretKey, change func(m *verify.Manifest)) {
		m := s.manifest(1)
		m.Line, m.TrustEpoch = uint64(1+(epoch-1)/2), uint64(epoch)
		change(&m)
		h.heads = append(h.heads, h.chains[epoch-1].signed(m, key))
	}
	old := day.AddDate(0, 6, 0)
	for epoch, key := range keys {
		for seq := uint64(1); seq <= 3; seq++ {
			add(epoch+1, key, func(m *verify.Manifest) { m.Seq = seq })
			add(epoch+1, key, func(m *verify.Manifest) { m.Seq, m.Version = seq, "1.0.1" }) // equivocation
		}
		add(epoch+1, key, func(m *verify.Manifest) { m.Seq, m.NotAfter = 4, &old })
		add(epoch+1, key, func(m *verify.Manifest) { m.Seq, m.Images, m.Recalls = 5, nil, []verify.Digest{{byte(epoch + 1)}} })
		add(epoch+1, key, func(m *verify.Manifest) {
			m.Seq, m.Images = 6, append([]verify.Image{}, m.Images...)
			m.Images[0].SHA256, m.Images[0].Content.SHA256 = verify.Digest{byte(epoch + 1)}, verify.Digest{byte(epoch + 1)}
		})
		add(epoch+1, key, func(m *verify.Manifest) { m.Seq = verify.MaxSeq - uint64(epoch) })
		add(epoch+1, thief, func(m *verify.Manifest) { m.Seq = 9 })
		add(epoch+1, key, func(m *verify.Manifest) { m.Product = "kiosk-b" })
	}
	fork := newSite(t)
	fork.certs, fork.files = s.certs, append([]file{}, s.files[:2]...)
	fork.add(fork.trust(fork.set(1, root), fork.set(1, thief)), root)
	h.heads = append(h.heads, fork.signed(s.manifest(6), thief))
	return h
}

var errCut = errors.New("power cut")

// device is a door with a power supply.
type device struct {
	door  *verify.Door
	state string
	left  int // writes until the power goes; negative: it stays
	after bool
	best  verify.Counters
	epoch uint64
	time  time.Time
	gone  int // recalls and alarms that were seen; none may be lost
}

// write replaces a file in one step, as durable.WriteFile does, until the power
// goes: before the write has its effect, or just after it. Then nothing more is written.
func (d *device) write(path string, data []byte, perm fs.FileMode) error {
	torn := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".tmp-1")
	if d.left == 0 && !d.after {
		if err := os.WriteFile(torn, data[:len(data)/2], perm); err != nil {
			return err
		}
		return errCut
	}
	if err := os.WriteFile(torn, data, perm); err != nil {
		return err
	}
	if err := os.Rename(torn, path); err != nil {
		return err
	}
	if d.left == 0 {
		d.after = false
		return errCut
	}
	d.left--
	return nil
}

func behind(a, b verify.Counters) bool {
	return a.Line < b.Line || a.Line == b.Line && (a.Accepted < b.Accepted || a.Floor < b.Floor)
}

// Any sequence of heads, restarts and power cuts at any durable write never lowers
// a counter, never loses the newest trust document, an alarm or proven time, and
// never yields a release whose rules do not hold.
func TestNoSequenceOfEventsLowersTheGuard(t *testing.T) {
	h := makeHistory(t)
	base := t.TempDir()
	runs := 0
	rapid.Check(t, func(rt *rapid.T) {
		runs++
		state, err := os.MkdirTemp(base, "device")
		if err != nil {
			rt.Fatal(err)
		}
		defer os.RemoveAll(state)
		d := &device{state: state, left: -1}
		start := func() {
			d.left = -1
			if d.door, err = verify.OpenDoorWriting(verify.DoorConfig{Dir: d.state, Anchor: h.factory}, d.write); err != nil {
				rt.Fatalf("does not start any more: %v", err)
			}
		}
		start()
		var kept []*verify.Release
		for range rapid.IntRange(1, 25).Draw(rt, "events") {
			if rapid.IntRange(0, 5).Draw(rt, "event") == 0 {
				start()
			} else {
				if rapid.IntRange(0, 3).Draw(rt, "cut") == 0 {
					d.left, d.after = rapid.IntRange(0, 9).Draw(rt, "writes"), rapid.Bool().Draw(rt, "after")
				}
				head := rapid.SampledFrom(h.heads).Draw(rt, "head")
				rel, err := d.door.Check(t.Context(), head)
				if err == nil {
					holds(rt, d.door, rel)
					if err = d.door.Accept(rel); err == nil {
						kept = append(kept, rel)
						if got := d.door.Counters(); got.Line != rel.Manifest().Line || got.Accepted != rel.Manifest().Seq {
							rt.Fatalf("accepted %d.%d, counters %+v", rel.Manifest().Line, rel.Manifest().Seq, got)
						}
					}
				}
				if err == nil && rapid.Bool().Draw(rt, "confirm") {
					err = d.door.Confirmed(rapid.SampledFrom(kept).Draw(rt, "confirmed"))
				}
				if err != nil && verify.CodeOf(err) == "" {
					rt.Fatalf("no code: %v", err)
				}
				d.remember(rt)
				if d.left == 0 {
					start()
				}
				d.left = -1
			}
			d.remember(rt)
		}
	})
	t.Logf("%d sequences", runs)
}

// remember compares with all that this device ever was.
func (d *device) remember(rt *rapid.T) {
	now, trust := d.door.Counters(), d.door.Trust()
	gone := len(d.door.Alarms())
	switch {
	case behind(now, d.best):
		rt.Fatalf("counters fell from %+v to %+v", d.best, now)
	case trust.Epoch < d.epoch || trust.Damage != "":
		rt.Fatalf("trust fell from %d to %d (%s)", d.epoch, trust.Epoch, trust.Damage)
	case d.door.ProvenTime().Before(d.time):
		rt.Fatalf("proven time fell from %s to %s", d.time, d.door.ProvenTime())
	case gone < d.gone:
		rt.Fatalf("%d alarms of %d are left", gone, d.gone)
	}
	d.best, d.epoch, d.time, d.gone = now, trust.Epoch, d.door.ProvenTime(), gone
}

// holds says the rules again, in other words than the door does.
func holds(rt *rapid.T, door *verify.Door, rel *verify.Release) {
	m, trust := rel.Manifest(), door.Trust()
	known := map[string]bool{}
	for _, k := range trust.Keys {
		known[k.Fingerprint] = true
	}
	signers := map[string]bool{}
	for _, s := range rel.Signers() {
		if !known[s.Fingerprint] {
			rt.Fatalf("signed by %s, whom document %d does not name", s.Name, trust.Epoch)
		}
		signers[s.Fingerprint] = true
	}
	switch {
	case len(signers) < trust.Threshold:
		rt.Fatalf("%d signers of %d", len(signers), trust.Threshold)
	case m.Product != trust.Product || m.Line != trust.Line || m.TrustEpoch > trust.Epoch:
		rt.Fatalf("release %+v under %+v", m, trust)
	case m.NotAfter != nil && m.NotAfter.Before(door.ProvenTime()):
		rt.Fatal("past its own date")
	case door.Recalled(rel.ID()):
		rt.Fatal("withdrawn")
	}
	for _, img := range m.Images {
		if door.Recalled(img.SHA256) {
			rt.Fatal("with a withdrawn image")
		}
	}
}
