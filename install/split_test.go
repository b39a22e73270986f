package install_test

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"

	"meshupd/install"
	"meshupd/install/apply"
	"meshupd/install/slotstest"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// Slots behind a process of their own keep the same promises: the suite speaks to a Client, its faults are in the Files
// behind the Server, and what a Source would give lies in the store that the server reads by itself.
func TestFilesBehindApply(t *testing.T) {
	vendor := verifytest.NewVendor(t, "slotstest")
	slotstest.RunFrom(t, vendor, func(t *testing.T) slotstest.Harness {
		h := filesHarness(t, install.LayoutFolder, 2)
		dir, err := os.MkdirTemp("", "apply") // a socket's path is short
		must(t, "make a folder", err)
		stop := func() {}
		t.Cleanup(func() { stop(); os.RemoveAll(dir) })
		files := h.Open
		h.Open = func(power int, step slotstest.Step) (slotstest.Device, error) {
			stop()
			slots, err := files(power, step)
			if err != nil {
				return nil, err
			}
			var dev slotstest.Device
			dev, stop = serve(t, dir, vendor, slots)
			return dev, nil
		}
		return h
	})
}

// split is the client's side, with the store that the server reads.
type split struct {
	*apply.Client
	store shelf
}

func serve(t *testing.T, dir string, vendor *verifytest.Vendor, slots slotstest.Device) (slotstest.Device, func()) {
	store := shelf(filepath.Join(dir, "store"))
	must(t, "make the store", os.MkdirAll(string(store), 0o755))
	server, err := apply.NewServer(apply.Config{
		State: filepath.Join(dir, "state"), Door: vendor.DoorAt(t, filepath.Join(dir, "state")),
		Device: verify.Device{Product: "slotstest"}, Slots: wellSlots{slots}, Shelf: store,
	})
	must(t, "prepare the server", err)
	socket := filepath.Join(dir, "s")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	must(t, "listen", err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ctx, ln) }()
	client := apply.NewClient(socket)
	return split{client, store}, func() {
		client.Close()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the server ended with %v", err)
		}
	}
}

// wellSlots adds a health check that passes.
type wellSlots struct{ slotstest.Device }

func (wellSlots) Check(context.Context, install.SlotName, string) error { return nil }

func (wellSlots) Restore(context.Context, verify.Digest) error { return nil }

func (wellSlots) Forsake(context.Context, []verify.Digest) error { return nil }

func (s split) Write(ctx context.Context, rel *verify.Release, images []verify.Image, open install.Source, progress func(done, total int64)) error {
	if install.CheckImages(rel, images) == nil {
		if err := s.store.put(rel, images, open); err != nil {
			return err
		}
	}
	return s.Client.Write(ctx, rel, images, open, progress)
}

// shelf is a folder in the place of a store.
type shelf string

func (s shelf) path(d verify.Digest) string { return filepath.Join(string(s), d.String()) }

func (s shelf) put(rel *verify.Release, images []verify.Image, open install.Source) error {
	if err := os.WriteFile(s.path(rel.ID()), rel.Head(), 0o644); err != nil {
		return err
	}
	for _, img := range images {
		if err := os.Remove(s.path(img.SHA256)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		r, err := open(img)
		if err != nil {
			continue // it is missing, then
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		if err := os.WriteFile(s.path(img.SHA256), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (s shelf) UnverifiedHead(release verify.Digest) ([]byte, error) {
	return os.ReadFile(s.path(release))
}

func (s shelf) OpenUnverified(img verify.Image) (io.ReadCloser, error) {
	return os.Open(s.path(img.SHA256))
}
