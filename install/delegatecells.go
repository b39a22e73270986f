package install

import (
	"context"
	"fmt"
	"io"
	"os"

	"meshupd/verify"
)

// parcel is a verified image on its way to an installer.
type parcel struct {
	content Content // what the slot holds when all is done
	img     verify.Image
	file    *os.File
	// path opens the file without a name: /proc/PID/fd/N. Nobody can put another file in its place between the check and the installation.
	path string
}

// env tells a program about the parcel.
func (p parcel) env(slot SlotName) []string {
	return append(slotEnv(slot, p.content.Version), "MESHUPD_IMAGE="+p.path, "MESHUPD_NAME="+p.img.Name,
		"MESHUPD_SHA256="+p.img.Content.SHA256.String(), fmt.Sprintf("MESHUPD_SIZE=%d", p.img.Content.Size))
}

// job is what a Write knows and cells are not told.
type job struct {
	content Content
	tell    func(percent int)
}

// delegateCells are slots that only the installer touches.
type delegateCells struct {
	courier courier
	spool   string // a folder that only root can enter
	step    func(name string, do func() error) error
	disarm  func(context.Context) error
	job     job // of the Write under way; Delegate.one owns it
}

var _ cells = (*delegateCells)(nil)

func (d *delegateCells) fits(images []verify.Image) error {
	if len(images) != 1 {
		return verify.Refuse(verify.CodeFormat, "write a slot: %d images for an installer that takes one", len(images))
	}
	return nil
}

func (d *delegateCells) room(SlotName) (free, held int64, err error) {
	if free, err = freeBytes(d.spool); err != nil {
		return 0, 0, verify.Refuse(verify.CodeSlot, "look for free space: %w", err)
	}
	return free, 0, nil
}

// clear leaves the slot as it is: it is the installer's.
func (d *delegateCells) clear(context.Context, SlotName, []verify.Image) error { return nil }

func (d *delegateCells) put(ctx context.Context, slot SlotName, img verify.Image, fill func(io.Writer) error) error {
	what := "check image " + img.Name + " for the installer"
	file, err := spoolFile(d.spool)
	if err != nil {
		return mediumError(err, what, img.Content.Size)
	}
	defer file.Close()
	if err := d.step("image.fill", func() error { return fill(file) }); err != nil {
		return mediumError(err, what, img.Content.Size)
	}
	// From here on nobody can write it any more, this process neither: RAUC insists on that, with a lease.
	sealed, err := os.Open(fdPath(file))
	if err != nil {
		return mediumError(err, what, 0)
	}
	defer sealed.Close()
	if err := file.Close(); err != nil {
		return mediumError(err, what, img.Content.Size)
	}
	p := parcel{content: d.job.content, img: img, file: sealed, path: fdPath(sealed)}
	if err := d.courier.deliver(ctx, slot, p, d.job.tell); err != nil {
		return mediumError(err, "install image "+img.Name+" to slot "+string(slot), 0)
	}
	return d.disarm(ctx)
}

func (d *delegateCells) check(ctx context.Context, slot SlotName, img verify.Image, _ func()) error {
	err := d.step("image.open", func() error { return d.courier.check(ctx, slot, img) })
	if err != nil {
		return mediumError(err, "look at what slot "+string(slot)+" holds", 0)
	}
	d.job.tell(100)
	return nil
}

func fdPath(file *os.File) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), file.Fd()) }

// spoolFile makes a file without a name: nothing is left of it when this process ends, however it ends.
func spoolFile(dir string) (*os.File, error) {
	file, err := os.CreateTemp(dir, "image-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(file.Name()); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}
