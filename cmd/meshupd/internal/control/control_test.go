package control_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/control/controltest"
	"meshupd/verify"
	"meshupd/verify/publish"
)

// deadline is generous: it only ends a test that hangs.
const deadline = 30 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// site is a served backend and a client to it.
type site struct {
	*controltest.Backend
	client *control.Client
	socket string
	stop   func()
}

func serve(t *testing.T, s controltest.Scenario, idle time.Duration) *site {
	t.Helper()
	b, err := controltest.New(s, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return serveBackend(t, b, b, idle)
}

// serveBackend serves what stands before b.
func serveBackend(t *testing.T, b *controltest.Backend, front control.Backend, idle time.Duration) *site {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := control.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	server := control.NewServer(control.ServerConfig{Backend: front, ImportIdle: idle, Version: control.VersionInfo{Version: "1.2.3"}})
	go func() { done <- server.Serve(ctx, ln) }()
	client := control.NewClient(socket)
	stopped := false
	st := &site{b, client, socket, func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	}}
	t.Cleanup(func() { client.Close(); st.stop() })
	return st
}

// release makes a signed release of one image and returns trust folder, head and image.
func release(t *testing.T, version string) (trust string, head, image []byte) {
	t.Helper()
	dir := t.TempDir()
	trust = filepath.Join(dir, "trust")
	key, err := publish.NewKey(publish.KeyOptions{Name: "Acme"})
	if err != nil {
		t.Fatal(err)
	}
	if err := publish.InitTrust(trust, publish.TrustOptions{Product: "kiosk-a", Root: []*verify.Certificate{key.Certificate()},
		Signers: []*publish.SecretKey{key}}); err != nil {
		t.Fatal(err)
	}
	image = bytes.Repeat([]byte("meshupd "), 40_000)
	path := filepath.Join(dir, "rootfs.img")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := publish.Create(t.Context(), publish.Options{Out: dir, Trust: trust, Version: version, Images: []publish.ImageInput{{Path: path}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := publish.Sign(out, key); err != nil {
		t.Fatal(err)
	}
	bundle, err := verify.OpenFolder(out)
	if err != nil {
		t.Fatal(err)
	}
	defer bundle.Close()
	return trust, bundle.Head().Bytes(), image
}

func kiosk(trust string) controltest.Scenario {
	return controltest.Scenario{Anchor: trust, Device: verify.Device{Product: "kiosk-a", Channel: "stable"}}
}

func TestStatusFillsInWhatTheDaemonLeavesOut(t *testing.T) {
	s := serve(t, controltest.Scenario{Statuses: []control.SiteStatus{{Devices: []control.DeviceStatus{
		{ID: "a", State: control.StateConfirmed}, {ID: "b", State: control.StateConfirmed}, {ID: "c", State: control.StateSilent}}}}}, 0)
	st, err := s.client.Status(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if st.Schema != control.StatusSchema || st.Generation == 0 || st.Counts[control.StateConfirmed] != 2 || st.Counts[control.StateSilent] != 1 {
		t.Errorf("got %+v", st)
	}
}

// A long-poll answers when something changes, and not before.
func TestLongPoll(t *testing.T) {
	s := serve(t, controltest.Scenario{Statuses: []control.SiteStatus{{Observer: "one"}, {Observer: "two"}}}, 0)
	first, err := s.client.Status(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	type result struct {
		st  control.SiteStatus
		err error
	}
	got := make(chan result, 1)
	go func() {
		st, err := s.client.Status(t.Context(), first.Generation)
		got <- result{st, err}
	}()
	s.Step()
	select {
	case r := <-got:
		if r.err != nil || r.st.Observer != "two" || r.st.Generation == first.Generation {
			t.Errorf("got %+v, %v", r.st, r.err)
		}
	case <-time.After(deadline):
		t.Fatal("the poll did not end with the change")
	}
}

// A stop does not wait for those who poll.
func TestStopEndsLongPolls(t *testing.T) {
	s := serve(t, controltest.Scenario{}, 0)
	first, err := s.client.Status(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		_, err := s.client.Status(t.Context(), first.Generation)
		got <- err
	}()
	s.stop()
	select {
	case err := <-got:
		if verify.CodeOf(err) != verify.CodeDaemon {
			t.Errorf("got %v, want %s", err, verify.CodeDaemon)
		}
	case <-time.After(deadline):
		t.Fatal("the poll outlived the server")
	}
}

func TestImport(t *testing.T) {
	trust, head, image := release(t, "2.4.0")
	s := serve(t, kiosk(trust), 0)
	info, err := s.client.OpenImport(t.Context(), head)
	if err != nil {
		t.Fatal(err)
	}
	if info.Release.Version != "2.4.0" || len(info.Images) != 1 || info.Images[0].Have || info.Images[0].Size != int64(len(image)) {
		t.Fatalf("got %+v", info)
	}
	if err := s.client.Commit(t.Context(), info.ID); verify.CodeOf(err) != verify.CodeBundle {
		t.Errorf("commit before the image: %v", err)
	}
	bad := bytes.Clone(image)
	bad[len(bad)/2] ^= 1
	if err := s.client.Put(t.Context(), info.ID, info.Images[0], bytes.NewReader(bad)); verify.CodeOf(err) != verify.CodeDigest {
		t.Errorf("a flipped bit: %v", err)
	}
	if err := s.client.Put(t.Context(), info.ID, info.Images[0], bytes.NewReader(image)); err != nil {
		t.Fatal(err)
	}
	if err := s.client.Commit(t.Context(), info.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.client.Commit(t.Context(), info.ID); verify.CodeOf(err) != verify.CodeNotFound {
		t.Errorf("a second commit: %v", err)
	}
	if calls := s.Calls(); len(calls) != 1 || calls[0] != "import 2.4.0" {
		t.Errorf("calls: %v", calls)
	}
}

// countingReader notices whether anyone read the image.
type countingReader struct {
	io.Reader
	n atomic.Int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// A refusal comes before the bytes: a stick of gigabytes is not read for nothing.
func TestRefusalComesBeforeTheBytes(t *testing.T) {
	trust, head, image := release(t, "2.4.0")
	s := serve(t, kiosk(trust), 0)
	info, err := s.client.OpenImport(t.Context(), head)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		id   string
		img  control.ImportImage
		code verify.Code
	}{
		{"unknown import", "nope", info.Images[0], verify.CodeNotFound},
		{"unknown image", info.ID, control.ImportImage{Size: int64(len(image))}, verify.CodeBundle},
		{"other size", info.ID, control.ImportImage{Digest: info.Images[0].Digest, Size: 5}, verify.CodeSize},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &countingReader{Reader: bytes.NewReader(image)}
			if err := s.client.Put(t.Context(), tt.id, tt.img, r); verify.CodeOf(err) != tt.code {
				t.Errorf("got %v, want %s", err, tt.code)
			}
			if n := r.n.Load(); n != 0 {
				t.Errorf("%d bytes were read", n)
			}
		})
	}
}

// The daemon's refusal comes through whole: code, words, missing bytes.
func TestRefusalsAreReproduced(t *testing.T) {
	trust, head, image := release(t, "2.4.0")
	scenario := kiosk(trust)
	scenario.Free = 1000
	s := serve(t, scenario, 0)
	_, err := s.client.OpenImport(t.Context(), head)
	var refusal *verify.Refusal
	if !errors.As(err, &refusal) || refusal.Code != verify.CodeSpace || refusal.NeedBytes != int64(len(image))-1000 || refusal.Detail == "" {
		t.Errorf("got %#v", err)
	}
	if _, err := s.client.OpenImport(t.Context(), head[:len(head)/2]); verify.CodeOf(err) != verify.CodeTruncated {
		t.Errorf("half a head: %v", err)
	}
	if _, err := s.client.OpenImport(t.Context(), make([]byte, verify.MaxHead+1)); verify.CodeOf(err) != verify.CodeSize {
		t.Errorf("a head that is too large: %v", err)
	}
}

// failingReader is a stick that is pulled out mid-copy.
type failingReader struct{ left int }

var errPulled = errors.New("the stick is gone")

func (f *failingReader) Read(p []byte) (int, error) {
	if f.left == 0 {
		return 0, errPulled
	}
	n := min(f.left, len(p))
	f.left -= n
	return n, nil
}

func TestPulledStick(t *testing.T) {
	trust, head, image := release(t, "2.4.0")
	s := serve(t, kiosk(trust), 0)
	info, err := s.client.OpenImport(t.Context(), head)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.client.Put(t.Context(), info.ID, info.Images[0], &failingReader{100_000}); !errors.Is(err, errPulled) {
		t.Errorf("got %v, want the source's own error", err)
	}
	// The server may still be busy with the broken call; then it says so, and only for that long.
	for err = errPulled; err != nil; {
		err = s.client.Put(t.Context(), info.ID, info.Images[0], bytes.NewReader(image))
		if err != nil && verify.CodeOf(err) != verify.CodeBusy {
			t.Fatal(err)
		}
	}
}

// fullDisk refuses each image at its first byte.
type fullDisk struct{ control.Backend }

type fullImport struct{ control.Import }

func (b fullDisk) OpenImport(ctx context.Context, head *verify.UnverifiedHead, by control.Who) (control.Import, error) {
	imp, err := b.Backend.OpenImport(ctx, head, by)
	return fullImport{imp}, err
}

func (fullImport) Put(_ context.Context, _ verify.Digest, r io.Reader) error {
	if _, err := r.Read(make([]byte, 1)); err != nil {
		return err
	}
	return &verify.Refusal{Code: verify.CodeSpace, Detail: "no room", NeedBytes: 7}
}

// A daemon that refuses an image while it is being sent is heard, and not only the broken pipe that it leaves behind.
func TestRefusalIsHeardWhileSending(t *testing.T) {
	trust, head, image := release(t, "2.4.0")
	b, err := controltest.New(kiosk(trust), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	s := serveBackend(t, b, fullDisk{b}, 0)
	info, err := s.client.OpenImport(t.Context(), head)
	if err != nil {
		t.Fatal(err)
	}
	for range 200 {
		err := s.client.Put(t.Context(), info.ID, info.Images[0], bytes.NewReader(image))
		var refusal *verify.Refusal
		if !errors.As(err, &refusal) || refusal.Code != verify.CodeSpace || refusal.NeedBytes != 7 {
			t.Fatalf("got %v, want the daemon's refusal", err)
		}
	}
	// The refused call is over for the daemon too.
	if err := s.client.Abort(t.Context(), info.ID); err != nil {
		t.Error(err)
	}
}

// A caller that goes away does not keep its place.
func TestIdleImportIsAborted(t *testing.T) {
	trust, head, _ := release(t, "2.4.0")
	s := serve(t, kiosk(trust), 50*time.Millisecond)
	info, err := s.client.OpenImport(t.Context(), head)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Aborted:
	case <-time.After(deadline):
		t.Fatal("the import was not aborted")
	}
	if err := s.client.Commit(t.Context(), info.ID); verify.CodeOf(err) != verify.CodeNotFound {
		t.Errorf("commit after the end: %v", err)
	}
}

func TestImportsAreFew(t *testing.T) {
	trust, head, _ := release(t, "2.4.0")
	s := serve(t, kiosk(trust), 0)
	var ids []string
	for {
		info, err := s.client.OpenImport(t.Context(), head)
		if verify.CodeOf(err) == verify.CodeBusy {
			break
		}
		if err != nil || len(ids) > 100 {
			t.Fatalf("import %d: %v", len(ids), err)
		}
		ids = append(ids, info.ID)
	}
	if err := s.client.Abort(t.Context(), ids[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.OpenImport(t.Context(), head); err != nil {
		t.Errorf("after one ended: %v", err)
	}
	// The rest end with the server.
	s.stop()
	for range ids {
		select {
		case <-s.Aborted:
		case <-time.After(deadline):
			t.Fatal("an import outlived the server")
		}
	}
}

func TestNoDaemon(t *testing.T) {
	dir := t.TempDir()
	c := control.NewClient(filepath.Join(dir, "none"))
	if _, err := c.Status(t.Context(), 0); verify.CodeOf(err) != verify.CodeDaemon {
		t.Errorf("no socket: %v", err)
	}
	// A socket that a killed daemon left behind.
	path := filepath.Join(dir, "left")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	_ = ln.Close()
	if _, err := control.NewClient(path).Status(t.Context(), 0); verify.CodeOf(err) != verify.CodeDaemon {
		t.Errorf("dead socket: %v", err)
	}
	again, err := control.Listen(path)
	if err != nil {
		t.Fatalf("a dead socket is in the way: %v", err)
	}
	defer again.Close()
	if _, err := control.Listen(path); verify.CodeOf(err) != verify.CodeBusy {
		t.Errorf("a second daemon: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := control.Listen(file); verify.CodeOf(err) != verify.CodeConfig {
		t.Errorf("a file in the way: %v", err)
	}
}

// Something else on the socket, or a hostile one, is an error and no more.
func TestStrangeServer(t *testing.T) {
	for name, answer := range map[string]string{
		"no json":      "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
		"no reason":    "HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\n{}",
		"strange code": "HTTP/1.1 422 No\r\nConnection: close\r\n\r\n" + `{"error":{"code":"\u001b[2J","detail":"words"}}`,
		"hangs up":     "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			ln, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				c, err := ln.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				_, _ = http.ReadRequest(bufio.NewReader(c))
				_, _ = io.WriteString(c, answer)
			}()
			client := control.NewClient(path)
			defer client.Close()
			_, err = client.Status(t.Context(), 0)
			if code := verify.CodeOf(err); err == nil || code != "" && code != verify.CodeDaemon {
				t.Errorf("got %v", err)
			}
			_ = ln.Close()
			<-done
		})
	}
}

func TestSocketIsOpenToReaders(t *testing.T) {
	s := serve(t, controltest.Scenario{}, 0)
	info, err := os.Stat(s.socket)
	if err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	v, err := s.client.Version(t.Context())
	if err != nil || v.Version != "1.2.3" || v.Schema != control.VersionSchema {
		t.Errorf("got %+v, %v", v, err)
	}
	if err := s.client.Rollback(t.Context(), "2.3.1"); err != nil {
		t.Fatal(err)
	}
	if calls := s.Calls(); len(calls) != 1 || !strings.Contains(calls[0], "uid ") || !strings.HasSuffix(calls[0], " to 2.3.1") {
		t.Errorf("calls: %v", calls)
	}
}
