package peer

import (
	"context"
	"strings"
	"testing"
	"time"

	"meshupd/install"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// slowSlots take hours to write, and get further once a minute until they stick.
type slowSlots struct {
	install.Slots
	minutes int // with progress
	sticks  bool
}

func (s *slowSlots) Write(ctx context.Context, rel *verify.Release, images []verify.Image, open install.Source, progress func(done, total int64)) error {
	for range s.minutes {
		time.Sleep(time.Minute)
		progress(1, 100)
	}
	if s.sticks {
		<-ctx.Done()
		return ctx.Err()
	}
	return s.Slots.Write(ctx, rel, images, open, progress)
}

// watched asks every second whether the loop is alive, until holds or it is not.
func (r *resident) watched(holds func(DeviceStatus) bool) (after time.Duration, err error) {
	began := time.Now()
	for err = r.Alive(); err == nil && !holds(r.Site().Devices[0].Status); err = r.Alive() {
		time.Sleep(time.Second)
	}
	return time.Since(began), err
}

// A device that writes for three hours is alive all the time.
func TestMuchToDoIsNoHang(t *testing.T) {
	inTown(t, 1, "1.0.0", func(w *town, d []*resident) {
		d[0].stop()
		d[0].over = func(s install.Slots) install.Slots { return &slowSlots{Slots: s, minutes: 180} }
		d[0].start()
		d[0].takes(w.vendor.Bundle(t, verifytest.Opts{Version: "1.1.0"}))
		after, err := d[0].watched(func(st DeviceStatus) bool { return st.State == string(StateConfirmed) && st.Version == "1.1.0" })
		if err != nil || after < 3*time.Hour {
			t.Errorf("after %s: %v", after, err)
		}
		// Neither is one that has nothing to do.
		begin := time.Now()
		if _, err := d[0].watched(func(DeviceStatus) bool { return time.Since(begin) > 24*time.Hour }); err != nil {
			t.Errorf("an idle device: %v", err)
		}
	})
}

// One whose write sticks is given the longest silence of a write, and no more.
func TestHangIsSeen(t *testing.T) {
	inTown(t, 1, "1.0.0", func(w *town, d []*resident) {
		d[0].stop()
		d[0].over = func(s install.Slots) install.Slots { return &slowSlots{Slots: s, minutes: 30, sticks: true} }
		d[0].quiet = func(s Step) time.Duration {
			if s == StepWrite {
				return 20 * time.Minute
			}
			return 0
		}
		d[0].start()
		d[0].takes(w.vendor.Bundle(t, verifytest.Opts{Version: "1.1.0"}))
		after, err := d[0].watched(func(DeviceStatus) bool { return false })
		if !strings.Contains(err.Error(), `"write" may be silent for 20m0s`) || after < 49*time.Minute || after > 52*time.Minute {
			t.Errorf("after %s: %v", after, err)
		}
	})
}
