package install

import (
	"context"
	"errors"
	"fmt"
	"time"

	"meshupd/verify"
)

// unit is the systemd unit that runs the application of Files.
type unit struct {
	name    string
	timeout time.Duration // of a restart
	settle  time.Duration
}

const (
	// unitQuery bounds one question to systemd.
	unitQuery = 10 * time.Second
	// unitMute is for how long systemd may fail to answer before a trial is given up: no answer says nothing about the unit.
	unitMute = 30 * time.Second
)

// restart starts the unit from where the pointer leads now. It is not try-restart: a version that has crashed is the one
// that most needs the next. Its crashes may have used up the unit's start limit, which would keep the other version from
// being started too, so the count is forgotten first.
func (u *unit) restart(ctx context.Context) error {
	// It fails for a unit that systemd has not loaded yet; the restart loads it, or says what is wrong.
	_ = command{argv: []string{"systemctl", "reset-failed", "--", u.name}, timeout: unitQuery}.run(ctx)
	return systemctl(u.timeout)(ctx, "restart", u.name)
}

// Check proves the slot that runs healthy: check has to pass, and the unit, if there is one, to stay up meanwhile and for
// Settle at least. Its end is an E-HEALTH at once, also when its Restart= started it again.
func (f *Files) Check(ctx context.Context, _ SlotName, check func(context.Context) error) error {
	if f.unit == nil {
		return check(ctx)
	}
	return f.unit.stays(ctx, check)
}

func (u *unit) stays(ctx context.Context, check func(context.Context) error) error {
	first, heard := "", time.Now()
	return checkWatched(ctx, u.settle, check, func(ctx context.Context) (sure bool, err error) {
		run, err := u.look(ctx)
		switch {
		case verify.CodeOf(err) == verify.CodeHealth:
			return false, err
		case err == nil && first != "" && run != first:
			return false, u.ended(ctx, "ended and was started again", first)
		case err == nil:
			first, heard = run, time.Now()
			return true, nil
		case time.Since(heard) > unitMute:
			return false, verify.Refuse(verify.CodeHealth, "unit %s: %w", u.name, err)
		default:
			return false, nil
		}
	})
}

// look returns the id of the unit's present run, an E-HEALTH when it is not active, and an error without a code when systemd
// does not say.
func (u *unit) look(ctx context.Context) (run string, err error) {
	var state tail
	err = command{argv: []string{"systemctl", "is-active", "--", u.name}, timeout: unitQuery, stdout: &state}.run(ctx)
	if said := state.lastLine(); err != nil && said != "" && ctx.Err() == nil {
		run, _ := u.run(ctx)
		return "", u.ended(ctx, "is "+said, run)
	}
	if err != nil {
		return "", err
	}
	return u.run(ctx)
}

// run tells the invocation id of the last run (systemd.exec(5), INVOCATION_ID).
func (u *unit) run(ctx context.Context) (string, error) {
	var id tail
	err := command{argv: []string{"systemctl", "show", "--property=InvocationID", "--value", "--", u.name}, timeout: unitQuery, stdout: &id}.run(ctx)
	if err != nil {
		return "", err
	}
	if run := id.lastLine(); run != "" {
		return run, nil
	}
	return "", errors.New("systemd does not tell its invocation id")
}

// ended is the reason, with the last line of that run in the journal where it can be read.
func (u *unit) ended(ctx context.Context, what, run string) error {
	var said tail
	if run != "" {
		_ = command{argv: []string{"journalctl", "--quiet", "--lines=1", "--output=cat", "_SYSTEMD_INVOCATION_ID=" + run},
			timeout: unitQuery, stdout: &said}.run(ctx)
	}
	text := fmt.Sprintf("unit %s %s", u.name, what)
	if line := said.lastLine(); line != "" {
		text += ": " + line
	}
	return verify.Refuse(verify.CodeHealth, "%s", text)
}
