package install

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// startedWhy is the reason of a trial that fell back without anybody left to say why.
func startedWhy(starts int) string {
	switch {
	case starts <= 0:
		return "the new system was started and did not confirm itself"
	case starts == 1:
		return "the new system was started once and did not confirm itself"
	}
	return fmt.Sprintf("the new system was started %d times and did not confirm itself", starts)
}

const maxWhy = 280 // characters of a reason that the boot state keeps; a Failure holds more

// withLastWords adds to a reason what the kernel said before it died, where it was kept.
func withLastWords(why string, folders []string, since time.Time) string {
	if line := lastWords(folders, since); line != "" {
		why += "; its kernel said: " + line
	}
	return printable(why, maxWhy)
}

// pstoreFolders are where the kernel keeps what it said before it died, and where systemd moves that at the next start.
var pstoreFolders = []string{"/sys/fs/pstore", "/var/lib/systemd/pstore"}

// Bounds of what is read of a folder that firmware fills.
const (
	maxDumps     = 256
	maxDump      = 128 << 10
	maxWordsLine = 160
)

// lastWords is one line of the newest record that is not older than since: that of a panic before that of an oops, and else
// the last one of a console. "" when there is none. A kernel that died without a clock has records that look older than
// they are; those are left out, as nothing tells them from last year's.
func lastWords(folders []string, since time.Time) string {
	best, at, rank := "", time.Time{}, 0
	for _, path := range pstoreRecords(folders) {
		data, when, err := readRecord(path)
		if err != nil || when.Before(since) {
			continue
		}
		line, r := panicLine(data)
		if r == rankLast && !strings.HasPrefix(filepath.Base(path), "console-") {
			continue // the last line of a dump is one of its registers
		}
		if r > rank || r == rank && when.After(at) {
			best, at, rank = line, when, r
		}
	}
	return best
}

// pstoreRecords lists the dumps in the folders, and one folder deeper.
func pstoreRecords(folders []string) []string {
	var list []string
	for _, folder := range folders {
		for _, pattern := range []string{"dmesg-*", "console-*", "*/dmesg*", "*/console-*"} {
			found, err := filepath.Glob(filepath.Join(folder, pattern))
			if err != nil {
				continue
			}
			list = append(list, found...)
		}
	}
	slices.Sort(list)
	return list[max(0, len(list)-maxDumps):]
}

func readRecord(path string) ([]byte, time.Time, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, time.Time{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, time.Time{}, err
	}
	if !info.Mode().IsRegular() {
		return nil, time.Time{}, fmt.Errorf("%s is no regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxDump))
	return data, info.ModTime(), err
}

const (
	rankNone = iota
	rankLast // only the last line
	rankOops
	rankPanic
)

// wordsOf are the beginnings by which a kernel says that it dies.
var wordsOf = []struct {
	rank  int
	words string
}{{rankPanic, "Kernel panic - not syncing"}, {rankOops, "BUG: "}, {rankOops, "Unable to handle kernel"}, {rankOops, "watchdog: BUG"}, {rankOops, "Oops"}}

// logPrefix is what stands before a line of the kernel's log: its level, and the seconds since the start.
var logPrefix = regexp.MustCompile(`^(<\d{1,3}>)?(\[ *\d+\.\d+\](\[ *[TC]\d+\])? )?`)

// panicLine finds the line of a record that says most, fit for a terminal.
func panicLine(data []byte) (line string, rank int) {
	for raw := range bytes.Lines(data) {
		raw = logPrefix.ReplaceAll(raw[:min(len(raw), 1<<10)], nil)
		for _, w := range wordsOf {
			if i := bytes.Index(raw, []byte(w.words)); i >= 0 && w.rank > rank {
				line, rank = printable(string(raw[i:]), maxWordsLine), w.rank
			}
		}
		if rank <= rankLast {
			if text := printable(string(raw), maxWordsLine); text != "" {
				line, rank = text, rankLast
			}
		}
	}
	return line, rank
}
