package bootlab_test

import (
	"bytes"
	"errors"
	"testing"

	"meshupd/install"
	"meshupd/install/bootlab"
)

// fakeKind chooses by the first two bytes of the boot partition: what is next, and the default.
var fakeKind = bootlab.Kind{Name: "fake", FS: "raw", Turn: func(boot []byte, _ string) (bootlab.Turn, error) {
	next, def := install.SlotName(boot[0:1]), install.SlotName(boot[1:2])
	if next != install.SlotA && next != install.SlotB || def != install.SlotA && def != install.SlotB {
		return bootlab.Turn{}, errors.New("no choice")
	}
	return bootlab.Turn{Next: next, Default: def}, nil
}}

// fakeHolds: a slot is whole when its first and its last page say the same version.
func fakeHolds(slot []byte) string {
	if first, last := string(slot[:5]), string(slot[len(slot)-4096:][:5]); first == last {
		return first
	}
	return ""
}

// TestReplayNotices has writes in an order, and without the flushes, that a cut makes harm of.
func TestReplayNotices(t *testing.T) {
	at := func(part int, page int64) int64 { return bootlab.PartAt(part) + page*4096 }
	last := int64(bootlab.SlotSize/4096 - 1)
	write := func(part int, page int64, text string) bootlab.Entry {
		return bootlab.Entry{At: at(part, page), Data: append([]byte(text), make([]byte, 4096-len(text))...)}
	}
	mark := func(m bootlab.Marker) bootlab.Entry {
		return write(bootlab.PartMarks, 0, bootlab.MarkerPrefix+string(m)+"\n")
	}
	flush := bootlab.Entry{Flush: true}
	slot := []bootlab.Entry{write(bootlab.PartB, 0, "2.0.0"), write(bootlab.PartB, last, "2.0.0")}
	arm, confirm := write(bootlab.PartBoot, 0, "ba"), write(bootlab.PartBoot, 0, "bb")
	log := func(parts ...any) (out []bootlab.Entry) {
		for _, p := range parts {
			switch p := p.(type) {
			case bootlab.Entry:
				out = append(out, p)
			case []bootlab.Entry:
				out = append(out, p...)
			case bootlab.Marker:
				out = append(out, mark(p))
			}
		}
		return out
	}
	base := make([]byte, bootlab.DiskSize())
	copy(base[at(bootlab.PartBoot, 0):], "aa")
	for part, version := range map[int]string{bootlab.PartA: "1.0.0", bootlab.PartB: "0.9.0"} {
		copy(base[at(part, 0):], version)
		copy(base[at(part, last):], version)
	}
	for name, c := range map[string]struct {
		log  []bootlab.Entry
		want bootlab.Harm
	}{
		"as it should be": {log(slot, flush, bootlab.MarkerTrying, arm, flush, bootlab.MarkerArmed, bootlab.MarkerConfirming, confirm, flush,
			bootlab.MarkerConfirmed), bootlab.HarmNone},
		"armed before the slot is durable": {log(slot, bootlab.MarkerTrying, arm, flush), bootlab.HarmBrick},
		"armed before the slot is written": {log(bootlab.MarkerTrying, arm, flush, slot, flush), bootlab.HarmWrong},
		"armed unasked":                    {log(slot, flush, arm, flush), bootlab.HarmWrong},
		"default before it is confirmed":   {log(slot, flush, bootlab.MarkerTrying, confirm, flush), bootlab.HarmWrong},
		"confirmed without a flush": {log(slot, flush, bootlab.MarkerTrying, arm, flush, bootlab.MarkerConfirming, confirm,
			bootlab.MarkerConfirmed), bootlab.HarmLost},
		"confirmed, flushed too late": {log(slot, flush, bootlab.MarkerTrying, arm, flush, bootlab.MarkerConfirming, confirm,
			bootlab.MarkerConfirmed, flush), bootlab.HarmLost},
		"the choice is gone for a moment": {log(write(bootlab.PartBoot, 0, "  "), flush, write(bootlab.PartBoot, 0, "aa"), flush), bootlab.HarmBrick},
		"the slot that runs is spoilt":    {log(write(bootlab.PartA, 0, "3.0.0"), flush), bootlab.HarmBrick},
	} {
		t.Run(name, func(t *testing.T) {
			r := bootlab.Replay{Kind: fakeKind, Story: firstUpdate, Holds: fakeHolds, Base: base, Log: c.log, Seeds: 5}
			count := r.Run(t.TempDir())
			if c.want == bootlab.HarmNone && count.Harmed() > 0 || c.want != bootlab.HarmNone && count.Harm[c.want] == 0 {
				t.Errorf("want %q, got %s: %q", c.want, count, count.First)
			}
			if !bytes.Equal(base[at(bootlab.PartBoot, 0):][:2], []byte("aa")) {
				t.Fatal("the disk before the log was changed")
			}
		})
	}
}
