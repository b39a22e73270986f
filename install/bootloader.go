package install

import "context"

// BootState is what a bootloader keeps across a power cut.
type BootState struct {
	Phase   Phase
	Booted  SlotName // of the last start; on trial always Trial
	Default SlotName // booted when there is no trial
	Trial   SlotName // set when armed or on trial
	Left    int      // starts of Trial that are left
	Failed  SlotName // of the last trial that fell back, until it is taken note of
	Why     string   // what is known of that, when the slot did not live to say it itself; at most 280 characters
}

// Bootloader chooses the slot of the next start. It knows nothing of what the
// slots hold: whoever calls Try has checked that. Every change is durable when
// the method returns nil, and a fault leaves the old state or the new one.
// Errors are E-BOOT, or E-BUSY where the phase does not allow the step.
type Bootloader interface {
	// Boot observes the boot state.
	Boot(ctx context.Context) (BootState, error)

	// Try arms slot for at most starts starts (at least one). Trying the booted or the default slot disarms an armed trial and
	// arms nothing. It refuses with E-BUSY on trial. Arming clears Failed.
	Try(ctx context.Context, slot SlotName, starts int) error

	// Confirm says that the slot that runs is good. On trial the slot becomes the default; when settled it only takes note of
	// Failed, which is then cleared. It refuses with E-BOOT when armed, and on trial while the start of the trial has not completed.
	Confirm(ctx context.Context) error

	// Fallback gives an armed or running trial up and sets Failed: the next start boots Default, and Booted stays what it is
	// until then. It refuses with E-BOOT when settled.
	Fallback(ctx context.Context) error
}

// starter is what a device without a bootloader of its own does in the place of a power-on.
type starter interface {
	// restart starts the slot whose turn it is.
	restart(ctx context.Context) error
	// start is called once when the daemon starts, and does what a power-on has left to do.
	start(ctx context.Context) error
}
