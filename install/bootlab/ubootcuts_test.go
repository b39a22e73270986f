package bootlab_test

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"meshupd/install"
	"meshupd/install/bootlab"
)

// boardLog lets U-Boot start once from what is on the disk of a machine, and returns what it wrote.
func boardLog(t *testing.T, b *bootlab.Board, d bootlab.Disk, image []byte, want install.SlotName) []bootlab.Entry {
	t.Helper()
	part, err := d.Part(bootlab.PartBoot)
	must(t, "read the environment", err)
	disk := bootlab.BoardDisk{Env: part[:bootlab.EnvApart+bootlab.EnvSize], A: image, B: image, Log: filepath.Join(ramDir(t), "log")}
	writeFile(t, disk.Log, nil)
	s, err := b.Start(t.Context(), &disk, "")
	must(t, "start the board", err)
	if s.Slot != want {
		t.Fatalf("U-Boot started slot %s, not %s\n%s", s.Slot, want, s.Said)
	}
	must(t, "keep the environment", d.Put(bootlab.PartBoot, disk.Env))
	log, err := bootlab.ReadBoardLog(disk.Log)
	must(t, "read U-Boot's log", err)
	return log
}

// entriesOf is what a machine wrote.
func entriesOf(t *testing.T, r recording) []bootlab.Entry {
	t.Helper()
	log, err := bootlab.ReadLog(r.Log, int64(len(r.base)))
	must(t, "read the log", err)
	// qemu's NVMe drops FUA. ext4 writes the commit records of its journal with it (journal_submit_commit_record), and without them
	// a removal that was synced would count as one that was not.
	for i, e := range log {
		log[i].FUA = e.FUA || bytes.HasPrefix(e.Data, []byte("\xc0\x3b\x39\x98\x00\x00\x00\x02"))
	}
	return log
}

// judgeLog judges every disk that a cut could have left of an update that more than one machine has written.
func judgeLog(t *testing.T, l *bootlab.Lab, story bootlab.Story, base []byte, log []bootlab.Entry) bootlab.Count {
	t.Helper()
	re := bootlab.Replay{Kind: l.Kind, Story: story, Holds: l.Holds, Base: base, Log: log, Seeds: 200, Linux: true}
	count := re.Run(ramDir(t))
	t.Logf("%s write log: %s", l.Kind.Name, count)
	return count
}

// TestUBootWriteLog records two updates after each other, and a trial that nobody confirms: what a kernel wrote to its disk in the
// guest, and what U-Boot wrote when it counted in between. Each disk that a cut could have left is judged by real starts of U-Boot.
func TestUBootWriteLog(t *testing.T) {
	torture(t)
	needBoard(t)
	kernel := need(t)
	board, err := bootlab.NewBoard(t.Context(), ramDir(t), filepath.Join("..", ".."))
	must(t, "make a board", err)
	image, err := bootlab.BoardImage(t.Context(), ramDir(t), "0")
	must(t, "make an image", err)
	l, err := bootlab.NewLab(t.Context(), ramDir(t), filepath.Join("..", ".."), board.Kind(), kernel, 3)
	must(t, "make a lab", err)
	d, err := l.NewDisk(t.Context(), filepath.Join(ramDir(t), "disk.img"))
	must(t, "make a disk", err)
	a, b := install.SlotA, install.SlotB
	for n, story := range []bootlab.Story{
		{From: a, To: b, Before: bootlab.FactoryVersion, After: "2.0.0"},
		{From: b, To: a, Before: "2.0.0", After: "2.1.0"},
		{From: a, To: b, Before: "2.1.0", After: "2.2.0"},
	} {
		m := record(t, bootlab.Machine{Kind: l.Kind, Kernel: kernel, Disk: d, Stick: l.Releases[n].Bundle, Slot: story.From})
		m.Scenario.Starts = 3
		wantTold(t, live(t, m.Machine), "BOOT slot="+string(story.From)+", WROTE, ARMED, RESTART")
		log := entriesOf(t, m)
		log = append(log, boardLog(t, board, d, image, story.To)...)
		next, told := story.To, "BOOT slot="+string(story.To)+", TRIAL, CONFIRMED, SETTLED, OFF"
		if n == 2 {
			for _, slot := range []install.SlotName{story.To, story.To, story.From} {
				log = append(log, boardLog(t, board, d, image, slot)...)
			}
			next, told = story.From, "BOOT slot="+string(story.From)+", RECORDED, SETTLED, OFF"
		}
		second := record(t, bootlab.Machine{Kind: l.Kind, Kernel: kernel, Disk: d, Stick: l.Releases[n].Bundle, Slot: next})
		second.Scenario.Starts = 3
		wantTold(t, live(t, second.Machine), told)
		log = append(log, entriesOf(t, second)...)
		log = append(log, boardLog(t, board, d, image, next)...)
		before := board.Starts()
		count := judgeLog(t, l, story, m.base, log)
		t.Logf("U-Boot was started %d times to judge", board.Starts()-before)
		if n < 2 {
			wantNoHarm(t, count)
		} else if count.Harmed() > 0 || count.Behind[bootlab.Stand(bootlab.MarkerArmed)] == 0 {
			t.Errorf("a trial that nobody confirmed: %s: %q", count, count.First)
		}
	}
}

// TestUBootPowerCuts cuts the power of a board whose U-Boot counts the starts of a trial, 200 times, around the moment in which it
// saves its environment. The device goes on from what the cut left. A trial has its three starts at most, and nothing but the two
// slots in their order is ever started.
func TestUBootPowerCuts(t *testing.T) {
	torture(t)
	cuts := 200
	if n, err := strconv.Atoi(os.Getenv("MESHUPD_LAB_CUTS")); err == nil {
		cuts = n
	}
	l := newBoardLab(t)
	d := l.newDevice(t, install.UBootLeft, leftEnv)
	d.arm()
	armed := d.read("env")
	ran, before, saved := 0, 0, 0
	for n := range cuts {
		if n%4 == 0 { // three starts, and one more
			writeFile(t, d.file("env"), armed)
			ran = 0
		}
		disk := bootlab.BoardDisk{Env: d.read("env"), A: d.read("a"), B: d.read("b")}
		old := string(disk.Env)
		said, err := l.board.Cut(t.Context(), &disk, "## Executing script", time.Duration(rand.Int64N(int64(150*time.Millisecond))))
		must(t, "cut", err)
		writeFile(t, d.file("env"), disk.Env)
		if string(disk.Env) != old {
			ran++
			saved++
		}
		if !strings.Contains(said, bootlab.MarkerPrefix+"BOOT") {
			before++
		}
		turn, err := l.board.Turn(disk.Env, "")
		want := bootlab.Turn{Next: install.SlotB, Default: install.SlotA}
		if ran == 3 {
			want.Next = install.SlotA
		}
		if err != nil || turn != want || ran > 3 {
			t.Fatalf("after cut %d, with %d starts counted, U-Boot would start %+v: %v\n%s", n, ran, turn, err, said)
		}
	}
	t.Logf("U-Boot power cuts: %d, %d of them before the slot's kernel ran, %d behind a saved count; bricks=0 wrong boots=0", cuts, before, saved)
}
