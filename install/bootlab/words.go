package bootlab

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"meshupd/install"
)

// What guest and lab have to agree on.
const (
	// Product is the one of all releases in the lab.
	Product = "bootlab"
	// FactoryVersion is what slot a of a new disk holds.
	FactoryVersion = "1.0.0"
	// MarkerPrefix begins each line that the guest means for the lab.
	MarkerPrefix = "LAB "
	// MarkSize is the size of a marker in the write log.
	MarkSize = 4096
	// SerialStick and SerialData are the serial numbers of the second disk, and of the third that only the daemon gets.
	SerialStick = "s1"
	SerialData  = "data"
)

// Marker names a moment in the life of a machine.
type Marker string

// The markers, in the order of an update.
const (
	MarkerLoader     Marker = "LOADER" // by the bootloader, where it can: it runs
	MarkerBoot       Marker = "BOOT"   // the kernel has started the guest
	MarkerState      Marker = "STATE"  // what the slots say, as FormatState has it
	MarkerWriting    Marker = "WRITING"
	MarkerQuarter    Marker = "QUARTER" // 1 to 3 of the image are written
	MarkerSynced     Marker = "SYNCED"  // the image is synced, and about to be read back
	MarkerWrote      Marker = "WROTE"   // and its record is durable
	MarkerTrying     Marker = "TRYING"
	MarkerArmed      Marker = "ARMED"
	MarkerRestart    Marker = "RESTART"
	MarkerTrial      Marker = "TRIAL" // the new slot runs
	MarkerConfirming Marker = "CONFIRMING"
	MarkerConfirmed  Marker = "CONFIRMED"
	MarkerSilent     Marker = "SILENT" // restarts without having confirmed
	MarkerGivingUp   Marker = "GIVING-UP"
	MarkerGaveUp     Marker = "GAVE-UP"
	MarkerRecording  Marker = "RECORDING"
	MarkerRecorded   Marker = "RECORDED" // the failure is remembered, and the bootloader told
	MarkerStatus     Marker = "STATUS"   // what "meshupd status --json" prints, when the state is another
	MarkerImported   Marker = "IMPORTED" // and what "meshupd import" says
	MarkerSettled    Marker = "SETTLED"  // nothing is left to do
	MarkerOff        Marker = "OFF"
	MarkerFail       Marker = "FAIL" // with the error
)

// TrialEnd says how a trial ends.
type TrialEnd string

// The ends of a trial.
const (
	TrialGood   TrialEnd = "good"   // it is confirmed
	TrialPanic  TrialEnd = "panic"  // the new system dies before it says anything
	TrialSilent TrialEnd = "silent" // the new system restarts and never confirms
	TrialSick   TrialEnd = "sick"   // the new system finds itself not healthy and falls back
)

// Scenario is what a guest shall do.
type Scenario struct {
	Trial TrialEnd
	Look  bool // change nothing that the start itself does not change, and say what there is
	Marks bool // leave markers in the write log
	// Daemon has the real daemon do everything.
	Daemon bool
	// Rename has the bootloader's files replaced by rename, as they must not be: the lab shows with it that it would notice.
	Rename bool
	Starts int // of a trial, at least 1
}

// String is the form of a machine's serial number.
func (s Scenario) String() string {
	words := []string{"trial:" + string(s.Trial), "starts:" + strconv.Itoa(max(s.Starts, 1))}
	if s.Trial == "" {
		words[0] = "trial:" + string(TrialGood)
	}
	if s.Look {
		words = append(words, "look")
	}
	if s.Marks {
		words = append(words, "marks")
	}
	if s.Daemon {
		words = append(words, "daemon")
	}
	if s.Rename {
		words = append(words, "rename")
	}
	return strings.Join(words, ";")
}

// ParseScenario reads what String wrote.
func ParseScenario(text string) (Scenario, error) {
	var s Scenario
	for _, word := range strings.Split(text, ";") {
		name, value, _ := strings.Cut(word, ":")
		switch name {
		case "trial":
			s.Trial = TrialEnd(value)
		case "starts":
			n, err := strconv.Atoi(value)
			if err != nil {
				return Scenario{}, fmt.Errorf("scenario %.80q: %w", text, err)
			}
			s.Starts = n
		case "look":
			s.Look = true
		case "marks":
			s.Marks = true
		case "daemon":
			s.Daemon = true
		case "rename":
			s.Rename = true
		default:
			return Scenario{}, fmt.Errorf("scenario %.80q: unknown word %.20q", text, word)
		}
	}
	return s, nil
}

// FormatState is one line.
func FormatState(st install.State) string {
	line, err := json.Marshal(st)
	if err != nil {
		return err.Error()
	}
	return string(line)
}

// ParseState reads what FormatState wrote.
func ParseState(line string) (st install.State, err error) {
	err = json.Unmarshal([]byte(line), &st)
	return st, err
}
