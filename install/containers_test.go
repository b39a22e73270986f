package install_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"meshupd/install"
	"meshupd/install/ocitest"
	"meshupd/install/slotstest"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// TestContainersConform tells the stories and faults of every kind of slots to Containers, over an engine in memory.
func TestContainersConform(t *testing.T) {
	archives := &archiveBook{known: make(map[verify.Digest]verify.Digest)}
	slotstest.Run(t, func(t *testing.T) slotstest.Harness {
		dir, engine := t.TempDir(), &install.FakeEngine{}
		// What the factory loaded has no archive; the suite only compares it with itself.
		engine.Images = map[string]verify.Digest{"localhost/meshupd/image0.img:a": {1}}
		engine.Run = map[string]install.FakeContainer{}
		cfg := install.ContainersConfig{Dir: dir, Engine: engine, FactoryVersion: "1.0.0",
			Services: map[string]install.Service{"image0.img": {}, "image1.img": {Args: []string{"--name-{slot}"}}}}
		return slotstest.Harness{
			Images: 2, Kind: verify.KindContainer, Content: archives.pack,
			Open: func(power int, step slotstest.Step) (slotstest.Device, error) {
				engine.Power(power)
				cfg.BootID = func() (string, error) { return "power-" + strconv.Itoa(power), nil }
				return install.OpenContainers(t.Context(), install.ContainersWith(cfg, step, nil))
			},
			Pointed: func() install.SlotName {
				target, err := os.Readlink(filepath.Join(dir, "current"))
				if errors.Is(err, os.ErrNotExist) {
					return install.SlotA // not opened yet
				}
				if err != nil {
					t.Fatal(err)
				}
				return install.SlotName(target)
			},
			Holds: func(slot install.SlotName) map[string]verify.Digest { return archives.holds(engine, slot) },
		}
	})
}

// archiveBook knows which archive an image came from.
type archiveBook struct {
	mu    sync.Mutex
	known map[verify.Digest]verify.Digest // archive by config
}

func (b *archiveBook) pack(file []byte) []byte {
	img := ocitest.Image{File: file}
	archive := img.Archive()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.known[sha256.Sum256(img.Blobs()[1].Data)] = sha256.Sum256(archive)
	return archive
}

func (b *archiveBook) holds(engine *install.FakeEngine, slot install.SlotName) map[string]verify.Digest {
	b.mu.Lock()
	defer b.mu.Unlock()
	held := make(map[string]verify.Digest)
	for ref, id := range engine.Held() {
		service, tag, _ := strings.Cut(strings.TrimPrefix(ref, "localhost/meshupd/"), ":")
		if tag == string(slot) {
			held[service] = id
			if archive, found := b.known[id]; found {
				held[service] = archive
			}
		}
	}
	return held
}

// site is a device with containers and the releases for it.
type site struct {
	cfg      install.ContainersConfig
	engine   *install.FakeEngine
	vendor   *verifytest.Vendor
	archives map[verify.Digest][]byte
	units    []string
	step     slotstest.Step
	failed   map[string]bool         // units
	systemd  func(verb, unit string) // does what a unit says; may be nil
}

func newSite(t *testing.T, services map[string]install.Service) *site {
	s := &site{engine: &install.FakeEngine{}, vendor: verifytest.NewVendor(t, "containers"), archives: map[verify.Digest][]byte{}, failed: map[string]bool{},
		cfg: install.ContainersConfig{Dir: t.TempDir(), FactoryVersion: "1.0.0", Services: services, Settle: time.Millisecond,
			BootID: func() (string, error) { return "1", nil }}}
	s.cfg.Engine = s.engine
	return s
}

func (s *site) open(t *testing.T) *install.Containers {
	t.Helper()
	step := s.step
	if step == nil {
		step = func(_ string, do func() error) error { return do() }
	}
	c, err := install.OpenContainers(t.Context(), install.ContainersWith(s.cfg, step, func(_ context.Context, verb, unit string) error {
		if verb == "is-failed" {
			if s.failed[unit] {
				return nil
			}
			return errors.New("active")
		}
		s.units = append(s.units, verb+" "+unit)
		if s.systemd != nil {
			s.systemd(verb, unit)
		}
		return nil
	}))
	must(t, "open", err)
	must(t, "start", c.Start(t.Context()))
	return c
}

// release makes a release with these services; the file of each tells its version.
func (s *site) release(t *testing.T, version string, images map[string][]byte) *verify.Release {
	t.Helper()
	var in []verifytest.Image
	for _, name := range slices.Sorted(maps.Keys(images)) {
		path := filepath.Join(t.TempDir(), name)
		must(t, "write", os.WriteFile(path, images[name], 0o600))
		in = append(in, verifytest.Image{Name: name, Path: path, Kind: verify.KindContainer})
		s.archives[sha256.Sum256(images[name])] = images[name]
	}
	rel, _ := s.vendor.Verified(t, verifytest.Opts{Version: version, Images: in})
	return rel
}

func archive(version string) []byte {
	return ocitest.Image{File: []byte("program " + version), Name: "docker.io/library/nginx:latest"}.Archive()
}

func (s *site) source(img verify.Image) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(s.archives[img.SHA256])), nil
}

func (s *site) write(ctx context.Context, c *install.Containers, rel *verify.Release) error {
	return c.Write(ctx, rel, rel.Manifest().Images, s.source, nil)
}

// trial takes a release to its trial.
func (s *site) trial(t *testing.T, c *install.Containers, rel *verify.Release) install.SlotName {
	t.Helper()
	must(t, "write", s.write(t.Context(), c, rel))
	st, err := c.State(t.Context())
	must(t, "state", err)
	must(t, "try", c.Try(t.Context(), st.Default.Other()))
	must(t, "restart", c.Restart(t.Context()))
	return st.Default.Other()
}

func (s *site) wantRunning(t *testing.T, names ...string) {
	t.Helper()
	if got := slices.Sorted(maps.Keys(s.engine.Running())); !slices.Equal(got, names) {
		t.Fatalf("%v run, want %v", got, names)
	}
}

func healthy(context.Context) error { return nil }

func TestContainersSwapRollBackAndPrune(t *testing.T) {
	s := newSite(t, map[string]install.Service{"api": {Args: []string{"--slot={slot}"}}, "web": {}})
	s.engine.Images = map[string]verify.Digest{"docker.io/library/nginx:latest": {9}}
	s.engine.Run = map[string]install.FakeContainer{"nginx": {Ref: "docker.io/library/nginx:latest", Running: true}}
	c := s.open(t)
	one := s.release(t, "2.0.0", map[string][]byte{"api": archive("2 api"), "web": archive("2 web")})
	slot := s.trial(t, c, one)
	s.wantRunning(t, "meshupd-api-b", "meshupd-web-b", "nginx")
	must(t, "check", c.Check(t.Context(), slot, healthy))
	must(t, "confirm", c.Confirm(t.Context()))
	if got := s.engine.Run["meshupd-api-b"].Args; !slices.Equal(got, []string{"--slot=b"}) {
		t.Fatalf("the arguments are %q", got)
	}
	if env := c.Env(slot); env[0] != "MESHUPD_SERVICES=api web" || env[1] != "MESHUPD_CONTAINERS=meshupd-api-b meshupd-web-b" {
		t.Fatalf("a health command is told %q", env)
	}

	// The second release has one service less, and fails.
	two := s.release(t, "3.0.0", map[string][]byte{"web": archive("3 web")})
	slot = s.trial(t, c, two)
	s.wantRunning(t, "meshupd-web-a", "nginx")
	s.engine.End("meshupd-web-a", "no such pump")
	err := c.Check(t.Context(), slot, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	wantCode(t, "check", err, verify.CodeHealth)
	if err.Error() != "container meshupd-web-a ended: no such pump" {
		t.Fatalf("the reason is %q", err)
	}
	must(t, "fall back", c.Fallback(t.Context()))
	must(t, "restart", c.Restart(t.Context()))
	s.wantRunning(t, "meshupd-api-b", "meshupd-web-b", "nginx")
	must(t, "forget", c.Forget(t.Context()))

	three := s.release(t, "4.0.0", map[string][]byte{"api": archive("4 api"), "web": archive("4 web")})
	s.trial(t, c, three)
	must(t, "confirm", c.Confirm(t.Context()))
	if got := slices.Sorted(maps.Keys(s.engine.Held())); !slices.Equal(got, []string{"docker.io/library/nginx:latest",
		"localhost/meshupd/api:a", "localhost/meshupd/api:b", "localhost/meshupd/web:a", "localhost/meshupd/web:b"}) {
		t.Fatalf("the engine holds %v", got)
	}
	if s.engine.Held()["docker.io/library/nginx:latest"] != (verify.Digest{9}) {
		t.Fatal("an archive replaced an image of somebody else")
	}

	// The machine restarts, and the daemon with it: what is confirmed comes back.
	s.engine.Power(2)
	s.cfg.BootID = func() (string, error) { return "2", nil }
	s.open(t)
	s.wantRunning(t, "meshupd-api-a", "meshupd-web-a")
}

func TestRestartedContainerIsNoticed(t *testing.T) {
	s := newSite(t, map[string]install.Service{"web": {}})
	c := s.open(t)
	slot := s.trial(t, c, s.release(t, "2.0.0", map[string][]byte{"web": archive("2")}))
	s.engine.Restarts("meshupd-web-b")
	looks := 0
	err := c.Check(t.Context(), slot, func(ctx context.Context) error {
		looks++
		<-ctx.Done()
		return ctx.Err()
	})
	wantCode(t, "check", err, verify.CodeHealth)
	if looks != 1 || !strings.Contains(err.Error(), "started again") {
		t.Fatalf("the reason is %q", err)
	}
}

func TestBeside(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	s := newSite(t, map[string]install.Service{"web": {Beside: true,
		Ready:        []string{"/bin/sh", "-c", `echo "ready $MESHUPD_CONTAINER $MESHUPD_VERSION" >>"$0/log"; test ! -e "$0/sick" || { echo no answer >&2; exit 1; }`, dir},
		ReadyTimeout: 300 * time.Millisecond,
		Switch:       []string{"/bin/sh", "-c", `echo "switch $MESHUPD_SERVICE $MESHUPD_SLOT" >>"$0/log"`, dir}}})
	c := s.open(t)
	s.trial(t, c, s.release(t, "2.0.0", map[string][]byte{"web": archive("2")}))
	s.wantRunning(t, "meshupd-web-b")
	must(t, "confirm", c.Confirm(t.Context()))
	said, _ := os.ReadFile(log)
	if string(said) != "ready meshupd-web-b 2.0.0\nswitch web b\n" {
		t.Fatalf("the commands saw %q", said)
	}

	// The new one never serves: the old one was never stopped.
	pid := s.engine.Run["meshupd-web-b"]
	writeFile(t, filepath.Join(dir, "sick"), "")
	rel := s.release(t, "3.0.0", map[string][]byte{"web": archive("3")})
	must(t, "write", s.write(t.Context(), c, rel))
	must(t, "try", c.Try(t.Context(), install.SlotA))
	err := c.Restart(t.Context())
	wantCode(t, "restart", err, verify.CodeHealth)
	if !strings.HasSuffix(err.Error(), "no answer") {
		t.Fatalf("the reason is %q", err)
	}
	s.wantRunning(t, "meshupd-web-b")
	must(t, "fall back", c.Fallback(t.Context()))
	must(t, "restart", c.Restart(t.Context()))
	if fmt.Sprint(s.engine.Run["meshupd-web-b"]) != fmt.Sprint(pid) {
		t.Fatal("the old container did not just go on")
	}

	// One that ends is not waited for.
	must(t, "forget", c.Forget(t.Context()))
	s.engine.Fail = func(string) string { return "exec format error" }
	must(t, "try", c.Try(t.Context(), install.SlotA))
	err = c.Restart(t.Context())
	if wantCode(t, "restart", err, verify.CodeHealth); !strings.HasSuffix(err.Error(), "ended: exec format error") {
		t.Fatalf("the reason is %q", err)
	}
	s.wantRunning(t, "meshupd-web-b")
}

func TestUnits(t *testing.T) {
	s := newSite(t, map[string]install.Service{"web": {Unit: "web.service"}, "job": {Unit: "job.service"}})
	c := s.open(t)
	two := s.release(t, "2.0.0", map[string][]byte{"web": archive("2"), "job": archive("2 job")})
	slot := s.trial(t, c, two)
	if want := []string{"restart job.service", "restart web.service"}; !slices.Equal(s.units, want) {
		t.Fatalf("systemd was asked for %q, want %q", s.units, want)
	}
	if at := s.engine.Held(); at["localhost/meshupd/web:current"] != at["localhost/meshupd/web:b"] || at["localhost/meshupd/web:b"].IsZero() {
		t.Fatalf("the references are %v", at)
	}
	must(t, "check", c.Check(t.Context(), slot, healthy))
	must(t, "confirm", c.Confirm(t.Context()))

	s.units = nil
	slot = s.trial(t, c, s.release(t, "3.0.0", map[string][]byte{"web": archive("3")}))
	if want := []string{"restart web.service", "stop job.service"}; !slices.Equal(s.units, want) {
		t.Fatalf("systemd was asked for %q, want %q", s.units, want)
	}
	s.failed["web.service"] = true
	wantCode(t, "check", c.Check(t.Context(), slot, healthy), verify.CodeHealth)
	must(t, "fall back", c.Fallback(t.Context()))
	must(t, "restart", c.Restart(t.Context()))
	if at := s.engine.Held(); at["localhost/meshupd/web:current"] != at["localhost/meshupd/web:b"] {
		t.Fatalf("after the fallback the references are %v", at)
	}
}

// TestLostImage: somebody pruned the engine.
func TestLostImage(t *testing.T) {
	s := newSite(t, map[string]install.Service{"web": {}})
	c := s.open(t)
	rel := s.release(t, "2.0.0", map[string][]byte{"web": archive("2")})
	must(t, "write", s.write(t.Context(), c, rel))
	s.engine.Change(func(images map[string]verify.Digest) { delete(images, "localhost/meshupd/web:b") })
	wantCode(t, "try", c.Try(t.Context(), install.SlotB), verify.CodeBoot)
	if st, err := c.State(t.Context()); err != nil || st.Slots[install.SlotB].Whole {
		t.Fatalf("the slot still counts as whole: %+v, %v", st, err)
	}
	must(t, "write again", s.write(t.Context(), c, rel))
	must(t, "try", c.Try(t.Context(), install.SlotB))

	// Another image under the reference is as bad, also between the arming and the start.
	s.engine.Change(func(images map[string]verify.Digest) { images["localhost/meshupd/web:b"] = verify.Digest{7} })
	wantCode(t, "restart", c.Restart(t.Context()), verify.CodeBoot)
	s.wantRunning(t)
	must(t, "fall back", c.Fallback(t.Context()))
	must(t, "restart", c.Restart(t.Context()))

	// Found at a start of the daemon.
	must(t, "forget", c.Forget(t.Context()))
	must(t, "write", s.write(t.Context(), c, rel))
	s.engine.Change(func(images map[string]verify.Digest) { delete(images, "localhost/meshupd/web:b") })
	c = s.open(t)
	if st, err := c.State(t.Context()); err != nil || st.Slots[install.SlotB].Whole {
		t.Fatalf("the slot still counts as whole: %+v, %v", st, err)
	}
}

func TestWhatIsNoContainerIsRefused(t *testing.T) {
	s := newSite(t, map[string]install.Service{"web": {}})
	c := s.open(t)
	slot, _ := verifytest.NewVendor(t, "containers").Verified(t, verifytest.Opts{})
	wantCode(t, "an image of another kind", c.Write(t.Context(), slot, slot.Manifest().Images, s.source, nil), verify.CodeFormat)
	wantCode(t, "a service that nobody placed", s.write(t.Context(), c, s.release(t, "2.0.0", map[string][]byte{"shell": archive("x")})), verify.CodeConfig)
	wantCode(t, "no archive", s.write(t.Context(), c, s.release(t, "3.0.0", map[string][]byte{"web": []byte("no tar")})), verify.CodeInstaller)
	if len(s.engine.Held()) != 0 {
		t.Fatalf("the engine holds %v", s.engine.Held())
	}
	rel := s.release(t, "4.0.0", map[string][]byte{"web": archive("4")})
	f, err := install.OpenFiles(install.FilesConfig{Dir: t.TempDir()})
	must(t, "open", err)
	wantCode(t, "a container for files", s.write2(t, f, rel), verify.CodeFormat)
}

func (s *site) write2(t *testing.T, slots install.Slots, rel *verify.Release) error {
	return slots.Write(t.Context(), rel, rel.Manifest().Images, s.source, nil)
}

func TestEngineSaysItsDiskIsFull(t *testing.T) {
	s := newSite(t, map[string]install.Service{"web": {}})
	s.step = func(name string, do func() error) error {
		if name == "engine.load" {
			return errors.New("exit status 125: write /var/lib/x: no space left on device")
		}
		return do()
	}
	c := s.open(t)
	wantCode(t, "write", s.write(t.Context(), c, s.release(t, "2.0.0", map[string][]byte{"web": archive("2")})), verify.CodeSpace)
}

// TestEngineRefuses: a verdict on the image is told from an engine that is not there.
func TestEngineRefuses(t *testing.T) {
	s := newSite(t, map[string]install.Service{"web": {}})
	s.step = func(name string, do func() error) error {
		if name == "engine.load" {
			return errors.New("exit status 1: layer has another digest")
		}
		return do()
	}
	c := s.open(t)
	rel := s.release(t, "2.0.0", map[string][]byte{"web": archive("2")})
	wantCode(t, "write", s.write(t.Context(), c, rel), verify.CodeInstaller)
	s.engine.Stop()
	wantCode(t, "write without an engine", s.write(t.Context(), c, rel), verify.CodeSlot)

	// Nor is it a verdict when somebody killed the engine's tool.
	s = newSite(t, map[string]install.Service{"web": {}})
	s.step = func(name string, do func() error) error {
		if name == "engine.load" {
			return exec.Command("sh", "-c", "kill -9 $$").Run()
		}
		return do()
	}
	wantCode(t, "write with a tool that is killed", s.write(t.Context(), s.open(t), s.release(t, "2.0.0", map[string][]byte{"web": archive("2")})), verify.CodeSlot)
}

func TestContainersConfigIsChecked(t *testing.T) {
	dir, engine := t.TempDir(), &install.FakeEngine{}
	web := map[string]install.Service{"web": {}}
	for name, cfg := range map[string]install.ContainersConfig{
		"no folder":       {Engine: engine, Services: web},
		"no engine":       {Dir: dir, Services: web},
		"no service":      {Dir: dir, Engine: engine},
		"many starts":     {Dir: dir, Engine: engine, Services: web, Starts: 101},
		"strange name":    {Dir: dir, Engine: engine, Services: map[string]install.Service{"../web": {}}},
		"unit and args":   {Dir: dir, Engine: engine, Services: map[string]install.Service{"web": {Unit: "web.service", Args: []string{"x"}}}},
		"ready, replaced": {Dir: dir, Engine: engine, Services: map[string]install.Service{"web": {Ready: []string{"x"}}}},
		"empty tool":      {Dir: dir, Engine: install.Podman{Command: []string{""}}, Services: web},
	} {
		_, err := install.OpenContainers(t.Context(), cfg)
		wantCode(t, name, err, verify.CodeConfig)
	}
}

// packProgram makes an image that runs, and that noise tells from others.
func (b *archiveBook) packProgram(program, noise []byte) []byte {
	img := ocitest.Image{File: program, Env: []string{fmt.Sprintf("NOISE=%x", sha256.Sum256(noise))}}
	blobs, archive := img.Blobs(), img.Archive()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.known[sha256.Sum256(blobs[0].Data)] = sha256.Sum256(archive)
	b.known[sha256.Sum256(blobs[1].Data)] = sha256.Sum256(archive)
	return archive
}

// holdsReal asks a real engine.
func (b *archiveBook) holdsReal(t *testing.T, e ocitest.Engine, slot install.SlotName) map[string]verify.Digest {
	t.Helper()
	table := ""
	if e.Kind == "podman" {
		table = e.Out("images", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}")
	} else {
		for line := range strings.Lines(e.Out("images", "ls")) {
			if cells := strings.Fields(line); len(cells) > 2 {
				table += cells[0] + " " + cells[2] + "\n"
			}
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	held := make(map[string]verify.Digest)
	for line := range strings.Lines(table) {
		cells := strings.Fields(line)
		service, tag, _ := strings.Cut(strings.TrimPrefix(cells[0], "localhost/meshupd/"), ":")
		if id, err := verify.ParseDigest(strings.TrimPrefix(cells[1], "sha256:")); err == nil && tag == string(slot) {
			held[service] = b.known[id]
		}
	}
	return held
}
