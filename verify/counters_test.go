package verify

import (
	"bytes"
	"reflect"
	"testing"
	"time"
)

func FuzzCounters(f *testing.F) {
	good, err := encodeCounters(counterRecord{
		Format: counterFormat, Generation: 7, Counters: Counters{Line: 2, Accepted: 9, Floor: 8},
		AcceptedID: Digest{1}, Proven: time.Unix(1_800_000_000, 0).UTC(),
		Recalled: []Digest{{2}, {3}}, Alarms: []Alarm{{CodeFork, "release 2.9", Digest{1}, Digest{4}}},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte("0"), 65))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := parseCounters(raw)
		if err != nil {
			if CodeOf(err) == "" {
				t.Fatalf("no code: %v", err)
			}
			return
		}
		out, err := encodeCounters(r)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parseCounters(out); err != nil || !reflect.DeepEqual(again, r) {
			t.Fatalf("came back as %+v, %v", again, err)
		}
	})
}

func TestOneFlippedBitInvalidatesCounters(t *testing.T) {
	raw, err := encodeCounters(counterRecord{Format: counterFormat, Counters: Counters{Accepted: 5}})
	if err != nil {
		t.Fatal(err)
	}
	for at := range raw {
		for bit := range 8 {
			bad := bytes.Clone(raw)
			bad[at] ^= 1 << bit
			if _, err := parseCounters(bad); err == nil {
				t.Fatalf("bit %d of byte %d does not matter", bit, at)
			}
		}
	}
}
