package peer

// The life of a release on one device. The drawing shows the steps of next; the
// words in capitals are what people see (Phase of a DeviceState).
//
//	            no release, not ours, policy        too little space
//	WAITING <------------------------- settled --------------------> BLOCKED
//	                                      |
//	                                      | StepFetch            (swarm, piece by piece)
//	                                      v
//	                                  FETCHING --whole digest--> FETCHED
//	                                                                |
//	                                                                | StepWrite  (idle slot, read back)
//	                                                                v
//	                                                            INSTALLED
//	                                                                | StepTry    (armed for one start)
//	                                                                | StepRestart
//	                                                                v
//	                           StepConfirm <--healthy-- StepCheck  TRIAL
//	                               |                                |
//	                               v                                | unhealthy: StepFallback, StepRestart
//	                           CONFIRMED                            | or the bootloader alone
//	                                                                v
//	                                     StepRecord ----------> ROLLED-BACK (never picked again here)
//
// A device observes Facts, asks next for one Step, does it, and observes again.
// Nothing is remembered between rounds but what is durable in the store, the
// slots and the failures, and the outcome of the last health check. So a restart,
// a power cut and a lost message all take the ordinary path.

// DeviceState is the word for people that sums up Facts.
type DeviceState string

// The states. Only StateConfirmed counts as done.
const (
	StateWaiting    DeviceState = "waiting"     // knows of nothing to do, or may not do it
	StateFetching   DeviceState = "fetching"    // lacks bytes of the target
	StateFetched    DeviceState = "fetched"     // holds the target, whole and verified
	StateInstalled  DeviceState = "installed"   // the idle slot holds the target; not started yet
	StateTrial      DeviceState = "trial"       // started the target, not proven healthy yet
	StateConfirmed  DeviceState = "confirmed"   // runs the target, healthy, and will boot it again
	StateRolledBack DeviceState = "rolled-back" // the target failed here; the old version runs
	StateBlocked    DeviceState = "blocked"     // cannot go on without help; the reason says why
	StateSilent     DeviceState = "silent"      // not heard for SilentAfter; only others can say this of a device
)

// Target says how the newest release that this device may run stands to what runs now.
type Target int

// The targets.
const (
	TargetNone    Target = iota // no release known that is meant for this device
	TargetUnfit                 // meant for this device, but a rule of the release forbids it (Facts.Why)
	TargetFailed                // it failed here before
	TargetNew                   // to be installed
	TargetRunning               // it is what runs
)

// ImageFact says how much of the target is in the store.
type ImageFact int

// The image facts.
const (
	ImageMissing ImageFact = iota // some byte is missing
	ImageWhole                    // all images of the target for this device are held whole
)

// BootFact says where the boot state stands.
type BootFact int

// The boot facts.
const (
	BootSettled  BootFact = iota // the default slot runs
	BootArmed                    // the next start is a trial
	BootTrial                    // the slot on trial runs
	BootReturned                 // a trial was given up, and its slot still runs: restart into the default
)

// HealthFact is the outcome of the health check of the present trial.
type HealthFact int

// The health facts.
const (
	HealthUnknown HealthFact = iota
	HealthGood
	HealthBad
)

// Policy says how far a device goes by itself.
type Policy int

// The policies.
const (
	PolicyOff     Policy = iota // knows and tells, fetches nothing
	PolicyFetch                 // fetches and shares, installs nothing
	PolicyInstall               // goes all the way
)

// HoldFact says how far the restart policy of the device holds the new version back. A running trial is not held, and
// neither is the way back.
type HoldFact int

// The holds.
const (
	HoldNone    HoldFact = iota
	HoldRestart          // may be armed; the restart is the device's own
	HoldAll              // neither armed nor restarted now
)

// Facts are all that next looks at. They are observed anew in every round.
type Facts struct {
	Policy     Policy
	Target     Target
	Image      ImageFact
	SpaceShort bool // the missing bytes do not fit
	Idle       bool // the idle slot holds the target, whole
	Boot       BootFact
	Health     HealthFact // of the trial, when Boot is BootTrial
	Hold       HoldFact
	Unrecorded bool // a trial failed and is not yet in the failures
}

// Step is one thing to do.
type Step int

// The steps.
const (
	StepWait     Step = iota // nothing until something changes
	StepFetch                // let the swarm get what is missing, and wait
	StepWrite                // write the idle slot
	StepTry                  // arm the idle slot
	StepRestart              // start what the boot state says
	StepCheck                // run the health check of the trial
	StepConfirm              // make the trial the default
	StepFallback             // give the trial up
	StepRecord               // remember the failure
)

func (s Step) String() string {
	return [...]string{"wait", "fetch", "write", "try", "restart", "check", "confirm", "fallback", "record"}[s]
}

// next decides the one step that follows from the facts. It is total: every
// combination has an answer. A trial is ended before anything else is begun, and
// a failure is remembered before the old system is started again, so that a cut
// in between cannot make the device try the same image twice.
func next(f Facts) Step {
	switch {
	case f.Boot == BootTrial:
		switch f.Health {
		case HealthGood:
			return StepConfirm
		case HealthBad:
			return StepFallback
		default:
			return StepCheck
		}
	case f.Unrecorded:
		return StepRecord
	case f.Boot == BootArmed && f.Hold != HoldNone:
		return StepWait
	case f.Boot == BootArmed, f.Boot == BootReturned:
		return StepRestart
	case f.Target != TargetNew:
		return StepWait
	case f.Idle:
		if f.Policy == PolicyInstall && f.Hold != HoldAll {
			return StepTry
		}
		return StepWait
	case f.Image == ImageWhole:
		if f.Policy == PolicyInstall {
			return StepWrite
		}
		return StepWait
	case f.Policy == PolicyOff, f.SpaceShort:
		return StepWait
	default:
		return StepFetch
	}
}

// state sums the facts up in one word. have says whether any byte of the target is held already.
func state(f Facts, have bool) DeviceState {
	switch {
	case f.Boot == BootTrial:
		return StateTrial
	case f.Boot == BootReturned, f.Unrecorded, f.Target == TargetFailed:
		return StateRolledBack
	case f.Boot == BootArmed:
		return StateInstalled
	case f.Target == TargetRunning:
		return StateConfirmed
	case f.Target == TargetUnfit:
		return StateBlocked
	case f.Target == TargetNone:
		return StateWaiting
	case f.Idle:
		return StateInstalled
	case f.Image == ImageWhole:
		return StateFetched
	case f.SpaceShort:
		return StateBlocked
	case f.Policy != PolicyOff && have:
		return StateFetching
	default:
		return StateWaiting
	}
}
