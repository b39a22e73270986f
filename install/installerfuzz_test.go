package install

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"
	"testing"
)

func FuzzRaucInfo(f *testing.F) {
	sum := strings.Repeat("0a", 32)
	f.Add([]byte(`{"compatible":"lab","images":[{"rootfs":{"checksum":"` + sum + `","size":3}}]}`))
	f.Add([]byte(`{"images":[{"rootfs":{"checksum":"x"}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := parseRaucInfo(data)
		if err != nil {
			return
		}
		for class, sums := range b.Images {
			for _, sum := range sums {
				if class == "" || !raucDigest(sum) {
					t.Fatalf("an image %q of %q was let through", class, sum)
				}
				slots := []raucSlot{{Name: "r", Class: class, Status: "ok", SHA256: sum}}
				if !raucHolds(slots, "r", b) {
					t.Fatalf("a slot with %s does not hold %s", sum, class)
				}
				slots[0].Status = "update"
				if raucHolds(slots, "r", b) {
					t.Fatal("a slot that is being written holds something")
				}
			}
		}
	})
}

func FuzzRaucProof(f *testing.F) {
	data, err := seal(raucProofSchema, raucProof{Bundle: raucBundle{Images: map[string][]string{"rootfs": {"00"}}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		if p, err := parseRaucProof(data); err == nil && len(p.Bundle.Images) == 0 {
			t.Fatal("a note of nothing was believed")
		}
	})
}

func FuzzLastPercent(f *testing.F) {
	for _, s := range []string{"............  40% 1024 KiB", "100%", "3.5%", "101%", "%", "007%", "99999999999999999999%"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if n, ok := lastPercent(text); n < 0 || n > 100 || !ok && n != 0 {
			t.Fatalf("%q is %d %t", text, n, ok)
		}
	})
}

// swuWords is a message of swupdate.
func swuWords(steps, step, percent uint32) []byte {
	msg := make([]byte, swuMessage)
	for at, n := range map[int]uint32{24: steps, 28: step, 32: percent} {
		binary.NativeEndian.PutUint32(msg[at:], n)
	}
	return msg
}

func FuzzSWUpdateProgress(f *testing.F) {
	f.Add(swuWords(2, 1, 50))
	f.Add(swuWords(1<<31, 1<<31, 100))
	f.Add(append([]byte("\x00\x00\x02\x00ACK\x00"), swuWords(1, 1, 7)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		told := 0
		readSWUpdate(bytes.NewReader(data), func(percent int) {
			if told++; percent < 0 || percent > 100 {
				t.Fatalf("%d%%", percent)
			}
		})
		if told > len(data)/swuMessage {
			t.Fatalf("%d messages in %d bytes", told, len(data))
		}
	})
}

func TestSWUpdateProgress(t *testing.T) {
	for _, greeting := range []string{"", "\x00\x00\x02\x00ACK\x00"} {
		stream := []byte(greeting)
		for _, m := range [][3]uint32{{2, 1, 0}, {2, 1, 50}, {0, 0, 0}, {2, 2, 0}, {2, 3, 0}, {2, 2, 101}, {2, 2, 100}} {
			stream = append(stream, swuWords(m[0], m[1], m[2])...)
		}
		var told []int
		readSWUpdate(bytes.NewReader(stream), func(percent int) { told = append(told, percent) })
		if want := []int{0, 25, 50, 100}; !slices.Equal(told, want) {
			t.Errorf("told %d, want %d", told, want)
		}
	}
}

func TestLastPercent(t *testing.T) {
	for text, want := range map[string]int{"": -1, "%": -1, "5%": 5, "a 100% b": 100, "101%": -1, "3.5%": -1, "40% and 41%": 41, "12% then 999%": 12} {
		n, ok := lastPercent([]byte(text))
		if !ok {
			n = -1
		}
		if n != want {
			t.Errorf("%q is %d, want %d", text, n, want)
		}
	}
}

// TestRaucGroups: a root slot and its children are one thing.
func TestRaucGroups(t *testing.T) {
	slots := []raucSlot{
		{Name: "rootfs.0", Class: "rootfs", Bootname: "A", Status: "ok", SHA256: "r"},
		{Name: "app.0", Class: "app", Parent: "rootfs.0", Status: "ok", SHA256: "old"},
		{Name: "rootfs.1", Class: "rootfs", Bootname: "B"},
	}
	b := raucBundle{Images: map[string][]string{"rootfs": {"q", "r"}, "app": {"new"}}}
	if raucHolds(slots, "rootfs.0", b) || raucHolds(slots, "rootfs.1", b) {
		t.Error("half a group holds a bundle")
	}
	slots[1].SHA256 = "new"
	if !raucHolds(slots, "rootfs.0", b) {
		t.Error("the group does not hold its bundle")
	}
	for _, names := range [][2]string{{"A", "A"}, {"A", ""}, {"app.0", "B"}, {"A", "C"}} {
		if _, err := raucPair(slots, names[0], names[1]); err == nil {
			t.Errorf("%q were taken for two root slots", names)
		}
	}
	got, err := raucPair(slots, "rootfs.1", "A")
	if err != nil || got[SlotA] != "rootfs.1" || got[SlotB] != "rootfs.0" {
		t.Errorf("got %v, %v", got, err)
	}
}
