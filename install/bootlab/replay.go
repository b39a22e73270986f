package bootlab

import (
	"fmt"
	"math/rand/v2"

	"meshupd/install"
)

// Replay makes the disks that a power cut could have left of one recorded run, and judges each.
type Replay struct {
	Kind  Kind
	Story Story
	Stand Stand                    // before the first entry
	Holds func(slot []byte) string // names the version that a slot holds whole, or is ""
	Base  []byte                   // the disk before the first entry
	Log   []Entry
	// Seeds is how many random subsets of the writes between two flushes are tried.
	Seeds int
	// Linux also looks at the disk as a kernel that has replayed the journals does: at the bootloader's choice once more, and at
	// the records. Random subsets are left out of that.
	Linux bool

	scratch string
	disk    *medium
	random  *rand.Rand
	stand   Stand
	turns   map[uint64]turned
	slots   map[uint64]string
	views   map[[2]uint64]linuxView
	count   Count
}

type turned struct {
	turn Turn
	err  error
}

// Count is what a Replay came to.
type Count struct {
	Entries, Flushes        int
	Prefixes, Subsets, Torn int           // disks that were judged
	Boots, Views            int           // different boot partitions among them, and different disks as Linux sees them
	Behind                  map[Stand]int // disks, by what was promised
	Harm                    map[Harm]int
	First                   []string // the first few that were harmed
}

func (c Count) String() string {
	return fmt.Sprintf("entries=%d flushes=%d prefixes=%d subsets=%d torn=%d; distinct: boot partitions=%d, after journal replay=%d; behind ARMED=%d CONFIRMING=%d CONFIRMED=%d; bricks=%d wrong boots=%d lost confirmations=%d",
		c.Entries, c.Flushes, c.Prefixes, c.Subsets, c.Torn, c.Boots, c.Views, c.Behind[Stand(MarkerArmed)], c.Behind[Stand(MarkerConfirming)],
		c.Behind[Stand(MarkerConfirmed)], c.Harm[HarmBrick], c.Harm[HarmWrong], c.Harm[HarmLost])
}

// Harmed counts the disks that a cut would have done harm to.
func (c Count) Harmed() int { return c.Harm[HarmBrick] + c.Harm[HarmWrong] + c.Harm[HarmLost] }

// Run judges the disk behind every prefix of the log; with the last write torn between two sectors; and, at every flush, every
// mark and the end, with some of the writes since the last flush missing: each alone, all but each, all, and random subsets. At a
// mark that is done for what held before it and for what holds behind it.
func (r *Replay) Run(scratch string) Count {
	r.scratch, r.disk, r.stand = scratch, newMedium(r.Base), r.Stand
	r.turns, r.slots, r.views = make(map[uint64]turned), make(map[uint64]string), make(map[[2]uint64]linuxView)
	r.random = rand.New(rand.NewPCG(1, 2))
	r.count = Count{Entries: len(r.Log), Behind: make(map[Stand]int), Harm: make(map[Harm]int)}
	var open []Entry // completed since the last flush
	r.judge("before the first entry", r.Linux)
	for i, e := range r.Log {
		if e.Flush {
			r.count.Flushes++
			r.subsets(open, i)
			for _, w := range open {
				r.disk.apply(w)
			}
			open = nil
		}
		if m := markOf(e); m != "" {
			r.subsets(open, i)
			r.stand = r.stand.Move(m)
			r.subsets(open, i)
			r.prefix(open, i)
			continue
		}
		if len(e.Data) == 0 {
			continue
		}
		r.torn(open, e, i)
		open = append(open, e)
		r.prefix(open, i)
	}
	r.subsets(open, len(r.Log))
	r.count.Boots, r.count.Views = len(r.turns), len(r.views)
	return r.count
}

func (r *Replay) prefix(open []Entry, at int) {
	r.count.Prefixes++
	r.disk.with(open, func() { r.judge(fmt.Sprintf("prefix of %d entries", at+1), r.Linux) })
}

// sector is what a medium writes whole or not at all.
const sector = 512

// torn tears the last write. In a slot it would be one more half image. Only what the bootloader sees is judged: a file system
// expects its blocks to be written whole, and no order of ours would change that.
func (r *Replay) torn(open []Entry, e Entry, at int) {
	n := len(e.Data) / sector
	if p := partOf(e.At); n < 2 || p == PartA || p == PartB {
		return
	}
	cut := (1 + r.random.IntN(n-1)) * sector
	for what, piece := range map[string]Entry{
		"the first sector":         {At: e.At, Data: e.Data[:sector]},
		"all but the first sector": {At: e.At + sector, Data: e.Data[sector:]},
		"a part":                   {At: e.At, Data: e.Data[:cut]},
	} {
		r.count.Torn++
		r.disk.with(append(append([]Entry(nil), open...), piece), func() { r.judge(fmt.Sprintf("entry %d, %s of it", at, what), false) })
	}
}

func (r *Replay) subsets(open []Entry, at int) {
	try := func(what string, linux bool, keep func(i int) bool) {
		var some []Entry
		for i, w := range open {
			if w.FUA || keep(i) {
				some = append(some, w)
			}
		}
		r.count.Subsets++
		r.disk.with(some, func() { r.judge(fmt.Sprintf("flush or mark at entry %d, %s of %d writes", at, what, len(open)), linux) })
	}
	try("none", r.Linux, func(int) bool { return false })
	if len(open) < 2 {
		return
	}
	for i := range open {
		try(fmt.Sprintf("all but number %d", i), r.Linux, func(k int) bool { return k != i })
		try(fmt.Sprintf("only number %d", i), r.Linux, func(k int) bool { return k == i })
	}
	for range r.Seeds {
		bits := make([]bool, len(open))
		for i := range bits {
			bits[i] = r.random.IntN(2) == 0
		}
		try("a random half", false, func(i int) bool { return bits[i] })
	}
}

// judge holds the disk as it is against what was promised by then.
func (r *Replay) judge(where string, linux bool) {
	r.count.Behind[r.stand]++
	found := r.turn()
	harm, why := r.Story.Judge(r.stand, found.turn, found.err, r.holds)
	if harm == HarmNone && linux {
		harm, why = r.judgeLinux()
	}
	if harm == HarmNone {
		return
	}
	r.count.Harm[harm]++
	if len(r.count.First) < 10 {
		r.count.First = append(r.count.First, fmt.Sprintf("%s, behind %q: %s: %s", where, r.stand, harm, why))
	}
}

func (r *Replay) turn() turned {
	key := r.disk.sums[r.Kind.Boot()]
	found, known := r.turns[key]
	if !known {
		found.turn, found.err = r.Kind.Turn(r.disk.part(r.Kind.Boot()), r.scratch)
		r.turns[key] = found
	}
	return found
}

func (r *Replay) holds(slot install.SlotName) string {
	key := r.disk.sums[Part(slot)]
	version, known := r.slots[key]
	if !known {
		version = r.Holds(r.disk.part(Part(slot)))
		r.slots[key] = version
	}
	return version
}

func (r *Replay) judgeLinux() (Harm, string) {
	key := [2]uint64{r.disk.sums[r.Kind.Boot()], r.disk.sums[PartData]}
	v, known := r.views[key]
	if !known {
		v = viewOf(r.Kind, r.disk.part(r.Kind.Boot()), r.disk.part(PartData), r.scratch)
		r.views[key] = v
	}
	return v.judge(r.Story, r.stand, r.holds)
}

// Add counts another part of the same run.
func (c *Count) Add(more Count) {
	c.Entries, c.Flushes = c.Entries+more.Entries, c.Flushes+more.Flushes
	c.Prefixes, c.Subsets, c.Torn = c.Prefixes+more.Prefixes, c.Subsets+more.Subsets, c.Torn+more.Torn
	c.Boots, c.Views = c.Boots+more.Boots, c.Views+more.Views
	if c.Behind == nil {
		c.Behind, c.Harm = make(map[Stand]int), make(map[Harm]int)
	}
	for stand, n := range more.Behind {
		c.Behind[stand] += n
	}
	for harm, n := range more.Harm {
		c.Harm[harm] += n
	}
	c.First = append(c.First, more.First...)
}
