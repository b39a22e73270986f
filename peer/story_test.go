package peer

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"meshupd/discovery"
	"meshupd/install"
	"meshupd/verify"
	"meshupd/verify/publish"
	"meshupd/verify/verifytest"
)

// town is a few whole devices on a LAN in memory, in fake time.
type town struct {
	t         *testing.T
	lan       *memLAN
	vendor    *verifytest.Vendor
	residents []*resident
}

// resident is a device with two slots in memory.
type resident struct {
	*Node
	town   *town
	dir    string
	at     netip.AddrPort
	slots  *install.Memory
	hold   func(context.Context, install.SlotName, string) (HoldFact, string, time.Duration)
	over   func(install.Slots) install.Slots // stands over the slots; nil: nothing does
	quiet  func(Step) time.Duration
	hints  chan discovery.Hint
	cancel context.CancelFunc
	ended  chan error
}

// inTown runs a story with n devices on a factory version.
func inTown(t *testing.T, n int, factory string, story func(w *town, devices []*resident)) {
	t.Helper()
	vendor := verifytest.NewVendor(t, "kiosk-a")
	dirs := make([]string, n)
	for i := range dirs {
		dirs[i] = t.TempDir()
	}
	synctest.Test(t, func(t *testing.T) {
		w := &town{t: t, lan: newMemLAN(), vendor: vendor}
		for i, dir := range dirs {
			r := &resident{town: w, dir: dir, at: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}), 7610),
				slots: install.NewMemory(install.MemoryConfig{FactoryVersion: factory})}
			w.residents = append(w.residents, r)
			r.start()
		}
		defer func() {
			for _, r := range w.residents {
				r.stop()
			}
		}()
		w.meet()
		story(w, w.residents)
	})
}

func (r *resident) start() {
	r.town.t.Helper()
	r.hints = make(chan discovery.Hint, 64)
	slots := install.Slots(r.slots)
	if r.over != nil {
		slots = r.over(slots)
	}
	node, err := New(Config{Name: r.at.String(), Product: "kiosk-a", Hardware: "x", StateDir: r.dir, Anchor: r.town.vendor.Anchor(),
		Slots: slots, Hold: r.hold, Quiet: r.quiet, Policy: PolicyInstall, Listen: []netip.AddrPort{r.at}, LAN: r.town.lan.at(r.at.Addr()),
		Finders: func(discovery.Advert) []Finder { return []Finder{fakeFinder{r.hints}} }, Log: testLog(r.at.String())})
	if err != nil {
		r.town.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.Node, r.cancel, r.ended = node, cancel, make(chan error, 1)
	go func() { r.ended <- node.Run(ctx) }()
	<-node.mesh.started
}

func (r *resident) stop() {
	r.cancel()
	if err := <-r.ended; err != nil {
		r.town.t.Errorf("%s ended: %v", r.at, err)
	}
}

// meet tells every device of every other.
func (w *town) meet() {
	for _, a := range w.residents {
		for _, b := range w.residents {
			if a != b {
				a.hints <- discovery.Hint{Addrs: []netip.AddrPort{b.at}, Via: "test"}
			}
		}
	}
}

// part cuts a device off, or joins it again.
func (w *town) part(one *resident, up bool) {
	for _, other := range w.residents {
		if other != one {
			w.lan.link(one.at.Addr(), other.at.Addr(), up)
		}
	}
	if up {
		w.meet()
	}
}

// until waits, a quarter of an hour of fake time at most.
func (r *resident) until(what string, holds func() bool) {
	r.town.t.Helper()
	deadline := time.After(15 * time.Minute)
	for {
		changed := r.Changed()
		if holds() {
			return
		}
		select {
		case <-changed:
		case <-time.After(5 * time.Second): // what a device says of others changes without a change of its own
		case <-deadline:
			r.town.t.Fatalf("%s: %s never holds; status %+v", r.at, what, r.Site().Devices[0].Status)
		}
	}
}

func (r *resident) runs(version string) {
	r.town.t.Helper()
	r.until("runs "+version, func() bool {
		st := r.Site().Devices[0].Status
		return st.Version == version && st.State == string(StateConfirmed)
	})
}

// take imports a .update file.
func (r *resident) take(path string) error {
	r.town.t.Helper()
	f, err := os.Open(path)
	if err != nil {
		r.town.t.Fatal(err)
	}
	defer f.Close()
	b, err := verify.OpenBundle(f)
	if err != nil {
		return err
	}
	imp, err := r.OpenImport(r.town.t.Context(), b.Head(), "test", "file")
	if err != nil {
		return err
	}
	defer imp.Abort()
	for {
		img, data, err := b.NextImage(imp.Release())
		if errors.Is(err, io.EOF) {
			return imp.Commit(r.town.t.Context())
		}
		if err == nil {
			err = imp.Put(r.town.t.Context(), img.SHA256, data, nil)
		}
		if err != nil {
			return err
		}
	}
}

func (r *resident) takes(path string) {
	r.town.t.Helper()
	if err := r.take(path); err != nil {
		r.town.t.Fatalf("%s: import %s: %v", r.at, path, err)
	}
}

// confirmedVersions are what a device went through, oldest first.
func (r *resident) confirmedVersions() []string {
	var out []string
	events := r.History(r.ID(), 50)
	for i := len(events) - 1; i >= 0; i-- {
		if events[i].Kind == EventConfirmed {
			out = append(out, events[i].To)
		}
	}
	return out
}

func idOf(t *testing.T, bundle string) verify.Digest {
	t.Helper()
	u, err := publish.Inspect(bundle)
	if err != nil {
		t.Fatal(err)
	}
	return u.ID
}

// A site at 1.2 gets 2.4, which goes only over 1.5: every device goes through it by
// itself, in whichever order the sticks come.
func TestSiteGoesThroughTheVersionInBetween(t *testing.T) {
	inTown(t, 3, "1.2.0", func(w *town, d []*resident) {
		mid := w.vendor.Bundle(t, verifytest.Opts{Version: "1.5.0", Requires: ">=1.2.0"})
		other := w.vendor.Bundle(t, verifytest.Opts{Version: "1.6.0"})
		goal := w.vendor.Bundle(t, verifytest.Opts{Version: "2.4.0", Requires: ">=1.5.0",
			Via: &verify.Via{Version: "1.5.0", SHA256: idOf(t, mid)}})
		d[0].takes(goal)
		for _, r := range d {
			r.until("waits for the version in between", func() bool {
				st := r.Site().Devices[0].Status
				return st.State == string(StateBlocked) && st.Reason != nil && st.Reason.Code == verify.CodeRequires
			})
		}
		if err := d[1].take(other); verify.CodeOf(err) != verify.CodeOrder {
			t.Errorf("an older release that nobody named was taken: %v", err)
		}
		d[1].takes(mid) // by a stick at another device
		for _, r := range d {
			r.runs("2.4.0")
			if got := r.confirmedVersions(); len(got) != 2 || got[0] != "1.5.0" || got[1] != "2.4.0" {
				t.Errorf("%s went through %v", r.at, got)
			}
			if got := r.door.Counters(); got.Accepted != 3 || got.Floor != 3 {
				t.Errorf("%s has counters %+v", r.at, got)
			}
		}
	})
}

// The publisher withdraws what a site runs. Nobody has anything newer: each device
// goes back to what is in its other slot, also one that hears of it later.
func TestRecallReachesAPartitionThatHeals(t *testing.T) {
	inTown(t, 3, "1.0.0", func(w *town, d []*resident) {
		good := w.vendor.Bundle(t, verifytest.Opts{Version: "1.1.0"})
		bad := w.vendor.Bundle(t, verifytest.Opts{Version: "1.2.0"})
		d[0].takes(good)
		for _, r := range d {
			r.runs("1.1.0")
		}
		d[0].takes(bad)
		for _, r := range d {
			r.runs("1.2.0")
		}
		w.part(d[2], false)
		badID := idOf(t, bad)
		word := w.vendor.Bundle(t, verifytest.Opts{Version: "1.2.1", NoImages: true, Recalls: []verify.Digest{badID}})
		d[0].takes(word)
		back := func(r *resident) {
			t.Helper()
			r.runs("1.1.0")
			for _, ref := range r.heads() {
				if ref.ID == badID {
					t.Errorf("%s still offers what was withdrawn", r.at)
				}
			}
			if err := r.take(bad); verify.CodeOf(err) != verify.CodeRecalled {
				t.Errorf("%s takes what was withdrawn: %v", r.at, err)
			}
		}
		back(d[0])
		back(d[1])
		if st := d[2].Site().Devices[0].Status; st.Version != "1.2.0" {
			t.Errorf("a device that cannot know runs %s", st.Version)
		}
		w.part(d[2], true)
		back(d[2])

		// A restart changes nothing, and the next release is taken by all.
		d[1].stop()
		d[1].start()
		w.meet()
		back(d[1])
		d[1].takes(w.vendor.Bundle(t, verifytest.Opts{Version: "1.3.0"}))
		for _, r := range d {
			r.runs("1.3.0")
		}
	})
}

// A recall may name an image instead, and come with a release that replaces it.
func TestRecallOfAnImageWithItsReplacement(t *testing.T) {
	inTown(t, 2, "1.0.0", func(w *town, d []*resident) {
		bad := w.vendor.Bundle(t, verifytest.Opts{Version: "1.1.0"})
		d[0].takes(bad)
		for _, r := range d {
			r.runs("1.1.0")
		}
		u, err := publish.Inspect(bad)
		if err != nil {
			t.Fatal(err)
		}
		image := u.Manifest.Images[0].SHA256
		d[1].takes(w.vendor.Bundle(t, verifytest.Opts{Version: "1.2.0", Recalls: []verify.Digest{image}, Critical: []string{"recalls"}}))
		for _, r := range d {
			r.runs("1.2.0")
			if r.store.HaveBytes(image) != 0 {
				t.Errorf("%s still holds bytes of the image", r.at)
			}
			if !r.withdrawn(u.ID) {
				t.Errorf("%s does not know that the manifest is withdrawn with its image", r.at)
			}
			if err := r.Rollback(t.Context(), "test"); verify.CodeOf(err) != verify.CodeRecalled {
				t.Errorf("%s goes back to what was withdrawn: %v", r.at, err)
			}
		}
	})
}

// The release key is stolen and replaced: what it signed is not offered any more,
// what it signs is not taken, and both reach a device that was away.
func TestRotationReachesADeviceThatWasAway(t *testing.T) {
	inTown(t, 3, "1.0.0", func(w *town, d []*resident) {
		v := w.vendor
		fresh, err := publish.NewKey(publish.KeyOptions{Name: "Fresh"})
		if err != nil {
			t.Fatal(err)
		}
		first := v.Bundle(t, verifytest.Opts{Version: "1.1.0"})
		d[0].takes(first)
		for _, r := range d {
			r.runs("1.1.0")
		}
		w.part(d[2], false)
		stolen := v.Bundle(t, verifytest.Opts{Version: "6.6.6", Seq: 666})
		trust := filepath.Join(v.Dir, "next")
		if err := os.CopyFS(trust, os.DirFS(v.Anchor())); err != nil {
			t.Fatal(err)
		}
		_, err = publish.NextTrust(trust, publish.TrustChanges{AddRelease: []*verify.Certificate{fresh.Certificate()},
			DropRelease: []string{v.Key.Fingerprint()}, IssuedAt: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		if _, done, err := publish.SignTrust(trust, []*publish.SecretKey{v.Key}); err != nil || !done {
			t.Fatal(done, err)
		}
		image := filepath.Join(v.Dir, "new.img")
		if err := publish.GenerateImage(image, 50_000, 77); err != nil {
			t.Fatal(err)
		}
		dir, err := publish.Create(t.Context(), publish.Options{Out: filepath.Join(v.Dir, "new"), Trust: trust, Version: "1.2.0", Seq: 2,
			Images: []publish.ImageInput{{Path: image, Name: "rootfs"}}})
		if err != nil {
			t.Fatal(err)
		}
		if err := publish.Sign(dir, fresh); err != nil {
			t.Fatal(err)
		}
		bundle := filepath.Join(v.Dir, "new.update")
		if err := publish.Pack(t.Context(), dir, bundle, nil); err != nil {
			t.Fatal(err)
		}
		d[0].takes(bundle)
		d[1].runs("1.2.0")
		if err := d[1].take(stolen); verify.CodeOf(err) != verify.CodeSigKey {
			t.Errorf("what the stolen key signed was taken: %v", err)
		}
		for _, ref := range d[1].heads() {
			if ref.ID == idOf(t, first) {
				t.Error("what only the stolen key vouches for is still offered")
			}
		}
		w.part(d[2], true)
		d[2].runs("1.2.0")
		if got := d[2].Site().Trust.Epoch; got != 2 {
			t.Errorf("the device that was away is at trust document %d", got)
		}
	})
}

// New keys may come with a release that everyone has already: the news travels all
// the same, also to a device that was away.
func TestTrustTravelsWithAReleaseThatIsKnown(t *testing.T) {
	inTown(t, 3, "1.0.0", func(w *town, d []*resident) {
		v := w.vendor
		dir := v.Release(t, verifytest.Opts{Version: "1.1.0"})
		pack := func(name string) string {
			out := filepath.Join(v.Dir, name)
			if err := publish.Pack(t.Context(), dir, out, nil); err != nil {
				t.Fatal(err)
			}
			return out
		}
		d[0].takes(pack("one.update"))
		for _, r := range d {
			r.runs("1.1.0")
		}
		w.part(d[2], false)
		fresh, err := publish.NewKey(publish.KeyOptions{Name: "Fresh"})
		if err != nil {
			t.Fatal(err)
		}
		// The release folder is a trust folder, too: its chain grows in place.
		if _, err := publish.NextTrust(dir, publish.TrustChanges{AddRelease: []*verify.Certificate{fresh.Certificate()}, IssuedAt: time.Now()}); err != nil {
			t.Fatal(err)
		}
		if _, done, err := publish.SignTrust(dir, []*publish.SecretKey{v.Key}); err != nil || !done {
			t.Fatal(done, err)
		}
		d[0].takes(pack("two.update"))
		w.part(d[2], true)
		for _, r := range d {
			r.until("knows the new keys", func() bool { return r.Site().Trust.Epoch == 2 })
			r.runs("1.1.0")
		}
	})
}

// A person goes back: what was left counts as failed here, until a newer one comes.
func TestRollbackByAPersonStays(t *testing.T) {
	inTown(t, 1, "1.0.0", func(w *town, d []*resident) {
		for _, version := range []string{"1.1.0", "1.2.0"} {
			d[0].takes(w.vendor.Bundle(t, verifytest.Opts{Version: version}))
			d[0].runs(version)
		}
		if err := d[0].Rollback(t.Context(), "test"); err != nil {
			t.Fatal(err)
		}
		d[0].until("is back, and says why it stays there", func() bool {
			st := d[0].Site().Devices[0].Status
			return st.Version == "1.1.0" && st.State == string(StateRolledBack) && st.Reason != nil && st.Reason.Code == verify.CodeFailedHere
		})
		d[0].takes(w.vendor.Bundle(t, verifytest.Opts{Version: "1.3.0"}))
		d[0].runs("1.3.0")
	})
}

// Two releases for one place: each side keeps its first and shows the alarm.
func TestAlarmIsShownInTheSite(t *testing.T) {
	inTown(t, 1, "1.0.0", func(w *town, d []*resident) {
		one := w.vendor.Bundle(t, verifytest.Opts{Version: "1.1.0", Seq: 5})
		two := w.vendor.Bundle(t, verifytest.Opts{Version: "1.1.1", Seq: 5})
		d[0].takes(one)
		if err := d[0].take(two); verify.CodeOf(err) != verify.CodeFork {
			t.Errorf("the second one for its place: %v", err)
		}
		d[0].runs("1.1.0")
		alarms := d[0].Site().Alarms
		if len(alarms) != 1 || alarms[0].Kept != idOf(t, one) || alarms[0].Other != idOf(t, two) {
			t.Errorf("alarms %+v", alarms)
		}
	})
}

// A restart that is held waits, says why, and comes when it is let go; what a person asks for is not held.
func TestRestartIsHeld(t *testing.T) {
	inTown(t, 1, "1.0.0", func(w *town, d []*resident) {
		var held atomic.Bool
		held.Store(true)
		d[0].stop()
		d[0].hold = func(context.Context, install.SlotName, string) (HoldFact, string, time.Duration) {
			if held.Load() {
				return HoldAll, "inhibited by pos-app: sale in progress", 10 * time.Second
			}
			return HoldNone, "", 0
		}
		d[0].start()
		d[0].takes(w.vendor.Bundle(t, verifytest.Opts{Version: "1.1.0"}))
		d[0].until("waits, installed", func() bool {
			st := d[0].Site().Devices[0].Status
			return st.State == string(StateInstalled) && st.Reason != nil && st.Reason.Code == verify.CodeHeld && st.Reason.Detail == "inhibited by pos-app: sale in progress"
		})
		time.Sleep(time.Hour) // of fake time
		if st, err := d[0].slots.State(t.Context()); err != nil || st.Phase != install.PhaseSettled || st.Booted != install.SlotA {
			t.Fatalf("armed while held: %+v, %v", st, err)
		}
		held.Store(false)
		d[0].runs("1.1.0")
		held.Store(true)
		if err := d[0].Rollback(t.Context(), "test"); err != nil {
			t.Fatal(err)
		}
		d[0].until("is back, though restarts are held", func() bool { return d[0].Site().Devices[0].Status.Version == "1.0.0" })
	})
}

// A system on trial that never comes up leaves no word; the device that is back says how often it was started, in status
// and history. A release that failed and is confirmed after all is not held against the device any more.
func TestSilentFallbackIsExplained(t *testing.T) {
	inTown(t, 1, "1.0.0", func(w *town, d []*resident) {
		r := d[0]
		release := w.vendor.Bundle(t, verifytest.Opts{Version: "1.1.0"})
		r.stop()
		r.slots = r.slots.Reopen(install.MemoryConfig{Restart: func(ctx context.Context, _ install.SlotName, _ install.Content) error {
			<-ctx.Done() // the new system never comes up
			return ctx.Err()
		}}, false)
		r.start()
		r.takes(release)
		r.until("is started", func() bool {
			st, err := r.slots.State(t.Context())
			return err == nil && st.Phase == install.PhaseTrial
		})
		r.stop()
		r.slots = r.slots.Reopen(install.MemoryConfig{}, true)
		if err := r.slots.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.start()
		want := "the new system was started once and did not confirm itself"
		r.until("says why", func() bool {
			st := r.Site().Devices[0].Status
			return st.State == string(StateRolledBack) && st.Version == "1.0.0" && st.Reason != nil && st.Reason.Code == verify.CodeBoot && st.Reason.Detail == want
		})
		if e := r.History(r.ID(), 1); len(e) != 1 || e[0].Kind != EventRolledBack || e[0].Detail != want {
			t.Errorf("history %+v", e)
		}
		if !r.failedHere(idOf(t, release)) {
			t.Error("the failure was not kept")
		}

		// A person starts it by hand, and now it comes up.
		if err := errors.Join(r.slots.Try(t.Context(), install.SlotB), r.slots.Restart(t.Context())); err != nil {
			t.Fatal(err)
		}
		r.poke()
		r.runs("1.1.0")
		if r.failedHere(idOf(t, release)) {
			t.Error("a release that is confirmed still counts as failed here")
		}
	})
}
