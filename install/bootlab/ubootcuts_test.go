package bootlab_test

import (
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"meshupd/install"
	"meshupd/install/bootlab"
)

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
