package lab

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/verify"
	"meshupd/verify/publish"
)

// StoryConfig of a Story.
type StoryConfig struct {
	Devices int   // at least 5
	Size    int64 // bytes of the image
	Rate    int64 // bits per second of each link, both ways
	// Say tells what the story does now; Watch is given each new status of the first device. Either may be nil.
	Say   func(format string, args ...any)
	Watch func(control.SiteStatus)
}

// Outcome of a Story.
type Outcome struct {
	Version string
	Size    int64
	Took    time.Duration // from the import to the last device at rest
	// FirstSent is what the device with the stick sent, as a multiple of the image.
	FirstSent float64
	Rows      []Row
	Checks    []Check
}

// Row says what became of one device.
type Row struct {
	Device string
	Role   string
	State  control.State
	After  time.Duration // from the import until the device came to rest
	From   []string      // where it took the image from, as first seen
	Why    string
}

// Check is one claim about the outcome.
type Check struct {
	Claim  string
	OK     bool
	Detail string
}

// Passed says whether every claim held.
func (o Outcome) Passed() bool {
	for _, c := range o.Checks {
		if !c.OK {
			return false
		}
	}
	return len(o.Checks) > 0
}

// The roles in the story.
const (
	roleStick     = "has the stick"
	rolePlain     = ""
	roleKilled    = "killed half-way"
	roleFull      = "disk too small"
	roleUnhealthy = "fails its health check"
)

// Versions before and after.
const (
	oldVersion = "1.0.0"
	newVersion = "2.0.0"
)

type actor struct {
	*Device
	role   string
	row    Row
	killed bool // in the middle of its fetch, and started again
}

// Story is the main job of meshupd with three things going wrong: a vendor signs
// a release, a technician plugs it in at one device, and the site takes it from
// there, while one device lacks space, one is not healthy with the new version,
// and one is killed half-way and started again. The lab must be empty.
func (l *Lab) Story(ctx context.Context, cfg StoryConfig) (Outcome, error) {
	if cfg.Say == nil {
		cfg.Say = func(string, ...any) {}
	}
	if cfg.Watch == nil {
		cfg.Watch = func(control.SiteStatus) {}
	}
	out := Outcome{Version: newVersion, Size: cfg.Size}
	actors, err := l.cast(cfg)
	if err != nil {
		return out, err
	}
	cfg.Say("Starting %d devices, each its own daemon", len(actors))
	for _, a := range actors {
		if err := a.Start(); err != nil {
			return out, err
		}
	}
	first := actors[0]
	st, err := first.Until(ctx, func(st control.SiteStatus) bool { return st.Site.Heard == len(actors) })
	if err != nil {
		return out, fmt.Errorf("%w: it hears %d of %d devices", err, st.Site.Heard, len(actors))
	}
	cfg.Say("All %d devices have found each other", len(actors))

	bundle, err := l.Vendor.Bundle(ctx, publish.VendorRelease{Version: out.Version, Size: cfg.Size,
		Notes: []string{"The card reader no longer freezes after 30 days"}})
	if err != nil {
		return out, err
	}
	release, err := publish.Verify(ctx, bundle, l.Vendor.Anchor(), nil)
	if err != nil {
		return out, err
	}
	cfg.Say("The vendor has made and signed %s", filepath.Base(bundle))
	began := time.Now()
	if _, err := first.Import(ctx, bundle); err != nil {
		return out, err
	}
	cfg.Say("The technician has plugged it in at %s: the stick can be pulled out", first.Name)
	if err := l.play(ctx, cfg, actors, began); err != nil {
		return out, err
	}
	out.Took = time.Since(began)
	return out, judge(ctx, &out, actors, release.Manifest().Images[0].SHA256)
}

// cast makes the devices of the story.
func (l *Lab) cast(cfg StoryConfig) ([]*actor, error) {
	if cfg.Devices < 5 {
		return nil, fmt.Errorf("the story needs at least 5 devices, not %d", cfg.Devices)
	}
	roles := map[int]string{0: roleStick, cfg.Devices / 3: roleKilled, cfg.Devices / 2: roleFull, cfg.Devices - 2: roleUnhealthy}
	var actors []*actor
	for i := range cfg.Devices {
		dc := DeviceConfig{Name: fmt.Sprintf("kiosk-%02d", i), Up: cfg.Rate, Down: cfg.Rate}
		if i == 0 {
			dc.Name = "gw-01"
		}
		switch roles[i] {
		case roleUnhealthy:
			dc.Health = []string{"sh", "-c", "echo 'pos-app: no answer on port 9100' >&2; exit 1"}
		case roleFull:
			if err := l.tooSmall(&dc, cfg.Size); err != nil {
				return nil, err
			}
		}
		d, err := l.Add(dc)
		if err != nil {
			return nil, err
		}
		actors = append(actors, &actor{Device: d, role: roles[i], row: Row{Device: dc.Name, Role: roles[i]}})
	}
	return actors, nil
}

// tooSmall gives a device less space than the image needs: a small file system
// where mounts are private to the site, else a floor of free space that no disk has.
func (l *Lab) tooSmall(dc *DeviceConfig, size int64) error {
	if !l.Site.Isolated() {
		dc.Reserve = "1000TiB"
		return nil
	}
	dc.StateDir = filepath.Join(l.Dir, "small")
	if err := os.MkdirAll(dc.StateDir, 0o755); err != nil {
		return fmt.Errorf("make the small disk: %w", err)
	}
	if err := unix.Mount("tmpfs", dc.StateDir, "tmpfs", 0, fmt.Sprintf("size=%d", size*3/4)); err != nil {
		return fmt.Errorf("mount the small disk: %w", err)
	}
	return nil
}

// play follows the site until every device is at rest.
func (l *Lab) play(ctx context.Context, cfg StoryConfig, actors []*actor, began time.Time) error {
	killed := make(chan error, 1)
	go func() { killed <- l.accident(ctx, cfg, actors) }()
	_, err := actors[0].Until(ctx, func(st control.SiteStatus) bool {
		cfg.Watch(st)
		byName := map[string]control.DeviceStatus{}
		for _, d := range st.Devices {
			byName[d.Name] = d
		}
		rest := 0
		for _, a := range actors {
			d := byName[a.Name]
			if len(a.row.From) == 0 {
				a.row.From = d.From
			}
			a.row.State = d.State
			if !atRest(d, a.role) {
				a.row.After = 0
				continue
			}
			rest++
			if a.row.After == 0 {
				a.row.After = time.Since(began)
			}
			if d.Reason != nil {
				a.row.Why = string(d.Reason.Code)
				if d.Reason.Detail != "" {
					a.row.Why += ": " + d.Reason.Detail
				}
			}
		}
		return rest == len(actors)
	})
	return errors.Join(err, <-killed)
}

// accident kills one device in the middle of its fetch and starts it again.
func (l *Lab) accident(ctx context.Context, cfg StoryConfig, actors []*actor) error {
	for _, a := range actors {
		if a.role != roleKilled {
			continue
		}
		st, err := a.Until(ctx, func(st control.SiteStatus) bool {
			d := Self(st)
			return d.State == control.StateFetching && d.Done != nil && *d.Done > cfg.Size/4 || d.State == control.StateConfirmed && d.Version == newVersion
		})
		if err != nil {
			return fmt.Errorf("wait for %s to be half-way: %w", a.Name, err)
		}
		if Self(st).State == control.StateConfirmed {
			cfg.Say("%s had the release before it could be killed: a larger image or slower links would show it", a.Name)
			return nil
		}
		a.killed = true
		if err := a.Kill(); err != nil {
			return err
		}
		cfg.Say("%s was killed in the middle of the transfer; it is started again", a.Name)
		return a.Start()
	}
	return nil
}

// atRest says whether a device is where its role ends.
func atRest(d control.DeviceStatus, role string) bool {
	switch role {
	case roleFull:
		return d.State == control.StateBlocked
	case roleUnhealthy:
		return d.State == control.StateRolledBack
	default:
		return d.State == control.StateConfirmed && d.Version == newVersion
	}
}

// judge checks what a technician would want to believe, on the devices' own disks where that is possible.
func judge(ctx context.Context, out *Outcome, actors []*actor, want verify.Digest) error {
	claim := func(ok bool, claim, detail string, args ...any) {
		out.Checks = append(out.Checks, Check{Claim: claim, OK: ok, Detail: fmt.Sprintf(detail, args...)})
	}
	good, same := 0, 0
	for _, a := range actors {
		out.Rows = append(out.Rows, a.row)
		if a.role == roleFull || a.role == roleUnhealthy {
			continue
		}
		if a.row.State == control.StateConfirmed {
			good++
		}
		if got, err := a.runningImage(); err == nil && got == want {
			same++
		}
	}
	healthy := len(actors) - 2
	claim(good == healthy, "every device that can is confirmed", "%d of %d", good, healthy)
	claim(same == healthy, "and runs exactly the signed image", "SHA-256 of the slot equal on %d of %d", same, healthy)
	st, err := actors[0].API.Status(ctx, 0)
	if err != nil {
		return err
	}
	for _, a := range actors {
		self, err := a.API.Status(ctx, 0)
		if err != nil {
			return fmt.Errorf("ask %s: %w", a.Name, err)
		}
		d := Self(self)
		switch a.role {
		case roleFull:
			claim(d.Reason != nil && d.Reason.Code == verify.CodeSpace && d.Reason.NeedBytes > 0 && d.Version == oldVersion,
				a.Name+" says how much space it lacks, and still runs "+oldVersion, "%s", reasonOf(d))
		case roleUnhealthy:
			claim(d.Version == oldVersion && d.Reason != nil && d.Reason.Code == verify.CodeHealth,
				a.Name+" went back to "+oldVersion+" by itself and says why", "%s", reasonOf(d))
		case roleKilled:
			claim(a.killed && d.State == control.StateConfirmed, a.Name+" was killed in the middle of its fetch and went on", "%s", d.State)
		}
	}
	claim(len(st.Devices) == len(actors), "one device's status shows the whole site", "%d of %d devices", len(st.Devices), len(actors))
	out.FirstSent = float64(sentBy(actors[0].Name, st)) / float64(out.Size)
	claim(out.FirstSent > 0 && out.FirstSent < 1.5, "the device with the stick sent the image about once",
		"%.2f x the image, for %d devices that took it", out.FirstSent, len(actors)-2)
	return nil
}

// reasonOf is a reason in a few words.
func reasonOf(d control.DeviceStatus) string {
	switch {
	case d.Reason == nil:
		return "no reason given"
	case d.Reason.NeedBytes > 0:
		return fmt.Sprintf("%s, %d bytes short", d.Reason.Code, d.Reason.NeedBytes)
	default:
		return string(d.Reason.Code)
	}
}

func sentBy(name string, st control.SiteStatus) int64 {
	for _, d := range st.Devices {
		if d.Name == name && d.Sent != nil {
			return *d.Sent
		}
	}
	return 0
}

// runningImage hashes what the device's current slot holds.
func (d *Device) runningImage() (verify.Digest, error) {
	f, err := os.Open(filepath.Join(d.Dir, "slots", "current", ImageName))
	if err != nil {
		return verify.Digest{}, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return verify.Digest{}, err
	}
	return verify.Digest(h.Sum(nil)), nil
}
