package install

import (
	"context"
	"io"
	"time"

	"meshupd/verify"
)

// Executable is an installer that the integrator writes: the verbs of Custom for the boot state, and two more.
//
//	write SLOT     writes the image to SLOT, which cannot be booted until then and is not armed by it. The image is on standard
//	               input, and MESHUPD_IMAGE is a path of it. Exit 0: it is written and synced. Lines with "N%" are progress.
//	check SLOT     reads SLOT back, past the caches where it can. Exit 0: it holds the image of MESHUPD_SHA256 and MESHUPD_SIZE.
//
// Both see MESHUPD_SLOT, MESHUPD_VERSION, MESHUPD_NAME (of the image), MESHUPD_SIZE and MESHUPD_SHA256.
type Executable struct {
	Custom
	// WriteTimeout of write and of check; an hour when zero.
	WriteTimeout time.Duration
}

func (e Executable) attach(_ context.Context, env delegateEnv) (delegated, error) {
	m, err := e.Custom.open(env.loaderEnv)
	if err != nil {
		return delegated{}, err
	}
	return delegated{courier: &executable{e, env.step, parcel{}}, medium: m}, nil
}

type executable struct {
	Executable
	step func(name string, do func() error) error
	last parcel // the one that is being installed; for check
}

func (e *executable) run(ctx context.Context, verb string, slot SlotName, p parcel, in io.Reader, out io.Writer) error {
	return command{
		argv: append(append([]string(nil), e.Command...), verb, string(slot)), env: p.env(slot), stdin: in, stdout: out,
		timeout: orElse(e.WriteTimeout, installTimeout),
	}.run(ctx)
}

func (e *executable) deliver(ctx context.Context, slot SlotName, p parcel, tell func(int)) error {
	e.last = p
	err := e.step("image.commit", func() error { return e.run(ctx, "write", slot, p, p.file, &percents{tell: tell}) })
	return installerError(ctx, "run "+e.Command[0]+" write", err)
}

func (e *executable) check(ctx context.Context, slot SlotName, img verify.Image) error {
	p := e.last
	p.img, p.path = img, "" // its file is gone
	return coded(verify.CodeSlot, "slot "+string(slot)+" does not hold what was handed over", e.run(ctx, "check", slot, p, nil, nil))
}
