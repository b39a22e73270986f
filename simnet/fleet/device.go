package fleet

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"meshupd/discovery"
	"meshupd/install"
	"meshupd/peer"
	"meshupd/simnet"
	"meshupd/swarm"
	"meshupd/verify"
)

// port that every device listens on.
const port = 7610

// device is a machine of the site: its disk, its cable, and its life while it is on.
type device struct {
	fleet *Fleet
	index int
	name  string
	dir   string
	host  *simnet.LANHost

	mu        sync.Mutex // guards the fields below
	life      *life      // nil: off
	lives     int
	id        string
	unhealthy bool
	full      bool
	trials    int
	steps     []StepSeen
	ledger    map[ledgerKey]swarm.Transfer
	lastView  peer.DeviceStatus
	history   []peer.Event
}

// life is a device from its start to its end.
type life struct {
	node    *peer.Node
	cancel  context.CancelFunc
	done    chan struct{} // the node and its watcher have ended
	err     error         // set before done is closed
	expects bool          // the end was asked for; guarded by device.mu
}

// ledgerKey tells transfers apart whose counts begin at zero.
type ledgerKey struct {
	life    int
	image   verify.Digest
	started time.Time
}

func nameOf(i int) string { return fmt.Sprintf("d%02d", i) }

func newDevice(f *Fleet, index int, dir string, host *simnet.LANHost) *device {
	return &device{fleet: f, index: index, name: nameOf(index), dir: dir, host: host, ledger: map[ledgerKey]swarm.Transfer{}}
}

func (d *device) running() *peer.Node {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.life == nil {
		return nil
	}
	return d.life.node
}

func (d *device) identity() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.id
}

// start switches the device on, with what its disk holds.
func (d *device) start(ctx context.Context) error {
	if d.running() != nil {
		return fmt.Errorf("start %s: it is on", d.name)
	}
	d.mu.Lock()
	boot := d.lives + 1
	d.mu.Unlock()
	slots, err := d.openSlots(boot)
	if err != nil {
		return fmt.Errorf("start %s: %w", d.name, err)
	}
	node, err := peer.New(peer.Config{
		Name: d.name, Product: product, Hardware: "simulated",
		StateDir: d.stateDir(), Anchor: d.fleet.vendor.Anchor(), Reserve: d.reserve(),
		Slots: slots, Starter: slots.Start, Health: d.health, Policy: peer.PolicyInstall,
		Listen: []netip.AddrPort{netip.AddrPortFrom(d.host.Addr(), port)}, LAN: d.host,
		Finders: func(ad discovery.Advert) []peer.Finder { return []peer.Finder{&finder{d.host, ad}} },
		Log:     d.fleet.scenario.Log.With("device", d.name),
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", d.name, err)
	}
	d.fleet.lan.Restore(d.host)
	ctx, cancel := context.WithCancel(ctx)
	l := &life{node: node, cancel: cancel, done: make(chan struct{})}
	d.mu.Lock()
	d.life, d.lives, d.id = l, boot, node.ID()
	d.mu.Unlock()
	go d.live(ctx, l)
	return nil
}

// openSlots opens the slot folder. Each start of a device is a start of its
// machine, and there is no application to restart: switching the pointer is all.
func (d *device) openSlots(boot int) (*install.Files, error) {
	return install.OpenFiles(install.FilesConfig{
		Dir: d.slotDir(), FactoryVersion: factory,
		BootID: func() (string, error) { return strconv.Itoa(boot), nil },
	})
}

func (d *device) stateDir() string { return filepath.Join(d.dir, "state") }
func (d *device) slotDir() string  { return filepath.Join(d.dir, "slots") }

// live runs the node and watches it until the end.
func (d *device) live(ctx context.Context, l *life) {
	var watching sync.WaitGroup
	watchCtx, stopWatch := context.WithCancel(ctx)
	watching.Go(func() { d.watch(watchCtx, l.node) })
	l.err = l.node.Run(ctx)
	stopWatch()
	watching.Wait()
	d.mu.Lock()
	asked := l.expects
	d.mu.Unlock()
	if !asked && ctx.Err() == nil {
		d.fleet.fail(fmt.Errorf("%s ended by itself: %w", d.name, errors.Join(l.err, errors.New("nobody asked for it"))))
	}
	close(l.done)
}

// watchGap is how often a busy device is looked at.
const watchGap = 20 * time.Millisecond

// watch notes what the device says of itself and what it moved.
func (d *device) watch(ctx context.Context, n *peer.Node) {
	for {
		changed := n.Changed()
		d.note(n)
		d.fleet.stir()
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		timer := time.NewTimer(watchGap)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

func (d *device) note(n *peer.Node) {
	st := n.Site().Devices[0].Status
	transfers := n.Transfers()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, t := range transfers {
		d.ledger[ledgerKey{d.lives, t.Image, t.Started}] = t
	}
	if len(d.steps) == 0 || st.State != d.lastView.State || st.Version != d.lastView.Version {
		d.steps = append(d.steps, StepSeen{At: time.Since(d.fleet.begun), State: peer.DeviceState(st.State), Version: st.Version})
	}
	d.lastView = st
}

// maxTrials of one device. A device that tries again and again does so within
// moments, and hours of that would take for ever even in fake time.
const maxTrials = 100

// health is the application's answer on trial.
func (d *device) health(context.Context, install.SlotName, string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.trials++; d.trials == maxTrials {
		d.fleet.fail(fmt.Errorf("%s began %d trials", d.name, d.trials))
	}
	if d.unhealthy {
		return verify.Refuse(verify.CodeHealth, "the application does not answer")
	}
	return nil
}

// reserve is the part of the disk that meshupd must leave alone. A device with a
// full disk is one that must leave alone more than there is.
func (d *device) reserve() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.full {
		return math.MaxInt64 / 4
	}
	return 0
}

// stop ends the device and waits for it. A device that is off stays off.
func (d *device) stop() error {
	d.mu.Lock()
	l := d.life
	if l != nil {
		l.expects = true
	}
	d.mu.Unlock()
	if l == nil {
		return nil
	}
	l.cancel()
	<-l.done
	d.note(l.node) // the last bytes
	d.mu.Lock()
	d.life = nil
	d.history = l.node.History("", math.MaxInt)
	d.mu.Unlock()
	if l.err != nil {
		return fmt.Errorf("end %s: %w", d.name, l.err)
	}
	return nil
}
