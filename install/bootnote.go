package install

import "meshupd/verify"

// choice is what a bootloader's medium says.
type choice struct {
	Default SlotName // booted when there is no trial
	Trial   SlotName // "" when there is none
	Left    int      // starts of Trial that the bootloader will still make by itself; 0: used up
	Booted  SlotName // only from a medium that knows what runs, else ""
}

func (c choice) same(other choice) bool {
	return c.Default == other.Default && c.Trial == other.Trial && c.Left == other.Left
}

// next is the slot that the next start boots.
func (c choice) next() SlotName {
	if c.Trial != "" && c.Left > 0 {
		return c.Trial
	}
	return c.Default
}

// wrong says which rule the choice breaks, or "".
func (c choice) wrong() string {
	switch {
	case !c.Default.valid():
		return "no slot is the default"
	case c.Booted != "" && !c.Booted.valid():
		return "the booted slot is neither a nor b"
	case c.Trial == "" && c.Left != 0:
		return "there are starts left of no trial"
	case c.Trial != "" && (!c.Trial.valid() || c.Trial == c.Default):
		return "the slot on trial does not fit"
	case c.Left < 0 || c.Left > maxStarts:
		return "the starts left are out of range"
	}
	return ""
}

// bootNote adds to the medium what it cannot hold.
type bootNote struct {
	Trial  SlotName `json:"trial,omitempty"`  // armed, and neither confirmed nor given up since
	More   int      `json:"more,omitempty"`   // its starts beyond those that the medium counts
	Failed SlotName `json:"failed,omitempty"` // as in BootState
	Why    string   `json:"why,omitempty"`    // as in BootState
	Starts int      `json:"starts,omitempty"` // that Trial was given
	Armed  int64    `json:"armed,omitempty"`  // when it was, in seconds since 1970
	// Over is the slot that still runs, in the start of the machine that BootID names, though its trial is over. Without
	// the id it would be taken for the first start of a later trial.
	Over   SlotName `json:"over,omitempty"`
	BootID string   `json:"boot_id,omitempty"`
}

// parseNote reads loader.json. Errors are E-BOOT.
func parseNote(data []byte) (bootNote, error) {
	var n bootNote
	if err := unseal(data, noteSchema, maxNote, &n); err != nil {
		return bootNote{}, verify.Refuse(verify.CodeBoot, "%w", err)
	}
	for _, slot := range []SlotName{n.Trial, n.Failed, n.Over} {
		if slot != "" && !slot.valid() {
			return bootNote{}, verify.Refuse(verify.CodeBoot, "read the note of the boot state: a slot is neither a nor b")
		}
	}
	if len(n.Why) > 4*maxWhy || n.Starts < 0 || n.Starts > maxStarts || n.More < 0 || n.More > maxStarts || len(n.BootID) > maxBootID {
		return bootNote{}, verify.Refuse(verify.CodeBoot, "read the note of the boot state: a number is out of range")
	}
	return n, nil
}

// view is all that is observed of a machine's boot state.
type view struct {
	choice
	note   bootNote
	booted SlotName
	id     string // boot id of now
}

// state says what the observations come to.
//
//	booted     medium                 note             phase
//	default    trial, starts left     -                armed
//	default    trial, used up         -                settled, the trial failed
//	default    no trial               a trial          settled, the trial failed (or was confirmed, when it is the default)
//	default    no trial               failed           settled, failed until it is taken note of
//	other      -                      over, this id    settled, given up until the restart
//	other      -                      -                trial: also when the note is missing, or a person chose the slot
func (v view) state() BootState {
	st := BootState{Phase: PhaseSettled, Booted: v.booted, Default: v.Default}
	switch {
	case v.booted != v.Default && v.over() != "" && v.note.Over == v.over() && v.note.BootID == v.id:
		st.Failed = v.note.Failed
	case v.booted != v.Default:
		st.Phase, st.Trial = PhaseTrial, v.booted
		st.Left = v.left(v.booted)
	case v.Trial != "" && v.Left > 0:
		st.Phase, st.Trial = PhaseArmed, v.Trial
		st.Left = v.left(v.Trial)
	case v.note.Failed != "":
		st.Failed = v.note.Failed
	case v.Trial != "":
		st.Failed = v.Trial
	case v.note.Trial != v.Default:
		st.Failed = v.note.Trial
	}
	if st.Failed != "" {
		st.Why = v.why(st.Failed)
	}
	return st
}

// why is what is known of a trial that fell back. One that was given up was given a reason by whoever did it.
func (v view) why(failed SlotName) string {
	switch {
	case failed == "" || v.note.Failed != "":
		return v.note.Why
	case v.note.Trial == failed && v.note.Starts > 0:
		return startedWhy(v.note.Starts - v.left(failed))
	}
	return startedWhy(0)
}

// left is the number of starts that a trial still has.
func (v view) left(slot SlotName) (n int) {
	if v.Trial == slot {
		n = v.Left
	}
	if v.note.Trial == slot {
		n += v.note.More
	}
	return n
}

// over is the slot that runs without being the default, or "".
func (v view) over() SlotName {
	if v.booted == v.Default {
		return ""
	}
	return v.booted
}

// resume decides what a start of the daemon does: the new note, then the new choice if write is true.
func (v view) resume() (note bootNote, next choice, write bool) {
	note, next = v.note, v.choice
	next.Booted = ""
	switch st := v.state(); {
	case st.Phase == PhaseSettled:
		// Also when nothing changed: bootloaders count the starts of the default slot too, and wait to be told that it is good.
		return bootNote{Failed: st.Failed, Why: v.why(st.Failed), Over: v.over(), BootID: v.note.BootID}, choice{Default: v.Default}, true
	case st.Phase == PhaseTrial && v.note.Trial != v.booted:
		// Cut while it was armed. A fallback would go unnoticed by bootloaders that keep no trace of one.
		return bootNote{Trial: v.booted, BootID: v.id}, next, false
	case st.Phase == PhaseTrial && v.Left == 0 && v.note.More > 0:
		// The note first: a start may be lost by a cut, and never gained.
		note.More--
		return note, choice{Default: v.Default, Trial: v.booted, Left: 1}, true
	}
	return note, next, false
}
