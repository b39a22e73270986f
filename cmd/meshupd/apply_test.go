package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"meshupd/install"
	"meshupd/install/apply"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// half is a device whose slots are written by a real server, on real files, and a network half that was taken over: it
// owns the store and may say anything on the socket.
type half struct {
	kind   string // of the slots
	podman string // the engine of containers
	dir    string
	vendor *verifytest.Vendor
	sold   atomic.Int32
	cfg    Config
	socket string
	client *apply.Client
}

func newHalf(t *testing.T, health ...string) *half {
	t.Helper()
	return newHalfOf(t, "files", func(h *half) { h.cfg.Health.Command = health })
}

// newHalfWith makes one with slots of files; more may change its config.
func newHalfWith(t *testing.T, more func(*Config)) *half {
	t.Helper()
	return newHalfOf(t, "files", func(h *half) { more(&h.cfg) })
}

// newHalfOf makes one with slots of a kind; set may change its config.
func newHalfOf(t *testing.T, kind string, set func(*half)) *half {
	t.Helper()
	dir, err := os.MkdirTemp("", "half") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := &half{kind: kind, dir: dir, vendor: verifytest.NewVendor(t, "kiosk-a"), cfg: defaultConfig(), socket: filepath.Join(dir, "s")}
	h.cfg.Product, h.cfg.Trust, h.cfg.State = "kiosk-a", h.vendor.Anchor(), filepath.Join(dir, "net")
	h.cfg.Slots.Folder, h.cfg.Slots.Factory = filepath.Join(dir, "slots"), "1.0.0"
	h.cfg.Apply.Socket, h.cfg.Apply.State = h.socket, filepath.Join(dir, "own")
	h.cfg.Hooks.Dir = ""
	// What fails does so after a few rounds, and what passes has time on a busy machine.
	h.cfg.Health.Deadline, h.cfg.Health.Interval, h.cfg.Health.Retries = Duration(time.Minute), Duration(10*time.Millisecond), 2
	set(h)
	h.makeSlots(t)
	for _, name := range []string{"heads", "images"} {
		if err := os.MkdirAll(h.store(name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.serve(t)
	return h
}

func (h *half) serve(t *testing.T) {
	t.Helper()
	server, err := openApply(t.Context(), h.cfg, 0, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: h.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ctx, ln) }()
	h.client = apply.NewClient(h.socket)
	t.Cleanup(func() {
		h.client.Close()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the server ended with %v", err)
		}
	})
}

func (h *half) store(path ...string) string {
	return filepath.Join(append([]string{h.cfg.State, "store"}, path...)...)
}

func (h *half) headPath(id verify.Digest) string { return h.store("heads", id.String()+".head") }

func (h *half) imagePath(rel *verify.Release) string {
	return h.store("images", rel.Manifest().Images[0].SHA256.String())
}

// release makes one and puts it into the store as an honest daemon does.
func (h *half) release(t *testing.T, o verifytest.Opts) (*verify.Release, []byte) {
	t.Helper()
	if o.Size == 0 && !o.NoImages {
		o.Size = 1 << 20
	}
	if h.kind == "container" && !o.NoImages {
		path := filepath.Join(t.TempDir(), "archive")
		put(t, path, h.archive(byte(h.sold.Add(1))))
		o.Images = []verifytest.Image{{Name: "web", Path: path, Kind: verify.KindContainer}}
	}
	rel, images := h.vendor.VerifiedImages(t, o)
	put(t, h.headPath(rel.ID()), rel.Head())
	if len(images) == 0 {
		return rel, nil
	}
	put(t, h.imagePath(rel), images[0])
	return rel, images[0]
}

// put replaces what is there, whatever it is.
func put(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// ask says a line and returns the code of the last line of the answer; "" is ok, "cut" an answer that ended without one.
func (h *half) ask(t *testing.T, line string) verify.Code {
	t.Helper()
	c, err := net.Dial("unix", h.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintln(c, line)
	in := bufio.NewScanner(c)
	for in.Scan() {
		var a struct {
			Total  int64
			End    bool
			Code   verify.Code
			Detail string
		}
		if err := json.Unmarshal(in.Bytes(), &a); err != nil {
			t.Fatalf("the server says %q", in.Bytes())
		}
		switch {
		case a.End && a.Code == "" && a.Detail != "":
			t.Fatalf("an error without a code: %s", a.Detail)
		case a.End:
			return a.Code
		case a.Total > 0:
			fmt.Fprintln(c, `{"go":true}`)
		}
	}
	return "cut"
}

func (h *half) askWrite(t *testing.T, id verify.Digest) verify.Code {
	t.Helper()
	return h.ask(t, `{"do":"write","release":"`+id.String()+`"}`)
}

func (h *half) slotB(t *testing.T) install.Content {
	t.Helper()
	st, err := apply.NewClient(h.socket).State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return st.Slots[install.SlotB]
}

// honest shows that the server still does what it should.
func (h *half) honest(t *testing.T) {
	t.Helper()
	rel, data := h.release(t, verifytest.Opts{})
	if code := h.askWrite(t, rel.ID()); code != "" {
		t.Fatalf("afterwards an honest release is refused: %s", code)
	}
	if err := h.holds(rel, data); err != nil || h.slotB(t).Release != rel.ID() {
		t.Fatalf("afterwards an honest release is not in the slot: %v", err)
	}
}

// unchecked makes a release and puts its head into the store without asking a door.
func (h *half) unchecked(t *testing.T, vendor *verifytest.Vendor, o verifytest.Opts) verify.Digest {
	t.Helper()
	bundle, err := verify.OpenFolder(vendor.Release(t, o))
	must(t, err)
	id := verify.Digest(sha256.Sum256(bundle.Head().UnverifiedManifest()))
	put(t, h.headPath(id), bundle.Head().Bytes())
	return id
}

func mk(t *testing.T, path string, make func(path string) error) {
	t.Helper()
	if err := errors.Join(os.RemoveAll(path), make(path)); err != nil {
		t.Fatal(err)
	}
}

func sparse(size int64) func(string) error {
	return func(path string) error {
		f, err := os.Create(path)
		if err != nil {
			return err
		}
		return errors.Join(f.Truncate(size), f.Close())
	}
}

// A network half that lies in every message gets nothing unsigned and nothing old into a slot, and the next honest
// request is answered.
func TestApplyIsLiedTo(t *testing.T) {
	fifo := func(path string) error { return syscall.Mkfifo(path, 0o666) }
	device := func(path string) error {
		err := syscall.Mknod(path, syscall.S_IFCHR|0o666, 1<<8|5) // /dev/zero
		if errors.Is(err, syscall.EPERM) {
			return fifo(path)
		}
		return err
	}
	other := verifytest.NewVendor(t, "kiosk-a")
	elsewhere := verifytest.NewVendor(t, "kiosk-b")
	for _, tt := range []struct {
		name string
		want verify.Code
		lie  func(t *testing.T, h *half) verify.Code
	}{
		{"an unsigned head", verify.CodeSigNone, func(t *testing.T, h *half) verify.Code {
			return h.askWrite(t, h.unchecked(t, h.vendor, verifytest.Opts{Unsigned: true}))
		}},
		{"a head that a stranger signed", verify.CodeSigKey, func(t *testing.T, h *half) verify.Code {
			return h.askWrite(t, h.unchecked(t, other, verifytest.Opts{}))
		}},
		{"a head for another product", verify.CodeSigKey, func(t *testing.T, h *half) verify.Code {
			return h.askWrite(t, h.unchecked(t, elsewhere, verifytest.Opts{}))
		}},
		{"a flipped head", verify.CodeDigest, func(t *testing.T, h *half) verify.Code {
			rel, _ := h.release(t, verifytest.Opts{})
			put(t, h.headPath(rel.ID()), bytes.Replace(rel.Head(), []byte(`"seq"`), []byte(`"seQ"`), 1))
			return h.askWrite(t, rel.ID())
		}},
		{"the head of another release", verify.CodeDigest, func(t *testing.T, h *half) verify.Code {
			old, _ := h.release(t, verifytest.Opts{})
			rel, _ := h.release(t, verifytest.Opts{})
			put(t, h.headPath(rel.ID()), old.Head())
			return h.askWrite(t, rel.ID())
		}},
		{"an older release than accepted", verify.CodeOrder, func(t *testing.T, h *half) verify.Code {
			old, _ := h.release(t, verifytest.Opts{})
			rel, _ := h.release(t, verifytest.Opts{})
			if code := h.ask(t, `{"do":"learn","release":"`+rel.ID().String()+`"}`); code != "" {
				t.Fatal(code)
			}
			return h.askWrite(t, old.ID())
		}},
		{"an older release as news", verify.CodeOrder, func(t *testing.T, h *half) verify.Code {
			old, _ := h.release(t, verifytest.Opts{})
			rel, _ := h.release(t, verifytest.Opts{})
			h.ask(t, `{"do":"learn","release":"`+rel.ID().String()+`"}`)
			return h.ask(t, `{"do":"learn","release":"`+old.ID().String()+`"}`)
		}},
		{"a release that was recalled", verify.CodeRecalled, func(t *testing.T, h *half) verify.Code {
			bad, _ := h.release(t, verifytest.Opts{})
			recall, _ := h.release(t, verifytest.Opts{Recalls: []verify.Digest{bad.ID()}, NoImages: true})
			h.ask(t, `{"do":"learn","release":"`+recall.ID().String()+`"}`)
			return h.askWrite(t, bad.ID())
		}},
		{"trying a slot whose release was recalled", verify.CodeRecalled, func(t *testing.T, h *half) verify.Code {
			bad, _ := h.release(t, verifytest.Opts{})
			if code := h.askWrite(t, bad.ID()); code != "" {
				t.Fatal(code)
			}
			recall, _ := h.release(t, verifytest.Opts{Recalls: []verify.Digest{bad.Manifest().Images[0].SHA256}, NoImages: true})
			h.ask(t, `{"do":"learn","release":"`+recall.ID().String()+`"}`)
			os.RemoveAll(h.headPath(bad.ID()))
			return h.ask(t, `{"do":"try","slot":"b"}`)
		}},
		{"trying a slot that is not whole", verify.CodeBoot, func(t *testing.T, h *half) verify.Code {
			return h.ask(t, `{"do":"try","slot":"b"}`)
		}},
		{"confirming what was never tried", verify.CodeBoot, func(t *testing.T, h *half) verify.Code {
			return h.ask(t, `{"do":"confirm"}`)
		}},
		{"a head that is not there", verify.CodeIO, func(t *testing.T, h *half) verify.Code {
			return h.askWrite(t, verify.Digest{1})
		}},
		{"a head of no bytes", verify.CodeTruncated, headIs(sparse(0))},
		{"a huge head", verify.CodeSize, headIs(sparse(1 << 40))},
		{"a head that is a link", verify.CodeBundle, headIs(func(path string) error { return os.Symlink("/etc/passwd", path) })},
		{"a head that is a pipe", verify.CodeBundle, headIs(fifo)},
		{"a head that is a device", verify.CodeBundle, headIs(device)},
		{"a head that is a folder", verify.CodeBundle, headIs(func(path string) error { return os.Mkdir(path, 0o755) })},
		{"a folder of heads that is a link", verify.CodeIO, func(t *testing.T, h *half) verify.Code {
			rel, _ := h.release(t, verifytest.Opts{})
			must(t, os.Rename(h.store("heads"), h.store("h2")))
			must(t, os.Symlink(h.store("h2"), h.store("heads")))
			defer func() {
				must(t, os.Remove(h.store("heads")))
				must(t, os.Rename(h.store("h2"), h.store("heads")))
			}()
			return h.askWrite(t, rel.ID())
		}},
		{"a store that is a link", verify.CodeIO, func(t *testing.T, h *half) verify.Code {
			rel, _ := h.release(t, verifytest.Opts{})
			away := filepath.Join(h.cfg.State, "s2")
			must(t, os.Rename(h.store(), away))
			must(t, os.Symlink(away, h.store()))
			defer func() {
				must(t, os.Remove(h.store()))
				must(t, os.Rename(away, h.store()))
			}()
			return h.askWrite(t, rel.ID())
		}},
		{"other bytes of the same size", verify.CodeDigest, imageIs(sparse(1 << 20))},
		{"an image cut short", verify.CodeTruncated, imageIs(sparse(1<<20 - 1))},
		{"an image with a byte more", verify.CodeSize, imageIs(sparse(1<<20 + 1))},
		{"a huge image without blocks", verify.CodeSize, imageIs(sparse(1 << 42))},
		{"an image that is a link to the right bytes", verify.CodeBundle, func(t *testing.T, h *half) verify.Code {
			rel, data := h.release(t, verifytest.Opts{})
			put(t, h.store("images", "x"), data)
			mk(t, h.imagePath(rel), func(path string) error { return os.Symlink(h.store("images", "x"), path) })
			return h.askWrite(t, rel.ID())
		}},
		{"an image that is a pipe", verify.CodeBundle, imageIs(fifo)},
		{"an image that is a device", verify.CodeBundle, imageIs(device)},
		{"no image", verify.CodeIO, imageIs(func(string) error { return nil })},
		{"a path as a release", verify.CodeFormat, says(`{"do":"write","release":"../../../../../../../../../../../../../../../../../etc/passwd"}`)},
		{"a release of zeros", verify.CodeFormat, says(`{"do":"write","release":"` + strings.Repeat("0", 64) + `"}`)},
		{"a verdict beside the release", verify.CodeFormat, says(`{"do":"write","release":"` + strings.Repeat("a", 64) + `","verified":true}`)},
		{"bytes beside the release", verify.CodeFormat, says(`{"do":"write","release":"` + strings.Repeat("a", 64) + `","image":"AAAA"}`)},
		{"a claim of health", verify.CodeFormat, says(`{"do":"confirm","healthy":true}`)},
		{"a slot that is a path", verify.CodeBoot, says(`{"do":"try","slot":"../a"}`)},
		{"a slot to write to", verify.CodeFormat, says(`{"do":"write","release":"` + strings.Repeat("a", 64) + `","slot":"a"}`)},
		{"an unknown verb", verify.CodeFormat, says(`{"do":"erase"}`)},
		{"two requests in one line", verify.CodeFormat, says(`{"do":"state"}{"do":"restart"}`)},
		{"garbage", verify.CodeFormat, says("\x00\xff\x7fELF")},
		{"an empty line", verify.CodeFormat, says("")},
		{"an oversized line", "cut", says(`{"do":"` + strings.Repeat("x", 1<<20) + `"}`)},
		{"an answer to nothing", verify.CodeFormat, says(`{"go":true}`)},
		{"a request without an end, and many of them", "", manyHalves},
		{"a second request inside a write", "", talksOver},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHalf(t, "true")
			before := h.slotB(t)
			if got := tt.lie(t, h); got != tt.want {
				t.Errorf("the answer is %q, not %q", got, tt.want)
			}
			if now := h.slotB(t); now.Whole && now != before && tt.want != verify.CodeRecalled {
				t.Errorf("slot b now holds %+v", now)
			}
			if st, _ := h.client.State(t.Context()); st.Phase != install.PhaseSettled {
				t.Errorf("the slots are %s", st.Phase)
			}
			h.honest(t)
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func says(line string) func(*testing.T, *half) verify.Code {
	return func(t *testing.T, h *half) verify.Code { return h.ask(t, line) }
}

func headIs(what func(string) error) func(*testing.T, *half) verify.Code {
	return func(t *testing.T, h *half) verify.Code {
		rel, _ := h.release(t, verifytest.Opts{})
		mk(t, h.headPath(rel.ID()), what)
		return h.askWrite(t, rel.ID())
	}
}

func imageIs(what func(string) error) func(*testing.T, *half) verify.Code {
	return func(t *testing.T, h *half) verify.Code {
		rel, _ := h.release(t, verifytest.Opts{})
		mk(t, h.imagePath(rel), what)
		return h.askWrite(t, rel.ID())
	}
}

// manyHalves opens more connections than are served, each with half a line, and waits until the server has had enough.
func manyHalves(t *testing.T, h *half) verify.Code {
	var all []net.Conn
	for range 40 {
		c, err := net.Dial("unix", h.socket)
		must(t, err)
		defer c.Close()
		fmt.Fprint(c, `{"do":"sta`)
		all = append(all, c)
	}
	for _, c := range all {
		if n, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("half a line was answered with %d bytes", n)
		}
	}
	return ""
}

// talksOver does not keep to its turn: the write is stopped.
func talksOver(t *testing.T, h *half) verify.Code {
	rel, _ := h.release(t, verifytest.Opts{})
	c, err := net.Dial("unix", h.socket)
	must(t, err)
	defer c.Close()
	fmt.Fprintf(c, "{\"do\":\"write\",\"release\":%q}\n", rel.ID())
	in := bufio.NewScanner(c)
	for in.Scan() && !strings.Contains(in.Text(), "total") {
	}
	fmt.Fprintln(c, `{"do":"restart"}`)
	for in.Scan() && !strings.Contains(in.Text(), `"end":true`) {
	}
	if !strings.Contains(in.Text(), "canceled") {
		t.Errorf("the last line is %s", in.Text())
	}
	return ""
}

// The bytes are swapped all the time, between those that were signed and others, by rename and in place: what counts as
// whole was hashed while it was written and read back, so no swap gets through.
func TestApplyWhileTheImageIsSwapped(t *testing.T) {
	podman := fakePodman(t)
	for _, kind := range []string{"files", "block", "command", "container"} {
		t.Run(kind, func(t *testing.T) { swapped(t, newHalfOf(t, kind, func(h *half) { h.podman = podman })) })
	}
}

func swapped(t *testing.T, h *half) {
	rel, good := h.release(t, verifytest.Opts{Size: 1 << 20})
	evil := h.evil(good)
	path := h.imagePath(rel)
	stop, swaps := make(chan struct{}), 0
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for ; ; swaps++ {
			select {
			case <-stop:
				if swaps >= 1000 {
					return
				}
			default:
			}
			data := good
			if swaps%2 == 0 {
				data = evil
			}
			if swaps%3 == 0 {
				if f, err := os.OpenFile(path, os.O_WRONLY, 0); err == nil {
					f.WriteAt(data[len(data)/2:], int64(len(data)/2))
					f.Close()
				}
				continue
			}
			os.WriteFile(path+".x", data, 0o644)
			os.Rename(path+".x", path)
		}
	}()
	wrote, refused := 0, 0
	for range 40 {
		code := h.askWrite(t, rel.ID())
		c := h.slotB(t)
		if code != "" {
			refused++
			if c.Whole {
				t.Fatalf("refused with %s, and the slot counts as whole", code)
			}
			continue
		}
		wrote++
		if err := h.holds(rel, good); err != nil {
			t.Fatalf("the slot counts as whole and does not hold the signed bytes (%v)", err)
		}
	}
	close(stop)
	wg.Wait()
	t.Logf("%d swaps; %d writes went well, %d were refused, 0 wrong", swaps, wrote, refused)
	if refused == 0 {
		t.Error("no swap was noticed")
	}
	h.honest(t)
	h.sawOnly(t, good)
}

// The server asks the health command itself, whatever it is told.
func TestApplyConfirmsNothingUnhealthy(t *testing.T) {
	h := newHalf(t, "sh", "-c", "echo no answer on port 9100 >&2; exit 1")
	rel, _ := h.release(t, verifytest.Opts{})
	for _, line := range []string{`{"do":"write","release":"` + rel.ID().String() + `"}`, `{"do":"try","slot":"b"}`, `{"do":"restart"}`} {
		if code := h.ask(t, line); code != "" {
			t.Fatalf("%s: %s", line, code)
		}
	}
	for range 2 {
		if code := h.ask(t, `{"do":"confirm"}`); code != verify.CodeHealth {
			t.Fatalf("confirm: %q", code)
		}
	}
	st, err := h.client.State(t.Context())
	must(t, err)
	if st.Phase != install.PhaseTrial || st.Default != install.SlotA {
		t.Fatalf("the state is %+v", st)
	}
}

// Releases that are older than the newest still get in where a signature says so: as a stepping stone to it, and when what
// runs was withdrawn. Nothing else does.
func TestApplyTakesSteppingStones(t *testing.T) {
	h := newHalf(t, "true")
	aside, _ := h.release(t, verifytest.Opts{Version: "1.9.0"})
	stone, _ := h.release(t, verifytest.Opts{Version: "2.0.0"})
	goal, _ := h.release(t, verifytest.Opts{Version: "3.0.0", Requires: ">=2.0.0", Via: &verify.Via{Version: "2.0.0", SHA256: stone.ID()}})
	must(t, h.client.Learn(t.Context(), goal.ID()))
	for _, step := range []struct {
		rel  *verify.Release
		want verify.Code
	}{{goal, verify.CodeRequires}, {aside, verify.CodeOrder}, {stone, ""}} {
		if code := h.askWrite(t, step.rel.ID()); code != step.want {
			t.Fatalf("%s: %q, not %q", step.rel.Manifest().Version, code, step.want)
		}
	}
	confirm := func(slot string) {
		t.Helper()
		for _, line := range []string{`{"do":"try","slot":"` + slot + `"}`, `{"do":"restart"}`, `{"do":"confirm"}`} {
			if code := h.ask(t, line); code != "" {
				t.Fatalf("%s: %s", line, code)
			}
		}
	}
	confirm("b")
	if code := h.askWrite(t, goal.ID()); code != "" {
		t.Fatalf("the goal, once the stone runs: %s", code)
	}
	confirm("a")

	recall, _ := h.release(t, verifytest.Opts{Version: "3.0.1", Recalls: []verify.Digest{goal.ID()}, NoImages: true})
	if code := h.askWrite(t, stone.ID()); code == "" {
		t.Fatal("back to an older version, and nothing was withdrawn")
	}
	must(t, h.client.Learn(t.Context(), recall.ID()))
	if code := h.askWrite(t, stone.ID()); code != "" {
		t.Fatalf("away from what was withdrawn: %s", code)
	}
}

// A caller of another user than the daemon's is not listened to.
func TestApplyKnowsItsCallers(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("needs root")
		}
		t.Skip("needs root, to be another user")
	}
	nobody, err := user.Lookup("nobody")
	must(t, err)
	h := newHalf(t, "true")
	must(t, os.Chmod(filepath.Dir(h.socket), 0o755))
	must(t, os.Chmod(h.socket, 0o666))
	if out := asUser(t, nobody, h.socket, `{"do":"state"}`); !strings.Contains(out, string(verify.CodePermission)) {
		t.Fatalf("user nobody is answered with %q", out)
	}
	h.honest(t)
}

// asUser asks from a thread of its own that is this user, and ends with the answer.
func asUser(t *testing.T, u *user.User, socket, line string) string {
	t.Helper()
	var uid uintptr
	if _, err := fmt.Sscan(u.Uid, &uid); err != nil {
		t.Fatal(err)
	}
	answer := make(chan string, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, uid, uid, uid); errno != 0 {
			answer <- errno.Error()
			return
		}
		c, err := net.Dial("unix", socket)
		if err != nil {
			answer <- err.Error()
			return
		}
		defer c.Close()
		fmt.Fprintln(c, line)
		all, _ := io.ReadAll(c)
		answer <- string(all)
	}()
	return <-answer
}

// Older versions are kept and brought back by root's half, which looks at what was withdrawn by itself.
func TestApplyGoesBackToAKeptVersion(t *testing.T) {
	h := newHalfWith(t, func(cfg *Config) { cfg.Slots.Keep = 2 })
	restore := func(rel *verify.Release) verify.Code {
		return h.ask(t, `{"do":"restore","release":"`+rel.ID().String()+`"}`)
	}
	kept := func() (out []verify.Digest) {
		st, err := apply.NewClient(h.socket).State(t.Context())
		must(t, err)
		for _, c := range st.Kept {
			out = append(out, c.Release)
		}
		return out
	}
	var rels []*verify.Release
	for range 4 {
		rel, _ := h.release(t, verifytest.Opts{})
		rels = append(rels, rel)
		for _, line := range []string{`{"do":"write","release":"` + rel.ID().String() + `"}`, `{"do":"try","slot":"` + string([]string{"b", "a"}[(len(rels)-1)%2]) + `"}`, `{"do":"restart"}`, `{"do":"confirm"}`} {
			if code := h.ask(t, line); code != "" {
				t.Fatalf("%s: %s", line, code)
			}
		}
	}
	if got := kept(); len(got) != 2 || got[0] != rels[1].ID() || got[1] != rels[0].ID() {
		t.Fatalf("%v are kept", got)
	}
	if code := restore(rels[3]); code != verify.CodeNotFound {
		t.Errorf("what is not kept: %q", code)
	}
	if code := restore(rels[0]); code != "" {
		t.Fatalf("what is kept: %q", code)
	}
	if code := h.ask(t, `{"do":"try","slot":"b"}`); code != "" {
		t.Fatalf("and tried: %q", code)
	}
	if code := h.ask(t, `{"do":"try","slot":"a"}`); code != "" {
		t.Fatal(code)
	}
	recall, _ := h.release(t, verifytest.Opts{Recalls: []verify.Digest{rels[1].ID()}, NoImages: true})
	if code := h.ask(t, `{"do":"learn","release":"`+recall.ID().String()+`"}`); code != "" {
		t.Fatal(code)
	}
	if got := kept(); len(got) != 1 || got[0] != rels[2].ID() {
		t.Errorf("after a recall %v are kept", got)
	}
	if code := restore(rels[1]); code != verify.CodeRecalled {
		t.Errorf("what was withdrawn: %q", code)
	}
}
