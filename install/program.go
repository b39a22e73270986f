package install

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"strings"
	"time"

	"meshupd/verify"
)

// Program is an installer that is run once for each image and ends: swupdate, mender install. The slot of the next start is
// chosen by a bootloader of this package, so the image must not bring boot settings of its own; those that it makes are taken back.
type Program struct {
	// Command is run without a shell. {file} in an argument stands for the image and {slot} for the slot's name.
	Command []string
	// Names are what {slot} stands for; "a" and "b" when empty.
	Names Names
	// Commit is run before a trial is confirmed and Rollback after it was given up, and before an installation, in case an
	// earlier one was left open. Exit 2 means that there was nothing to do, as with mender. Nil: nothing is run.
	Commit, Rollback []string
	// Blame marks the line of standard error that says why; empty: the last line does.
	Blame string
	// Progress is the name of swupdate's progress socket in the folder for temporary files; empty: lines with "N%" on standard
	// output are the progress.
	Progress string
	// Timeout of one installation; an hour when zero.
	Timeout time.Duration
}

// Mender is the Program mender in its standalone mode.
func Mender() Program {
	return Program{Command: []string{"mender", "install", "{file}"}, Commit: []string{"mender", "commit"}, Rollback: []string{"mender", "rollback"}}
}

func (p Program) attach(_ context.Context, env delegateEnv) (delegated, error) {
	p.Names = p.Names.or("a", "b")
	p.Timeout = orElse(p.Timeout, installTimeout)
	switch {
	case len(p.Command) == 0 || p.Command[0] == "":
		return delegated{}, verify.Refuse(verify.CodeConfig, "the command of the installer is empty")
	case !strings.Contains(strings.Join(p.Command[1:], "\x00"), "{file}"):
		return delegated{}, verify.Refuse(verify.CodeConfig, "no argument of the installer's command has {file} in it")
	}
	run := &program{p, env.step}
	return delegated{courier: run, around: func(b Bootloader) Bootloader { return &programBoot{b, run} }}, nil
}

type program struct {
	Program
	step func(name string, do func() error) error
}

func (p *program) deliver(ctx context.Context, slot SlotName, parcel parcel, tell func(int)) error {
	if err := p.settle(ctx, p.Rollback, "roll back"); err != nil {
		return err
	}
	fill := strings.NewReplacer("{file}", parcel.path, "{slot}", p.Names.of(slot))
	c := command{env: parcel.env(slot), timeout: p.Timeout, blame: p.Blame}
	for _, arg := range p.Command {
		c.argv = append(c.argv, fill.Replace(arg))
	}
	err := p.step("image.commit", func() error { return p.follow(ctx, c, tell) })
	if err != nil && ctx.Err() == nil && p.Blame != "" && !strings.Contains(err.Error(), p.Blame) {
		// swupdate 2022.12 sometimes ends while it starts, without a word on the image: that is no verdict.
		return coded(verify.CodeSlot, p.Command[0]+" ended without a reason", err)
	}
	return installerError(ctx, p.Command[0], err)
}

// follow runs the installation and tells of its progress.
func (p *program) follow(ctx context.Context, c command, tell func(int)) error {
	if p.Progress == "" {
		c.stdout = &percents{tell: tell}
		return c.run(ctx)
	}
	watching, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		watchSWUpdate(watching, p.Progress, tell)
	}()
	defer func() {
		stop()
		<-done
	}()
	return c.run(ctx)
}

// check has nothing to ask: these programs keep no record of what a slot holds. They compare the digests that their own format carries.
func (p *program) check(context.Context, SlotName, verify.Image) error { return nil }

const (
	settleTimeout = 2 * time.Minute
	exitNothing   = 2
)

// settle runs Commit or Rollback.
func (p *program) settle(ctx context.Context, argv []string, what string) error {
	if argv == nil {
		return nil
	}
	err := command{argv: argv, timeout: settleTimeout}.run(ctx)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == exitNothing {
		return nil
	}
	return coded(verify.CodeBoot, what+" with "+argv[0], err)
}

// programBoot tells the installer how a trial ended.
type programBoot struct {
	Bootloader
	run *program
}

// Confirm tells the installer first: should it fail, the slot stays on trial and is confirmed again.
func (b *programBoot) Confirm(ctx context.Context) error {
	st, err := b.Boot(ctx)
	if err != nil {
		return err
	}
	if st.Phase == PhaseTrial {
		if err := b.run.settle(ctx, b.run.Commit, "commit"); err != nil {
			return err
		}
	}
	return b.Bootloader.Confirm(ctx)
}

// Fallback tells the installer last: whatever it answers, the old slot is started next.
func (b *programBoot) Fallback(ctx context.Context) error {
	if err := b.Bootloader.Fallback(ctx); err != nil {
		return err
	}
	return b.run.settle(ctx, b.run.Rollback, "roll back")
}

// percents reads the last "N%" of each piece of output. It keeps a few bytes, however much a program prints.
type percents struct {
	tell func(percent int)
	rest []byte
}

const maxPercentText = 64

func (p *percents) Write(data []byte) (int, error) {
	p.rest = append(p.rest, data[max(0, len(data)-maxPercentText):]...)
	if n, ok := lastPercent(p.rest); ok {
		p.tell(n)
	}
	p.rest = append(p.rest[:0], p.rest[max(0, len(p.rest)-4):]...) // "100%" may come in two pieces
	return len(data), nil
}

// lastPercent finds the last number of 0 to 100 that stands before a percent sign.
func lastPercent(text []byte) (int, bool) {
	for end := bytes.LastIndexByte(text, '%'); end >= 0; end = bytes.LastIndexByte(text[:end], '%') {
		n, scale := 0, 1
		i := end - 1
		for ; i >= 0 && scale <= 100 && '0' <= text[i] && text[i] <= '9'; i-- {
			n += scale * int(text[i]-'0')
			scale *= 10
		}
		if scale > 1 && n <= 100 && (i < 0 || text[i] != '.' && (text[i] < '0' || text[i] > '9')) {
			return n, true
		}
	}
	return 0, false
}
