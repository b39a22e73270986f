package bootlab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"meshupd/install"
	"meshupd/verify"
)

// linuxView is what a kernel finds that has mounted the disk after a cut, and so has replayed the journals.
type linuxView struct {
	err     error // a file system that could not be mounted
	turn    Turn  // what the bootloader would start after that
	turnErr error
	records map[install.SlotName]install.Content
	// counters of the door, the larger of two copies; held says whether there is one.
	counters verify.Counters
	held     bool
}

// viewOf replays the journals of copies of the two partitions.
func viewOf(kind Kind, boot, data []byte, scratch string) (v linuxView) {
	if kind.FS == "ext4" {
		path := filepath.Join(scratch, "boot.replayed")
		if v.err = replayJournal(path, boot); v.err != nil {
			return v
		}
		if boot, v.err = os.ReadFile(path); v.err != nil {
			return v
		}
	}
	v.turn, v.turnErr = kind.Turn(boot, scratch)
	path := filepath.Join(scratch, "data.replayed")
	if v.err = replayJournal(path, data); v.err != nil {
		return v
	}
	files, err := dump(path, scratch, "/slots/slot.a.json", "/slots/slot.b.json", "/door/counters.a", "/door/counters.b")
	if err != nil {
		v.err = err
		return v
	}
	v.records = make(map[install.SlotName]install.Content)
	for i, slot := range []install.SlotName{install.SlotA, install.SlotB} {
		var outer struct{ Body install.Content }
		if json.Unmarshal(files[i], &outer) == nil {
			v.records[slot] = outer.Body
		}
	}
	for _, file := range files[2:] {
		var c verify.Counters
		if json.NewDecoder(bytes.NewReader(file)).Decode(&c) == nil {
			v.held = true
			if c.Accepted >= v.counters.Accepted && c.Floor >= v.counters.Floor {
				v.counters = c
			}
		}
	}
	return v
}

// replayJournal writes a file system of ext4 to path, with its journal replayed and nothing else repaired, as a mount does.
func replayJournal(path string, data []byte) error {
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return err
	}
	out, err := tool(context.Background(), "", nil, "e2fsck", "-p", "-E", "journal_only", path)
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() == 1:
		return nil // it has replayed
	case err != nil && bytes.Contains(out, []byte("needs_recovery flag is clear")):
		return nil // e2fsck would ask; a mount throws such a journal away (jbd2_journal_wipe)
	case err != nil:
		return fmt.Errorf("%w: %.300s", err, bytes.TrimSpace(out))
	}
	return nil
}

// dump reads files out of a file system of ext4; what is not there is nil.
func dump(image, scratch string, names ...string) ([][]byte, error) {
	var commands []byte
	for i, name := range names {
		commands = fmt.Appendf(commands, "dump %s %s\n", name, filepath.Join(scratch, fmt.Sprintf("dump.%d", i)))
	}
	script := filepath.Join(scratch, "dump.commands")
	if err := os.WriteFile(script, commands, 0o600); err != nil {
		return nil, err
	}
	_, err := tool(context.Background(), "", nil, "debugfs", "-f", script, image)
	files := make([][]byte, len(names))
	for i := range names {
		path := filepath.Join(scratch, fmt.Sprintf("dump.%d", i))
		files[i], _ = os.ReadFile(path)
		_ = os.Remove(path)
	}
	return files, err
}

// judge holds the view against what was promised. What the bootloader would start is judged as before: a mount must not change it
// into something else that was never promised.
func (v linuxView) judge(s Story, stand Stand, holds func(install.SlotName) string) (Harm, string) {
	if v.err != nil {
		return HarmBrick, v.err.Error()
	}
	if harm, why := s.Judge(stand, v.turn, v.turnErr, holds); harm != HarmNone {
		return harm, "after the journal is replayed: " + why
	}
	for slot, c := range v.records {
		if got := holds(slot); c.Whole && got != c.Version {
			return HarmWrong, fmt.Sprintf("the record says that slot %s holds %s, and it holds %q", slot, c.Version, got)
		}
	}
	if Marker(stand) != MarkerConfirmed {
		return HarmNone, ""
	}
	switch c := v.records[s.To]; {
	case !c.Whole || c.Version != s.After:
		return HarmLost, fmt.Sprintf("confirmed, and the record of slot %s is %+v", s.To, c)
	case !v.held || v.counters.Floor == 0 || v.counters.Floor != v.counters.Accepted:
		return HarmLost, fmt.Sprintf("confirmed, and the counters are %+v", v.counters)
	}
	return HarmNone, ""
}

// Judge holds a disk that was cut against what was promised: as it lies there, and as a kernel finds it.
func (d Disk) Judge(l *Lab, s Story, stand Stand, scratch string) (Harm, string, error) {
	parts := make(map[int][]byte)
	for _, n := range []int{l.Kind.Boot(), PartData, PartA, PartB} {
		var err error
		if parts[n], err = d.Part(n); err != nil {
			return HarmNone, "", err
		}
	}
	holds := func(slot install.SlotName) string { return l.Holds(parts[Part(slot)]) }
	turn, err := l.Kind.Turn(parts[l.Kind.Boot()], scratch)
	harm, why := s.Judge(stand, turn, err, holds)
	if harm == HarmNone {
		harm, why = viewOf(l.Kind, parts[l.Kind.Boot()], parts[PartData], scratch).judge(s, stand, holds)
	}
	return harm, why, nil
}
