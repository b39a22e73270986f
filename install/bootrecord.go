package install

import (
	"meshupd/verify"
)

// maxStarts bounds how often a trial may be started: more is a mistake in a configuration.
const maxStarts = 100

// maxReruns is how often start runs the restart command of a fallback whose end was never seen. A command that stops
// meshupd itself would else be run again at each start, for ever.
const maxReruns = 3

// bootRecord is the durable boot state of a device whose slots are chosen by a pointer. Its methods decide and touch nothing.
type bootRecord struct {
	Phase   Phase    `json:"phase"`
	Booted  SlotName `json:"booted"`
	Default SlotName `json:"default"`
	Trial   SlotName `json:"trial,omitempty"`
	Left    int      `json:"left,omitempty"`
	Failed  SlotName `json:"failed,omitempty"`
	Why     string   `json:"why,omitempty"` // beside Failed, when nobody but this record knows

	Starts int   `json:"starts,omitempty"` // that the trial was given
	Armed  int64 `json:"armed,omitempty"`  // when it was, in seconds since 1970

	// Open is true from before the pointer is switched until the restart command has completed.
	Open bool `json:"open,omitempty"`
	// Reruns counts the unfinished restarts of a settled device since the last that completed.
	Reruns int `json:"reruns,omitempty"`
	// BootID is the machine's boot id when the trial was armed or last started.
	BootID string `json:"boot_id,omitempty"`
}

const (
	bootSchema = "meshupd.boot/1"
	maxBoot    = 4 << 10
)

// parseBoot reads boot.json. Errors are E-BOOT.
func parseBoot(data []byte) (bootRecord, error) {
	var r bootRecord
	if err := unseal(data, bootSchema, maxBoot, &r); err != nil {
		return bootRecord{}, verify.Refuse(verify.CodeBoot, "%w", err)
	}
	if what := r.wrong(); what != "" {
		return bootRecord{}, verify.Refuse(verify.CodeBoot, "read the boot state: %s", what)
	}
	return r, nil
}

// wrong says which rule the record breaks, or "".
func (r bootRecord) wrong() string {
	switch {
	case !r.Booted.valid() || !r.Default.valid():
		return "a slot is neither a nor b"
	case r.Failed != "" && (!r.Failed.valid() || r.Phase != PhaseSettled):
		return "the failed slot does not fit the phase"
	case len(r.Why) > 4*maxWhy || r.Why != "" && r.Failed == "":
		return "the reason of the failed slot does not fit"
	case r.Starts < 0 || r.Starts > maxStarts:
		return "the starts of the trial are out of range"
	case len(r.BootID) > maxBootID:
		return "the boot id is too long"
	case r.Reruns < 0 || r.Reruns > maxReruns:
		return "the count of restarts is out of range"
	}
	switch r.Phase {
	case PhaseSettled:
		if r.Trial != "" || r.Left != 0 {
			return "a settled device has no trial"
		}
	case PhaseArmed:
		if r.Trial != r.Default.Other() || r.Booted != r.Default || r.Left < 1 || r.Left > maxStarts || r.Open {
			return "the armed trial does not fit"
		}
	case PhaseTrial:
		if r.Trial != r.Default.Other() || r.Left < 0 || r.Left >= maxStarts || r.Booted != r.Trial {
			return "the running trial does not fit"
		}
	default:
		return "the phase is unknown"
	}
	return ""
}

func (s SlotName) valid() bool { return s == SlotA || s == SlotB }

func (r bootRecord) state() BootState {
	return BootState{Phase: r.Phase, Booted: r.Booted, Default: r.Default, Trial: r.Trial, Left: r.Left, Failed: r.Failed, Why: r.Why}
}

// target is the slot that a start boots now.
func (r bootRecord) target() SlotName {
	if r.Phase == PhaseTrial {
		return r.Trial
	}
	return r.Default
}

// armed returns the record after Try of a slot that is neither booted nor default.
func (r bootRecord) armed(slot SlotName, starts int, bootID string) bootRecord {
	return bootRecord{Phase: PhaseArmed, Booted: r.Booted, Default: r.Default, Trial: slot, Left: starts, Starts: starts, BootID: bootID}
}

// settledOn returns the record without a trial.
func (r bootRecord) settledOn(slot SlotName) bootRecord {
	r.Phase, r.Default, r.Trial, r.Left, r.Reruns, r.Starts, r.Armed = PhaseSettled, slot, "", 0, 0, 0, 0
	return r
}

// fallenBack returns the record after the trial was given up. What was booted stays so until the default runs again.
func (r bootRecord) fallenBack() bootRecord {
	r.Failed, r.Why = r.Trial, ""
	return r.settledOn(r.Default)
}

// begin returns the record of the start that is about to happen, with its use of a start counted. A trial counts as
// booted from here on: whether the application gets that far is not known, and its slot must not be written before the
// default runs again.
func (r bootRecord) begin(bootID string) bootRecord {
	switch {
	case r.Phase == PhaseArmed, r.Phase == PhaseTrial && r.Left > 0:
		r.Phase, r.Booted = PhaseTrial, r.Trial
		r.Left--
	case r.Phase == PhaseTrial:
		why := startedWhy(r.Starts)
		r = r.fallenBack()
		r.Why = why
	}
	r.Open, r.BootID = true, bootID
	return r
}

// ended returns the record after the restart command has completed.
func (r bootRecord) ended() bootRecord {
	r.Booted, r.Open, r.Reruns = r.target(), false, 0
	return r
}

// deed is what is left to do at a start of the daemon.
type deed int

const (
	deedNone deed = iota // nothing
	deedSave             // make the new record durable
	deedTake             // that, and take the start: pointer, restart command
)

// wake decides what a start of the daemon has to do; the table stands above Files. pointed is the slot that the pointer
// names, machine says that the restart command restarts the machine.
func (r bootRecord) wake(bootID string, pointed SlotName, machine bool) (bootRecord, deed) {
	same := r.BootID == bootID
	switch {
	case r.Open && pointed != r.target():
		// The start was counted and has not happened.
		r.BootID = bootID
		return r, deedTake
	case r.Open && machine && !same:
		// This power-on is the start that was counted.
		r.BootID = bootID
		return r.ended(), deedSave
	case r.Open && machine:
		return r, deedTake
	case r.Open && r.Phase == PhaseSettled:
		if r.Reruns >= maxReruns {
			return r.ended(), deedSave
		}
		r.Reruns++
		return r.begin(bootID), deedTake
	case r.Open, pointed != r.Booted:
		return r.begin(bootID), deedTake
	case r.Phase == PhaseSettled && r.Booted == r.Default:
		return r, deedNone
	case r.Phase == PhaseSettled:
		return r.begin(bootID), deedTake
	case same:
		return r, deedNone
	case r.Phase == PhaseTrial && r.Left > 0:
		r.Left--
		r.BootID = bootID
		return r, deedSave
	default:
		return r.begin(bootID), deedTake
	}
}
