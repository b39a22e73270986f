package install_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"slices"
	"syscall"
	"testing"

	"meshupd/install"
	"meshupd/install/slotstest"
	"meshupd/verify"
)

// notBootable says that slot b cannot be started whatever happens.
func notBootable(t *testing.T, dev *install.Block, when string) {
	t.Helper()
	st, err := dev.State(t.Context())
	must(t, "state", err)
	if st.Phase != install.PhaseSettled || st.Default != install.SlotA || st.Slots[install.SlotB].Whole {
		t.Fatalf("%s: %+v", when, st)
	}
	if err := dev.Try(t.Context(), install.SlotB); err == nil {
		t.Fatalf("%s: the slot was armed", when)
	}
}

func openIdle(t *testing.T, dev *install.Block, img verify.Image) *install.IdleSlot {
	t.Helper()
	idle, err := dev.OpenIdle(t.Context(), img)
	must(t, "open the idle slot", err)
	t.Cleanup(func() { idle.Close() })
	return idle
}

func putAt(t *testing.T, idle *install.IdleSlot, data []byte, off int64) {
	t.Helper()
	_, err := idle.WriteAt(data, off)
	must(t, "write a piece", err)
}

func TestStraightSlotIsBootableOnlyOnceItWasReadBack(t *testing.T) {
	for _, devices := range []string{"files", "loop"} {
		t.Run(devices, func(t *testing.T) {
			const size = 3<<20 + 700
			var a, b string
			if devices == "loop" {
				a, b = loopDevice(t, 4<<20), loopDevice(t, 4<<20)
			} else {
				a, b = plainPair(t, 4<<20)
			}
			v := newBench(t, grubFirmware(t), a, b, noise(11, size))
			dev := v.open(t, install.BlockTest{})
			must(t, "an ordinary write before", v.write(t.Context(), dev))
			v.release(t, noise(12, size))
			images := v.rel.Manifest().Images

			idle := openIdle(t, dev, images[0])
			notBootable(t, dev, "before the first piece")
			putAt(t, idle, v.image[1<<20:], 1<<20)
			putAt(t, idle, v.image[:1<<20], 0)
			notBootable(t, dev, "with the last piece")
			if n, err := idle.WriteAt(make([]byte, 10), size-5); n != 0 || verify.CodeOf(err) != verify.CodeSize {
				t.Fatalf("bytes behind the image: %d, %v", n, err)
			}
			v.image[5000] ^= 1 // rots
			putAt(t, idle, v.image[4096:8192], 4096)
			wantCode(t, "adopt what is not what was signed", dev.Adopt(t.Context(), v.rel, images, nil), verify.CodeSlot)
			notBootable(t, dev, "after a read-back that differs")
			if _, err := idle.WriteAt(v.image[:10], 0); verify.CodeOf(err) != verify.CodeBusy {
				t.Fatalf("a write behind the back of Adopt: %v", err)
			}

			idle = openIdle(t, dev, images[0])
			v.image[5000] ^= 1
			putAt(t, idle, v.image, 0)
			must(t, "adopt", dev.Adopt(t.Context(), v.rel, images, nil))
			if v.written != 4096 {
				t.Fatalf("%d bytes were written for one bad block", v.written)
			}
			st, err := dev.State(t.Context())
			if err != nil || st.Slots[install.SlotB] != (install.Content{Release: v.rel.ID(), Version: v.rel.Manifest().Version, Whole: true}) {
				t.Fatalf("%+v, %v", st, err)
			}
			got := make([]byte, size)
			if n, err := idle.ReadAt(got, 0); n != size || err != nil || !bytes.Equal(got, v.image) {
				t.Fatalf("served %d bytes: %v", n, err)
			}
			if rest, err := os.ReadFile(b); err != nil || !bytes.Equal(rest[size:(size+4095)/4096*4096], make([]byte, (size+4095)/4096*4096-size)) {
				t.Fatalf("bytes of the old image are behind the new one in its last block: %v", err)
			}
			must(t, "arm", dev.Try(t.Context(), install.SlotB))
			if _, err := dev.OpenIdle(t.Context(), images[0]); verify.CodeOf(err) != verify.CodeBusy {
				t.Fatalf("open a slot that is armed: %v", err)
			}
		})
	}
}

// A second opening, a copy, or a refusal: whoever had the slot open before cannot write any more, or everything is as it was.
func TestStraightSlotHasOneWriter(t *testing.T) {
	a, b := plainPair(t, 2<<20)
	v := newBench(t, grubFirmware(t), a, b, noise(13, 1<<20))
	dev := v.open(t, install.BlockTest{})
	images := v.rel.Manifest().Images
	first := openIdle(t, dev, images[0])
	second := openIdle(t, dev, images[0])
	if _, err := first.WriteAt(v.image[:10], 0); verify.CodeOf(err) != verify.CodeBusy {
		t.Fatalf("the first still writes: %v", err)
	}
	must(t, "a copy", v.write(t.Context(), dev))
	if _, err := second.WriteAt(v.image[:10], 0); verify.CodeOf(err) != verify.CodeBusy {
		t.Fatalf("the second still writes after a copy: %v", err)
	}
	large := images[0]
	large.Size, large.Content.Size = 3<<20, 3<<20
	if _, err := dev.OpenIdle(t.Context(), large); verify.CodeOf(err) != verify.CodeSpace {
		t.Fatalf("an image that is too large: %v", err)
	}
	packed := images[0]
	packed.Encoding = verify.EncodingZstd
	if _, err := dev.OpenIdle(t.Context(), packed); verify.CodeOf(err) != verify.CodeFormat {
		t.Fatalf("an image that is packed: %v", err)
	}
	if st, err := dev.State(t.Context()); err != nil || !st.Slots[install.SlotB].Whole {
		t.Fatalf("a refusal changed the record: %+v, %v", st, err)
	}
}

// Each durable step of the way fails or the power is cut there; the slot is bootable only when Adopt said so, and the next attempt succeeds.
func TestStraightFaults(t *testing.T) {
	steps := map[string]int{}
	for cut := 0; ; cut++ {
		a, b := plainPair(t, 2<<20)
		v := newBench(t, grubFirmware(t), a, b, noise(14, 1<<20))
		n, hit := 0, ""
		fault := errors.Join(errors.New("fault"), syscall.EIO)
		armed := false
		dev := v.open(t, install.BlockTest{Step: func(name string, do func() error) error {
			if armed {
				if n++; n > cut/2 && hit == "" {
					hit = name
					if cut%2 == 0 {
						return fault // failed and lost
					}
					return errors.Join(do(), fault) // failed, but kept
				}
			}
			return do()
		}})
		must(t, "an ordinary write before", v.write(t.Context(), dev))
		v.release(t, noise(15, 1<<20))
		images := v.rel.Manifest().Images
		way := func() error {
			idle, err := dev.OpenIdle(t.Context(), images[0])
			if err != nil {
				return err
			}
			defer idle.Close()
			if _, err := idle.WriteAt(v.image, 0); err != nil {
				return err
			}
			return dev.Adopt(t.Context(), v.rel, images, nil)
		}
		armed = true
		err := way()
		if hit == "" {
			must(t, "without a fault", err)
			break
		}
		steps[hit]++
		if err == nil {
			t.Fatalf("a fault at %s was not told", hit)
		}
		st, err := dev.State(t.Context())
		must(t, "state", err)
		data, err := os.ReadFile(b)
		must(t, "read", err)
		if c := st.Slots[install.SlotB]; c.Whole && c.Release == v.rel.ID() && !bytes.Equal(data[:len(v.image)], v.image) {
			t.Fatalf("after a fault at %s the slot counts as whole and is not", hit)
		} else if c.Whole && c.Release != v.rel.ID() && bytes.Equal(data[:4096], v.image[:4096]) {
			t.Fatalf("after a fault at %s the slot counts as the old version with bytes of the new one", hit)
		}
		must(t, "again after a fault at "+hit, way())
	}
	t.Logf("faults at %v", steps)
	for _, want := range []string{"image.commit", "image.open"} {
		if steps[want] == 0 {
			t.Errorf("no fault at %s", want)
		}
	}
}

// straightDevice is a Block to which every image comes piece by piece, in the order in which neighbours may send it.
type straightDevice struct{ *install.Block }

func (d straightDevice) Write(ctx context.Context, rel *verify.Release, images []verify.Image, open install.Source, progress func(done, total int64)) error {
	if len(images) != 1 || images[0].Encoding != verify.EncodingNone || !slices.ContainsFunc(rel.Manifest().Images, func(img verify.Image) bool { return img.SHA256 == images[0].SHA256 }) {
		return d.Block.Write(ctx, rel, images, open, progress) // it goes to the store
	}
	src, err := open(images[0])
	if err != nil {
		return d.Block.Write(ctx, rel, images, open, progress)
	}
	defer src.Close()
	data, err := io.ReadAll(src)
	if err != nil || verify.Digest(sha256.Sum256(data)) != images[0].SHA256 {
		return d.Block.Write(ctx, rel, images, open, progress) // swarm lets no such piece pass
	}
	idle, err := d.OpenIdle(ctx, images[0])
	if err != nil {
		return err
	}
	defer idle.Close()
	const piece = 16 << 10
	for at := (len(data) - 1) / piece * piece; at >= 0; at -= piece {
		if _, err := idle.WriteAt(data[at:min(len(data), at+piece)], int64(at)); err != nil {
			return err
		}
	}
	if err := idle.Sync(); err != nil {
		return err
	}
	return d.Adopt(ctx, rel, images, progress)
}

// The stories and faults of all slots, told to slots that are filled piece by piece.
func TestBlockStraight(t *testing.T) {
	slotstest.Run(t, func(t *testing.T) slotstest.Harness {
		h := blockHarness(t, grubFirmware(t), plainDevice(t, "a", 64<<10, "what the factory put there"), plainDevice(t, "b", 64<<10, ""))
		h.Plain = true
		open := h.Open
		h.Open = func(power int, step slotstest.Step) (slotstest.Device, error) {
			d, err := open(power, step)
			if err != nil {
				return nil, err
			}
			return straightDevice{d.(*install.Block)}, nil
		}
		return h
	})
}
