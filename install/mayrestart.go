package install

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"meshupd/verify"
)

// MayRestart asks a program of the integrator whether the version that waits may be started now. It decides when, and does
// nothing itself.
type MayRestart struct {
	// Command and its arguments, run without a shell, with MESHUPD_VERSION and MESHUPD_SLOT set to what would be started.
	Command []string
	// Timeout ends it, with its process group.
	Timeout time.Duration
}

// notYet is the exit code by which the program says that it is not the time; EX_TEMPFAIL of sysexits.h.
const notYet = 75

// Ask returns nil when the program exited with 0. E-HELD is that it said "not yet" (75), with the last line of its standard
// error as the reason. Anything else is E-HELD too, with what went wrong: a program that is broken must not let a device
// restart in the middle of its work.
func (m MayRestart) Ask(ctx context.Context, slot SlotName, version string) error {
	var said tail
	err := command{argv: m.Command, env: slotEnv(slot, version), timeout: m.Timeout, stderr: &said}.run(ctx)
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.As(err, &exit) && exit.ExitCode() == notYet:
		if line := said.lastLine(); line != "" {
			return verify.Refuse(verify.CodeHeld, "%s", line)
		}
		return verify.Refuse(verify.CodeHeld, "not yet")
	}
	return verify.Refuse(verify.CodeHeld, "%w", fmt.Errorf("%s does not say: %w", printable(m.Command[0], maxReason), err))
}
