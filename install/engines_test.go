package install_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"meshupd/install"
	"meshupd/install/ocitest"
	"meshupd/install/slotstest"
	"meshupd/verify"
)

// realEngines runs a test in a podman and in a containerd of its own.
func realEngines(t *testing.T, test func(t *testing.T, e ocitest.Engine, engine install.Engine)) {
	if testing.Short() {
		t.Skip("runs containers; not in the short run")
	}
	t.Run("podman", func(t *testing.T) {
		e := ocitest.Podman(t)
		test(t, e, install.Podman{Command: e.Command})
	})
	t.Run("containerd", func(t *testing.T) {
		e := ocitest.Containerd(t)
		test(t, e, install.Containerd{Address: e.Address})
	})
}

// load takes an archive in by hand, as an integrator would.
func loadByHand(t *testing.T, e ocitest.Engine, archive []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "archive.tar")
	must(t, "write", os.WriteFile(path, archive, 0o600))
	if e.Kind == "podman" {
		e.Out("load", "--input", path)
	} else {
		e.Out("images", "import", path)
	}
}

// exported takes an image through the engine, and returns what its tool makes of it.
func exported(t *testing.T, e ocitest.Engine, img ocitest.Image) []byte {
	t.Helper()
	img.Name = "localhost/vendor/exported:1"
	loadByHand(t, e, img.Archive())
	path := filepath.Join(t.TempDir(), "exported.tar")
	if e.Kind == "podman" {
		e.Out("save", "--format", "oci-archive", "--output", path, img.Name)
		e.Out("rmi", img.Name)
	} else {
		e.Out("images", "export", path, img.Name)
		e.Out("images", "rm", img.Name)
	}
	data, err := os.ReadFile(path)
	must(t, "read", err)
	return data
}

// answers returns what a service says of its version, or "".
func answers(ctx context.Context, addr string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/health", nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body := make([]byte, 64)
	n, _ := resp.Body.Read(body)
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("status %d", resp.StatusCode)
	}
	return strings.TrimSpace(string(body[:n])), nil
}

func freeAddr(t *testing.T) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, "listen", err)
	defer ln.Close()
	return ln.Addr().String()
}

// httpCheck waits until a service answers with a version.
func httpCheck(addr, version string) func(context.Context) error {
	return func(ctx context.Context) error {
		var last error
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
			said, err := answers(ctx, addr)
			if err == nil && said == version {
				return nil
			}
			if ctx.Err() != nil && last != nil {
				break // a request that was cut short says less than the answer before it
			}
			last = fmt.Errorf("it says %q: %w", said, errors.Join(err))
		}
		return verify.Refuse(verify.CodeHealth, "no answer: %w", last)
	}
}

// TestEngines takes two services through updates in a real engine: swapped, given up, pruned, cut.
func TestEngines(t *testing.T) {
	realEngines(t, func(t *testing.T, e ocitest.Engine, engine install.Engine) {
		api, web := freeAddr(t), freeAddr(t)
		host := []string{"--network=host"}
		if e.Kind == "containerd" {
			host = []string{"--net-host"}
		}
		s := newSite(t, map[string]install.Service{
			"api": {Args: append(slices.Clone(host), "--env=ADDR="+api)},
			"web": {Args: append(slices.Clone(host), "--env=ADDR="+web)},
		})
		s.cfg.Engine, s.cfg.Settle, s.cfg.Stop = engine, 300*time.Millisecond, 3*time.Second
		program := ocitest.Server(t)
		image := func(version string, env ...string) []byte {
			return ocitest.Image{File: program, Env: append(env, "VERSION="+version), Name: "docker.io/library/other:latest"}.Archive()
		}
		loadByHand(t, e, ocitest.Image{File: []byte("somebody else's"), Name: "docker.io/library/other:latest"}.Archive())
		loadByHand(t, e, ocitest.Image{File: program, Env: []string{"VERSION=factory"}, Name: "localhost/meshupd/web:a"}.Archive())

		c := s.open(t) // what the factory loaded is started
		must(t, "the factory's service", httpCheck(web, "factory")(t.Context()))
		two := s.release(t, "2.0.0", map[string][]byte{"api": image("2-api"), "web": image("2-web")})
		slot := s.trial(t, c, two)
		must(t, "check", c.Check(t.Context(), slot, httpCheck(web, "2-web")))
		must(t, "check", c.Check(t.Context(), slot, httpCheck(api, "2-api")))
		must(t, "confirm", c.Confirm(t.Context()))
		if got := e.Running(); !slices.Equal(got, []string{"meshupd-api-b", "meshupd-web-b"}) {
			t.Fatalf("%v run", got)
		}

		// One that is sick, and one that crashes with a last word.
		for _, bad := range []struct{ mode, reason string }{{"sick", "status 500"}, {"crash", "container meshupd-web-a ended: no such pump"}} {
			rel := s.release(t, "3.0.0-"+bad.mode, map[string][]byte{"api": image("3-api"), "web": image("3-web", "MODE="+bad.mode)})
			slot = s.trial(t, c, rel)
			short, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			check := httpCheck(web, "3-web")
			if bad.mode == "crash" {
				short = t.Context() // the end of the container ends it
			}
			err := c.Check(t.Context(), slot, func(ctx context.Context) error {
				if bad.mode == "crash" {
					<-ctx.Done()
					return ctx.Err()
				}
				return check(short)
			})
			cancel()
			if wantCode(t, bad.mode, err, verify.CodeHealth); !strings.Contains(err.Error(), bad.reason) {
				t.Fatalf("%s: the reason is %q", bad.mode, err)
			}
			must(t, "fall back", c.Fallback(t.Context()))
			must(t, "restart", c.Restart(t.Context()))
			must(t, "the old one", httpCheck(web, "2-web")(t.Context()))
			must(t, "forget", c.Forget(t.Context()))
		}

		// Killed at each step of the next update; each next start goes on to the end.
		// This time one of the archives is as the engine's own tool writes it.
		three := s.release(t, "4.0.0", map[string][]byte{"api": exported(t, e, ocitest.Image{File: program, Env: []string{"VERSION=4-api"}}), "web": image("4-web")})
		cuts := 0
		for n, done := 0, false; !done; n++ {
			at := 0
			s.step = func(name string, do func() error) error {
				at++
				if at > n {
					return fmt.Errorf("cut at step %d, %s", at, name)
				}
				return do()
			}
			err := s.update(t.Context(), s.openOnly(t), three)
			done = err == nil
			if !done && !strings.Contains(err.Error(), "cut at step") {
				t.Fatalf("after %d steps: %v", n, err)
			}
			cuts = n
			s.step = nil
			c = s.open(t)
			st, err := c.State(t.Context())
			must(t, "state", err)
			want := map[verify.Digest]string{two.ID(): "2-web", three.ID(): "4-web"}[st.Slots[st.Booted].Release]
			must(t, fmt.Sprintf("after a cut at step %d the service of slot %s", n+1, st.Booted), httpCheck(web, want)(t.Context()))
			if st.Phase == install.PhaseTrial || st.Failed != "" || st.Phase == install.PhaseArmed {
				if st.Failed == "" {
					must(t, "give up", c.Fallback(t.Context()))
					must(t, "restart", c.Restart(t.Context()))
				}
				must(t, "forget", c.Forget(t.Context()))
			}
		}
		t.Logf("cut at each of %d steps", cuts)
		must(t, "the end", httpCheck(web, "4-web")(t.Context()))
		must(t, "the end", httpCheck(api, "4-api")(t.Context()))
		if got := e.Images(); !slices.Equal(got, []string{"docker.io/library/other:latest",
			"localhost/meshupd/api:a", "localhost/meshupd/api:b", "localhost/meshupd/web:a", "localhost/meshupd/web:b"}) {
			t.Fatalf("the engine holds %v", got)
		}
	})
}

// TestEnginesUnit lets units run the services, as systemd would: the test stands for systemctl and the unit's ExecStart line, the
// engine is real.
func TestEnginesUnit(t *testing.T) {
	realEngines(t, func(t *testing.T, e ocitest.Engine, engine install.Engine) {
		addr := freeAddr(t)
		s := newSite(t, map[string]install.Service{"web": {Unit: "web.service"}})
		s.cfg.Engine, s.cfg.Settle, s.cfg.Stop = engine, 300*time.Millisecond, 3*time.Second
		s.systemd = func(verb, unit string) {
			switch e.Kind + " " + verb {
			case "podman restart":
				e.Out("run", "--detach", "--replace", "--pull=never", "--name", unit, "--network=host", "--env=ADDR="+addr, "localhost/meshupd/web:current")
			case "containerd restart":
				if slices.Contains(e.Running(), unit) {
					e.Out("tasks", "rm", "--force", unit)
					e.Out("containers", "rm", unit)
				}
				e.Out("run", "--detach", "--net-host", "--env=ADDR="+addr, "localhost/meshupd/web:current", unit)
			default:
				t.Errorf("systemctl %s %s", verb, unit)
			}
		}
		program := ocitest.Server(t)
		image := func(version string, env ...string) map[string][]byte {
			return map[string][]byte{"web": ocitest.Image{File: program, Env: append(env, "VERSION="+version)}.Archive()}
		}
		c := s.open(t)
		slot := s.trial(t, c, s.release(t, "2.0.0", image("2")))
		must(t, "check", c.Check(t.Context(), slot, httpCheck(addr, "2")))
		must(t, "confirm", c.Confirm(t.Context()))
		slot = s.trial(t, c, s.release(t, "3.0.0", image("3", "MODE=sick")))
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		wantCode(t, "a sick service", c.Check(t.Context(), slot, func(context.Context) error { return httpCheck(addr, "3")(ctx) }), verify.CodeHealth)
		must(t, "fall back", c.Fallback(t.Context()))
		must(t, "restart", c.Restart(t.Context()))
		must(t, "the old one", httpCheck(addr, "2")(t.Context()))
		must(t, "forget", c.Forget(t.Context()))
		if got := e.Images(); !slices.Equal(got, []string{"localhost/meshupd/web:a", "localhost/meshupd/web:b", "localhost/meshupd/web:current"}) {
			t.Fatalf("the engine holds %v", got)
		}
	})
}

// openOnly opens with the faults in, and starts as far as they let it.
func (s *site) openOnly(t *testing.T) *install.Containers {
	t.Helper()
	c, err := install.OpenContainers(t.Context(), install.ContainersWith(s.cfg, s.step, nil))
	must(t, "open", err)
	return c
}

// update goes from a start of the daemon to a confirmed release.
func (s *site) update(ctx context.Context, c *install.Containers, rel *verify.Release) error {
	if err := c.Start(ctx); err != nil {
		return err
	}
	if err := s.write(ctx, c, rel); err != nil {
		return err
	}
	st, err := c.State(ctx)
	if err != nil {
		return err
	}
	for _, step := range []func() error{
		func() error { return c.Try(ctx, st.Default.Other()) },
		func() error { return c.Restart(ctx) },
		func() error { return c.Confirm(ctx) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// TestEnginesBeside starts a service beside the old one, on the port of its slot, and leads over.
func TestEnginesBeside(t *testing.T) {
	realEngines(t, func(t *testing.T, e ocitest.Engine, engine install.Engine) {
		dir := t.TempDir()
		host := "--network=host"
		if e.Kind == "containerd" {
			host = "--net-host"
		}
		ports := map[string]string{"a": freeAddr(t), "b": freeAddr(t)}
		for slot, addr := range ports {
			writeFile(t, filepath.Join(dir, "env."+slot), "ADDR="+addr+"\n")
		}
		s := newSite(t, map[string]install.Service{"web": {Beside: true,
			Args: []string{host, "--env-file=" + dir + "/env.{slot}"},
			Ready: []string{"/bin/bash", "-c", `. "$0/env.$MESHUPD_SLOT"; exec 3<>"/dev/tcp/${ADDR%:*}/${ADDR#*:}" && printf 'GET /health HTTP/1.0\r\n\r\n' >&3 &&
				grep -q "^HTTP/1.0 200" <&3 || { echo "not serving" >&2; exit 1; }`, dir},
			ReadyTimeout: 4 * time.Second,
			Switch:       []string{"/bin/sh", "-c", `ln -sfn "env.$MESHUPD_SLOT" "$0/front"`, dir}}})
		s.cfg.Engine, s.cfg.Stop = engine, 3*time.Second
		program := ocitest.Server(t)
		c := s.open(t)
		s.trial(t, c, s.release(t, "2.0.0", map[string][]byte{"web": ocitest.Image{File: program, Env: []string{"VERSION=2"}}.Archive()}))
		must(t, "confirm", c.Confirm(t.Context()))
		must(t, "the first", httpCheck(ports["b"], "2")(t.Context()))

		rel := s.release(t, "3.0.0", map[string][]byte{"web": ocitest.Image{File: program, Env: []string{"VERSION=3", "MODE=sick"}}.Archive()})
		must(t, "write", s.write(t.Context(), c, rel))
		must(t, "try", c.Try(t.Context(), install.SlotA))
		stop, missed := make(chan struct{}), make(chan int)
		go func() { // the old one has to answer all the time
			n := 0
			for {
				select {
				case <-stop:
					missed <- n
					return
				default:
					if said, err := answers(t.Context(), ports["b"]); err != nil || said != "2" {
						n++
					}
					time.Sleep(5 * time.Millisecond)
				}
			}
		}()
		wantCode(t, "restart to one that is sick", c.Restart(t.Context()), verify.CodeHealth)
		must(t, "fall back", c.Fallback(t.Context()))
		must(t, "restart", c.Restart(t.Context()))
		close(stop)
		if n := <-missed; n > 0 {
			t.Fatalf("the old service missed %d requests while the new one failed", n)
		}
		must(t, "forget", c.Forget(t.Context()))
		s.trial(t, c, s.release(t, "4.0.0", map[string][]byte{"web": ocitest.Image{File: program, Env: []string{"VERSION=4"}}.Archive()}))
		must(t, "the new one", httpCheck(ports["a"], "4")(t.Context()))
		if front, err := os.Readlink(filepath.Join(dir, "front")); err != nil || front != "env.a" {
			t.Fatalf("what comes in goes to %q, %v", front, err)
		}
		if got := e.Running(); !slices.Equal(got, []string{"meshupd-web-a"}) {
			t.Fatalf("%v run", got)
		}
	})
}

// TestEnginesConform tells the whole suite to real engines: with each 60th fault, in the long run with all of them.
func TestEnginesConform(t *testing.T) {
	every := 60
	if os.Getenv("MESHUPD_TORTURE") != "" {
		every = 1
	}
	realEngines(t, func(t *testing.T, e ocitest.Engine, engine install.Engine) {
		program := ocitest.Server(t)
		archives := &archiveBook{known: make(map[verify.Digest]verify.Digest)}
		var stories atomic.Int32
		slotstest.Run(t, func(t *testing.T) slotstest.Harness {
			story := stories.Add(1)
			cfg := install.ContainersConfig{Dir: t.TempDir(), FactoryVersion: "1.0.0", Stop: 2 * time.Second}
			host := install.Service{Args: []string{"--network=host"}}
			if e.Kind == "containerd" {
				host.Args = []string{"--net-host"}
			}
			cfg.Services = map[string]install.Service{"image0.img": host, "image1.img": host}
			e := e
			if e.Kind == "podman" {
				e = e.Another(t)
				cfg.Engine = install.Podman{Command: e.Command}
			} else {
				space := "story" + strconv.Itoa(int(story))
				e.Command = []string{"ctr", "--address", e.Address, "--namespace", space}
				cfg.Engine = install.Containerd{Address: e.Address, Namespace: space}
				t.Cleanup(func() {
					for _, name := range strings.Fields(e.Out("tasks", "ls", "--quiet")) {
						e.Out("tasks", "rm", "--force", name)
					}
				})
			}
			return slotstest.Harness{
				Images: 2, Kind: verify.KindContainer, Every: every,
				Content: func(noise []byte) []byte { return archives.packProgram(program, noise) },
				Open: func(power int, step slotstest.Step) (slotstest.Device, error) {
					cfg.BootID = func() (string, error) { return "power-" + strconv.Itoa(power), nil }
					return install.OpenContainers(context.WithoutCancel(t.Context()), install.ContainersWith(cfg, step, nil))
				},
				Pointed: func() install.SlotName {
					target, err := os.Readlink(filepath.Join(cfg.Dir, "current"))
					if err != nil {
						return install.SlotA
					}
					return install.SlotName(target)
				},
				Holds: func(slot install.SlotName) map[string]verify.Digest { return archives.holdsReal(t, e, slot) },
			}
		})
	})
}
