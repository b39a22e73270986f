// Package fleet runs a whole site of devices in one process: every device is a
// peer.Node with its own folders, real keys, real releases and the real swarm,
// on a simnet.LAN. Only the cables are simulated, and multicast DNS, which needs
// real sockets (see finder.go).
//
// A Scenario says what happens to the site, and Run plays it and tells what
// became of each device. It knows nothing of the testing package: in a
// testing/synctest bubble hours of a site pass within seconds, outside of one the
// same scenario takes its time. CPU and disk work take no fake time. When Run
// returns, every goroutine it started has ended, those of libp2p, pubsub and the
// torrent engine among them: a bubble may end right there, with no time to pass
// first. None of these libraries starts a goroutine for the whole process on the
// way, so bubbles may follow each other.
//
// A scenario does not repeat to the byte: identities are drawn anew for each
// run, and goroutines run in any order. Only the images come from the seed.
package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"meshupd/peer"
	"meshupd/simnet"
	"meshupd/swarm"
	"meshupd/verify"
	"meshupd/verify/publish"
)

// Scenario is a site and what happens to it.
type Scenario struct {
	Devices  int
	Late     []int // devices that are not there yet; Start brings them
	Image    int64 // bytes of the image of each release
	Releases int   // made and signed before the site starts, numbered from 0; 1 when zero
	Up, Down int64 // bytes per second of each device's link; 0: no limit
	Latency  time.Duration
	Seed     uint64 // of the images

	Events []Event
	// Limit is how long the events may take together; 1 h when zero.
	Limit time.Duration

	Log *slog.Logger // nil: nothing; each device adds its name
}

// Event is one thing that happens. Events happen in the order of the list, each
// when its time has come and its condition holds, and not before the one above
// it was done.
type Event struct {
	At   time.Duration // since the start of the site
	Wait time.Duration // since the event above; it counts beside At
	When Condition     // zero: at once
	Do   Action        // zero: nothing; the event only waits
}

// Fleet is a running site, as conditions and actions see it.
type Fleet struct {
	scenario Scenario
	lan      *simnet.LAN
	vendor   *publish.Vendor
	bundles  []string // .update files, by number of the release
	releases []Release
	devices  []*device
	begun    time.Time
	// stirred holds an entry when something changed that a condition may look at.
	stirred chan struct{}
	// broken takes the first thing that ends the scenario from below.
	broken chan error
}

// product of all simulated devices.
const product = "fleet"

// factory is the version that each device starts with.
const factory = "1.0.0"

// versionOf a release of a scenario.
func versionOf(release int) string { return fmt.Sprintf("%d.0.0", release+2) }

// Run plays a scenario in dir, which must be empty, and tells what became of the
// site. When an event cannot be done or the limit passes, it returns the result
// so far and an error.
func Run(ctx context.Context, dir string, s Scenario) (Result, error) {
	f, err := newFleet(ctx, dir, s)
	if err != nil {
		return Result{}, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	at, err := f.play(ctx)
	// All that needs running devices is looked at before they end.
	result := f.result(at)
	cancel()
	err = errors.Join(err, f.end())
	f.addRemains(&result)
	if closeErr := f.lan.Close(); closeErr != nil {
		err = errors.Join(err, closeErr)
	}
	return result, err
}

func newFleet(ctx context.Context, dir string, s Scenario) (*Fleet, error) {
	if s.Devices < 1 || s.Devices > 60000 || s.Image < 1 {
		return nil, fmt.Errorf("a scenario of %d devices and an image of %d bytes", s.Devices, s.Image)
	}
	if s.Limit == 0 {
		s.Limit = time.Hour
	}
	if s.Latency == 0 {
		s.Latency = 200 * time.Microsecond // a switched LAN
	}
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	f := &Fleet{
		scenario: s, lan: simnet.NewLAN(simnet.LANConfig{Latency: s.Latency}), begun: time.Now(),
		stirred: make(chan struct{}, 1), broken: make(chan error, 1),
	}
	if err := f.publish(ctx, filepath.Join(dir, "vendor")); err != nil {
		return nil, fmt.Errorf("make the releases of a scenario: %w", err)
	}
	for i := range s.Devices {
		n := i + 1
		addr := netip.AddrFrom4([4]byte{10, 77, byte(n >> 8), byte(n)})
		f.devices = append(f.devices, newDevice(f, i, filepath.Join(dir, nameOf(i)), f.lan.Host(addr, s.Up, s.Down)))
	}
	return f, nil
}

// publish makes and signs the releases.
func (f *Fleet) publish(ctx context.Context, dir string) (err error) {
	if f.vendor, err = publish.NewVendor(dir, product); err != nil {
		return err
	}
	for i := range max(f.scenario.Releases, 1) {
		path, err := f.vendor.Bundle(ctx, publish.VendorRelease{Version: versionOf(i), Size: f.scenario.Image, Seed: f.scenario.Seed<<8 + uint64(i) + 1})
		if err != nil {
			return err
		}
		rel, err := publish.Verify(ctx, path, f.vendor.Anchor(), nil)
		if err != nil {
			return err
		}
		f.bundles = append(f.bundles, path)
		f.releases = append(f.releases, Release{ID: rel.ID(), Version: versionOf(i), Image: rel.Manifest().Images[0]})
	}
	return nil
}

// play starts the site and does the events. It returns when each was done.
func (f *Fleet) play(ctx context.Context) (at []time.Duration, err error) {
	late := map[int]bool{}
	for _, i := range f.scenario.Late {
		late[i] = true
	}
	f.begun = time.Now()
	for i := range f.devices {
		if late[i] {
			continue
		}
		if err := Start(i).do(ctx, f); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, f.scenario.Limit)
	defer cancel()
	last := f.begun
	for n, e := range f.scenario.Events {
		due := last.Add(e.Wait)
		if t := f.begun.Add(e.At); t.After(due) {
			due = t
		}
		if err := f.await(ctx, due, e.When); err != nil {
			return at, fmt.Errorf("event %d waits for %q: %w; %s", n, e.When.name, err, f)
		}
		if e.Do.do != nil {
			if err := e.Do.do(ctx, f); err != nil {
				return at, fmt.Errorf("event %d, %s: %w", n, e.Do.name, err)
			}
		}
		last = time.Now()
		at = append(at, last.Sub(f.begun))
	}
	return at, nil
}

// lookAgain bounds how late a condition that depends on time alone is seen to hold.
const lookAgain = time.Second

// await returns when the time has come and the condition holds.
func (f *Fleet) await(ctx context.Context, due time.Time, c Condition) error {
	timer := time.NewTimer(time.Until(due))
	defer timer.Stop()
	for passed := false; !passed; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-f.broken:
			return err
		case <-timer.C:
			passed = true
		}
	}
	for c.holds != nil && !c.holds(f) {
		timer.Reset(lookAgain)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-f.broken:
			return err
		case <-f.stirred:
		case <-timer.C:
		}
	}
	return nil
}

// fail ends the scenario with an error.
func (f *Fleet) fail(err error) {
	select {
	case f.broken <- err:
	default:
	}
}

// stir makes conditions be looked at.
func (f *Fleet) stir() {
	select {
	case f.stirred <- struct{}{}:
	default:
	}
}

// end switches all devices off at once, and waits.
func (f *Fleet) end() error {
	errs := make([]error, len(f.devices))
	var all sync.WaitGroup
	for i, d := range f.devices {
		all.Go(func() { errs[i] = d.stop() })
	}
	all.Wait()
	return errors.Join(errs...)
}

// Site is the site as device i sees it; empty when the device is off.
func (f *Fleet) Site(i int) peer.Site {
	if n := f.devices[i].running(); n != nil {
		return n.Site()
	}
	return peer.Site{}
}

// Status is what device i says of itself, and whether it is on.
func (f *Fleet) Status(i int) (peer.DeviceStatus, bool) {
	site := f.Site(i)
	if len(site.Devices) == 0 {
		return peer.DeviceStatus{}, false
	}
	return site.Devices[0].Status, true
}

// Seen is the state of device i as the observer tells it, "" when it has never heard of it.
func (f *Fleet) Seen(observer, i int) peer.DeviceState {
	for _, d := range f.Site(observer).Devices {
		if d.ID == f.devices[i].identity() {
			return peer.DeviceState(d.Status.State)
		}
	}
	return ""
}

// Fetched is how many bytes of a release's image device i holds.
func (f *Fleet) Fetched(i, release int) int64 {
	if n := f.devices[i].running(); n != nil {
		for _, t := range n.Transfers() {
			if t.Image == f.releases[release].Image.SHA256 {
				return t.Done
			}
		}
	}
	return 0
}

// Kept is how many verified bytes of a release's image are on the disk of device
// i, which must be off.
func (f *Fleet) Kept(i, release int) (int64, error) {
	d := f.devices[i]
	if d.running() != nil {
		return 0, fmt.Errorf("look at the disk of %s: it is on", d.name)
	}
	store, err := swarm.OpenStore(swarm.StoreConfig{Dir: filepath.Join(d.stateDir(), "store")})
	if err != nil {
		return 0, fmt.Errorf("look at the disk of %s: %w", d.name, err)
	}
	return store.HaveBytes(f.releases[release].Image.SHA256), nil
}

// Release of a scenario.
type Release struct {
	ID      verify.Digest
	Version string
	Image   verify.Image
}

// String sums the site up for an error.
func (f *Fleet) String() string {
	text := fmt.Sprintf("after %v:", time.Since(f.begun))
	for i, d := range f.devices {
		st, on := f.Status(i)
		if !on {
			text += fmt.Sprintf(" %s off;", d.name)
			continue
		}
		text += fmt.Sprintf(" %s %s %s", d.name, st.State, st.Version)
		if st.Reason != nil {
			text += fmt.Sprintf(" (%s %s)", st.Reason.Code, st.Reason.Detail)
		}
		text += ";"
	}
	return text
}
