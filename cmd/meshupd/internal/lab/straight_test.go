package lab_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/lab"
	"meshupd/verify/publish"
)

// straightBoot is a bootloader and the machine around it. It keeps default, trial, left and booted as files. Whenever a slot is
// armed it looks whether all of it is what was signed. With a file rot, some bytes rot in slot b once it was found whole. restart ends the daemon as the end of the machine does.
const straightBoot = `#!/bin/sh
set -e
cd "$(dirname "$0")"
put() { echo "$2" > "$1.new"; sync "$1.new"; mv "$1.new" "$1"; }
case "$1" in
get-state)
	if [ -e rot ] && grep -q "image is whole" "$(cat rot)"; then
		rm rot; printf '????' | dd of=b bs=1 seek=70000 conv=notrunc 2>/dev/null
	fi
	if [ -s trial ]; then printf '{"default":"%s","trial":"%s","left":%s,"booted":"%s"}\n' "$(cat default)" "$(cat trial)" "$(cat left)" "$(cat booted)"
	else printf '{"default":"%s","booted":"%s"}\n' "$(cat default)" "$(cat booted)"; fi ;;
try)
	head -c "$(cat size)" "$2" | sha256sum | grep -q "$(cat digest)" || echo "armed $2 with other bytes" >> violations
	put left "$3"; put trial "$2" ;;
confirm) put default "$2"; put trial "" ;;
fallback) put trial "" ;;
restart)
	if [ -s trial ] && [ "$(cat left)" -gt 0 ]; then put booted "$(cat trial)"; put left $(($(cat left) - 1))
	else put booted "$(cat default)"; put trial ""; fi
	kill -9 "$PPID" ;;
esac
`

const straightSize = 24 << 20

// straight is a device whose slots are files, and that takes images straight to them.
type straight struct {
	*lab.Device
	t    *testing.T
	boot string
}

func addStraight(t *testing.T, l *lab.Lab, name string, down int64, image, idle []byte) *straight {
	t.Helper()
	boot := filepath.Join(l.Dir, name+"-boot")
	script := filepath.Join(boot, "loader")
	if err := os.MkdirAll(boot, 0o755); err != nil {
		t.Fatal(err)
	}
	slot := append(bytes.Clone(idle), make([]byte, straightSize+1<<20-len(idle))...)
	for file, content := range map[string][]byte{
		"loader": []byte(straightBoot), "default": []byte("a\n"), "booted": []byte("a\n"), "trial": nil, "left": []byte("0\n"),
		"size": fmt.Append(nil, len(image)), "digest": fmt.Appendf(nil, "%x", sha256.Sum256(image)),
		"a": slot, "b": slot,
	} {
		if err := os.WriteFile(filepath.Join(boot, file), content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	d := add(t, l, lab.DeviceConfig{Name: name, Down: down, Store: []string{"straight = true"}, Slots: []string{
		`kind = "block"`, fmt.Sprintf("a = %q\nb = %q", filepath.Join(boot, "a"), filepath.Join(boot, "b")),
		`bootloader = "custom"`, fmt.Sprintf("boot.command = [%q]\nrestart = [%q, %q]", script, script, "restart"),
	}})
	return &straight{d, t, boot}
}

func (d *straight) start() {
	d.t.Helper()
	if err := d.Start(); err != nil {
		d.t.Fatal(err)
	}
}

// reboot waits for the end that the restart command brings, and starts again.
func (d *straight) reboot(ctx context.Context) {
	d.t.Helper()
	if err := d.Wait(ctx); err != nil {
		d.t.Fatalf("%s does not restart: %v", d.Name, err)
	}
	d.start()
}

func (d *straight) confirmed(ctx context.Context, version string) {
	d.t.Helper()
	if _, err := d.Until(ctx, func(st control.SiteStatus) bool {
		self := lab.Self(st)
		return self.Version == version && self.State == control.StateConfirmed
	}); err != nil {
		d.t.Fatal(err)
	}
}

// done waits until so many bytes of the image are verified.
func (d *straight) done(ctx context.Context, n int64) int64 {
	d.t.Helper()
	st, err := d.Until(ctx, func(st control.SiteStatus) bool { done := lab.Self(st).Done; return done != nil && *done >= n })
	if err != nil {
		d.t.Fatal(err)
	}
	return *lab.Self(st).Done
}

// check looks at what a device was left with.
func (d *straight) check(image []byte) {
	d.t.Helper()
	slot, err := os.ReadFile(filepath.Join(d.boot, "b"))
	if err != nil || !bytes.Equal(slot[:len(image)], image) {
		d.t.Errorf("%s: slot b does not hold the image (%v)", d.Name, err)
	}
	if said, err := os.ReadFile(filepath.Join(d.boot, "violations")); err == nil {
		d.t.Errorf("%s: %s", d.Name, said)
	}
	if n := d.stored(); n > 256<<10 {
		d.t.Errorf("%s: the store has %d bytes", d.Name, n)
	}
}

// stored is what the store occupies.
func (d *straight) stored() (n int64) {
	_ = filepath.WalkDir(filepath.Join(d.Dir, "state", "store"), func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if info, err := e.Info(); err == nil {
				n += info.Size()
			}
		}
		return nil
	})
	return n
}

// One stick and a site whose slots take the pieces as they come: no device keeps a second copy; one is killed half-way; in
// one some bytes rot in the slot between the last piece and the trial; one has most of the image in its slot from an older one; and one comes when
// all others already run from the slot that they serve it from.
func TestStraightToTheSlot(t *testing.T) {
	l := newLab(t)
	ctx := within(t, 3*time.Minute)
	image := make([]byte, straightSize)
	r := rand.NewChaCha8([32]byte{4})
	r.Read(image)
	near := bytes.Clone(image)
	for at := 0; at < len(near); at += 20 * 64 << 10 {
		near[at] ^= 1
	}
	older := []byte("older")
	stick := addStraight(t, l, "stick", 0, image, older)
	killed := addStraight(t, l, "killed", 16e6, image, older)
	rotten := addStraight(t, l, "rotten", 40e6, image, older)
	close := addStraight(t, l, "close", 0, image, near)
	late := addStraight(t, l, "late", 0, image, older)
	first := []*straight{stick, killed, rotten, close}
	if err := os.WriteFile(filepath.Join(rotten.boot, "rot"), []byte(filepath.Join(rotten.Dir, "daemon.log")), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, d := range first {
		d.start()
	}
	path := filepath.Join(l.Dir, "image")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	bundle := bundleOf(t, ctx, l.Vendor, publish.VendorRelease{Version: "2.0.0", Images: []publish.VendorImage{{Name: lab.ImageName, Path: path, PieceLength: 64 << 10}}})
	for _, d := range first {
		d.Until(ctx, func(st control.SiteStatus) bool { return st.Site.Heard >= len(first) })
	}
	if _, err := stick.Import(ctx, bundle); err != nil {
		t.Fatal(err)
	}

	// Those who restart come back at once: the others need them.
	for _, d := range []*straight{stick, close} {
		d.reboot(ctx)
		d.confirmed(ctx, "2.0.0")
	}
	had := killed.done(ctx, straightSize/3)
	if err := killed.Kill(); err != nil {
		t.Fatal(err)
	}
	killed.start()
	if again := killed.done(ctx, 1); again < had/2 {
		t.Errorf("of %d bytes only %d were found again", had, again)
	}
	for _, d := range []*straight{rotten, killed} {
		d.reboot(ctx)
		d.confirmed(ctx, "2.0.0")
	}
	for _, d := range first {
		d.check(image)
	}
	if log := rotten.Log(); !strings.Contains(log, "does not hold what came") || !strings.Contains(log, "E-SLOT") {
		t.Error("a rotten byte was not found by the read-back")
	}
	if log := close.Log(); !strings.Contains(log, "pieces are in the slot already") {
		t.Error("what the older image has in common was not found")
	}
	if h, err := close.API.History(ctx, "close", 10); err != nil || !slices.ContainsFunc(h.Events, func(e control.Event) bool {
		return e.Result == "written" && e.Why == "wrote 80 KiB, 24 MiB were there"
	}) {
		t.Errorf("the history does not say what was written: %+v, %v", h, err)
	}
	late.start()
	late.reboot(ctx)
	late.confirmed(ctx, "2.0.0")
	late.check(image)
	for _, d := range append(first, late) {
		for line := range strings.Lines(d.Log()) {
			if strings.Contains(line, "wrote a slot") || strings.Contains(line, "in the slot already") {
				t.Logf("%s: %s", d.Name, strings.TrimSpace(line))
			}
		}
	}
}
