package fleet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"meshupd/peer"
	"meshupd/simnet"
	"meshupd/verify"
)

// Action is something that is done to the site.
type Action struct {
	name string
	do   func(ctx context.Context, f *Fleet) error
}

// Do makes an action.
func Do(name string, do func(ctx context.Context, f *Fleet) error) Action { return Action{name, do} }

func act(do func(f *Fleet), format string, args ...any) Action {
	return Action{fmt.Sprintf(format, args...), func(_ context.Context, f *Fleet) error { do(f); return nil }}
}

// Together does several actions at the same time.
func Together(actions ...Action) Action {
	var names []string
	for _, a := range actions {
		names = append(names, a.name)
	}
	return Action{strings.Join(names, " and "), func(ctx context.Context, f *Fleet) error {
		errs := make([]error, len(actions))
		var all sync.WaitGroup
		for i, a := range actions {
			all.Go(func() { errs[i] = a.do(ctx, f) })
		}
		all.Wait()
		return errors.Join(errs...)
	}}
}

// Import plugs a stick with a release in at a device.
func Import(i, release int) Action {
	return Action{fmt.Sprintf("import release %d at %s", release, nameOf(i)), func(ctx context.Context, f *Fleet) error {
		n := f.devices[i].running()
		if n == nil {
			return errors.New("the device is off")
		}
		stick, err := os.Open(f.bundles[release])
		if err != nil {
			return err
		}
		defer stick.Close()
		return importFrom(ctx, n, stick)
	}}
}

func importFrom(ctx context.Context, n *peer.Node, stick io.Reader) error {
	bundle, err := verify.OpenBundle(stick)
	if err != nil {
		return err
	}
	imp, err := n.OpenImport(ctx, bundle.Head(), "technician", "usb")
	if err != nil {
		return err
	}
	defer imp.Abort()
	for {
		img, r, err := bundle.NextImage(imp.Release())
		if errors.Is(err, io.EOF) {
			return imp.Commit(ctx)
		}
		if err != nil {
			return err
		}
		if err := imp.Put(ctx, img.SHA256, r, nil); err != nil {
			return err
		}
	}
}

// Start switches a device on: one that comes late, or one that was killed.
func Start(i int) Action {
	return Action{"start " + nameOf(i), func(ctx context.Context, f *Fleet) error {
		// A device outlives the event, and the limit of the events.
		return f.devices[i].start(context.WithoutCancel(ctx))
	}}
}

// Kill pulls a device's plug: its cable is dead at once, then its goroutines are
// ended. In one process they cannot be ended without running their deferred
// calls, so what a device holds in memory and writes down at its end (pieces of
// which the bitmap is not yet durable) survives; what a real cut does to the disk
// is tried with processes and with faults, elsewhere.
func Kill(i int) Action {
	return Action{"kill " + nameOf(i), func(_ context.Context, f *Fleet) error {
		d := f.devices[i]
		if d.running() == nil {
			return errors.New("the device is off")
		}
		f.lan.Cut(d.host)
		return d.stop()
	}}
}

// Cut pulls a device's network cable; the device runs on.
func Cut(i int) Action {
	return act(func(f *Fleet) { f.lan.Cut(f.devices[i].host) }, "cut %s", nameOf(i))
}

// Restore plugs it back in.
func Restore(i int) Action {
	return act(func(f *Fleet) { f.lan.Restore(f.devices[i].host) }, "restore %s", nameOf(i))
}

// Partition splits the site. Devices in no group form one more.
func Partition(groups ...[]int) Action {
	return act(func(f *Fleet) {
		var hosts [][]*simnet.LANHost
		for _, g := range groups {
			var group []*simnet.LANHost
			for _, i := range g {
				group = append(group, f.devices[i].host)
			}
			hosts = append(hosts, group)
		}
		f.lan.Partition(hosts...)
	}, "partition %v", groups)
}

// Heal undoes Partition.
func Heal() Action { return act(func(f *Fleet) { f.lan.Heal() }, "heal") }

// Unhealthy makes a device's health checks fail from now on.
func Unhealthy(i int) Action {
	return act(func(f *Fleet) {
		d := f.devices[i]
		d.mu.Lock()
		defer d.mu.Unlock()
		d.unhealthy = true
	}, "%s becomes unhealthy", nameOf(i))
}

// FullDisk leaves a device no space, FreeDisk gives it back.
func FullDisk(i int) Action {
	return act(func(f *Fleet) { f.devices[i].fill(true) }, "fill the disk of %s", nameOf(i))
}

// FreeDisk undoes FullDisk.
func FreeDisk(i int) Action {
	return act(func(f *Fleet) { f.devices[i].fill(false) }, "free the disk of %s", nameOf(i))
}

func (d *device) fill(full bool) {
	d.mu.Lock()
	d.full = full
	d.mu.Unlock()
	if n := d.running(); n != nil {
		n.SetReserve(d.reserve())
	}
}

// Condition is something to wait for.
type Condition struct {
	name  string
	holds func(f *Fleet) bool
}

// When makes a condition. It is looked at whenever a device changes, and each second.
func When(name string, holds func(f *Fleet) bool) Condition { return Condition{name, holds} }

// Is waits until a device says that it is in a state.
func Is(i int, state peer.DeviceState) Condition {
	return Condition{fmt.Sprintf("%s is %s", nameOf(i), state), func(f *Fleet) bool {
		st, on := f.Status(i)
		return on && st.State == string(state)
	}}
}

// Confirmed waits until these devices run a release for good; no devices: all of them.
func Confirmed(release int, devices ...int) Condition {
	who := "all"
	if len(devices) > 0 {
		who = fmt.Sprint(devices)
	}
	return Condition{fmt.Sprintf("%s confirmed release %d", who, release), func(f *Fleet) bool {
		list := devices
		if len(list) == 0 {
			list = f.all()
		}
		for _, i := range list {
			st, on := f.Status(i)
			if !on || st.State != string(peer.StateConfirmed) || st.Version != versionOf(release) {
				return false
			}
		}
		return true
	}}
}

func (f *Fleet) all() []int {
	list := make([]int, len(f.devices))
	for i := range list {
		list[i] = i
	}
	return list
}

// Met waits until every device that is on hears every other one.
func Met() Condition {
	return Condition{"all hear all", func(f *Fleet) bool {
		for i, d := range f.devices {
			for j, other := range f.devices {
				if d.running() == nil || other.running() == nil {
					continue
				}
				if s := f.Seen(i, j); s == "" || s == peer.StateSilent {
					return false
				}
			}
		}
		return true
	}}
}

// Sees waits until the observer tells a device to be in a state.
func Sees(observer, i int, state peer.DeviceState) Condition {
	return Condition{fmt.Sprintf("%s sees %s %s", nameOf(observer), nameOf(i), state), func(f *Fleet) bool {
		return f.Seen(observer, i) == state
	}}
}

// Holds waits until a device holds some of a release's image: at least the given part of it.
func Holds(i, release int, part float64) Condition {
	return Condition{fmt.Sprintf("%s holds %.0f %% of release %d", nameOf(i), 100*part, release), func(f *Fleet) bool {
		return float64(f.Fetched(i, release)) >= part*float64(f.releases[release].Image.Size)
	}}
}

// Both waits until all of the conditions hold at once.
func Both(conditions ...Condition) Condition {
	var names []string
	for _, c := range conditions {
		names = append(names, c.name)
	}
	return Condition{strings.Join(names, " and "), func(f *Fleet) bool {
		for _, c := range conditions {
			if !c.holds(f) {
				return false
			}
		}
		return true
	}}
}
