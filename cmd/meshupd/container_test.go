package main

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/install/ocitest"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

const containerLines = `product = "kiosk-a"
trust = "/usr/lib/meshupd/trust"
[slots]
kind = "container"
`

func TestContainerSlotsAreChecked(t *testing.T) {
	for add, want := range map[string]string{
		"":                                "slots.container.services has no service",
		"container.engine = \"docker\"\n": `a.toml:5:1: slots.container.engine is neither "podman" nor "containerd"`,
		"container.stop = \"1ns\"\n":      "a.toml:5:1: slots.container.stop is less than",
		"restart = [\"x\"]\n":             "a.toml:5:1: slots.restart is not for containers",
		"container.command = [\"\"]\n":    "slots.container.command names no command",
		"[slots.container]\nengine = \"containerd\"\nnamespace = \"-\"\n":                           "slots.container.namespace is not a name",
		"[slots.container.services.web]\nunit = \"web.service\"\nargs = [\"x\"]\n":                  "a.toml:6:1: slots.container.services.web.unit says how the service runs",
		"[slots.container.services.web]\nunit = \"--now\"\n":                                        "a.toml:6:1: slots.container.services.web.unit is not the name of a unit",
		"[slots.container.services.web]\nready = [\"x\"]\n":                                         "services.web.ready is only for a service with beside = true",
		"[slots.container.services.web]\nswitch = [\"x\"]\n":                                        "services.web.switch is only for a service with beside = true",
		"[slots.container.services.web]\nbeside = true\nready = [\"x\"]\nready_timeout = \"1ns\"\n": "services.web.ready_timeout is less than",
		"[slots.container.services.\"Web!\"]\n":                                                     "slots.container.services.Web! is not a name",
		"[slots.container.services.web]\nprivileged = true\n":                                       `unknown key "slots.container.services.web.privileged"`,
	} {
		_, err := parse(t, containerLines+add)
		if verify.CodeOf(err) != verify.CodeConfig || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", add, err, want)
		}
	}
}

// TestContainers takes a device with two services, the daemon as it is shipped and a real engine through a good release,
// a kill on trial, bad releases and one that is not made of containers: in one piece, and in two halves as two users.
func TestContainers(t *testing.T) {
	if testing.Short() {
		t.Skip("runs containers; not in the short run")
	}
	for name, halves := range map[string]bool{"": false, ", two halves": true} {
		t.Run("podman"+name, func(t *testing.T) { containerStory(t, ocitest.Podman(t), halves) })
		t.Run("containerd"+name, func(t *testing.T) { containerStory(t, ocitest.Containerd(t), halves) })
	}
}

// kiosk is a device with its daemon.
type kiosk struct {
	dir, binary string
	vendor      *verifytest.Vendor
	api         *control.Client
	halves      bool // the daemon is the user nobody, and meshupd apply is root
	cmds        []*exec.Cmd
}

func (k *kiosk) start(t *testing.T) {
	t.Helper()
	config := filepath.Join(k.dir, "config.toml")
	words := []string{k.binary, "daemon", "--config", config}
	if k.halves {
		k.run(t, k.binary, "apply", "--config", config, "--socket", filepath.Join(k.dir, "apply.sock"))
		words = append([]string{"setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "--no-new-privs"}, words...)
	}
	k.run(t, words...)
}

func (k *kiosk) run(t *testing.T, words ...string) {
	t.Helper()
	log, err := os.OpenFile(filepath.Join(k.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(t, err)
	defer log.Close()
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	must(t, cmd.Start())
	k.cmds = append(k.cmds, cmd)
}

func (k *kiosk) end(sig syscall.Signal) {
	for _, cmd := range slices.Backward(k.cmds) {
		_ = cmd.Process.Signal(sig)
		_ = cmd.Wait() // a killed process has an error by nature
	}
	k.cmds = nil
}

// part prepares a device of two halves, and returns what its config says about them.
func (k *kiosk) part(t *testing.T) string {
	t.Helper()
	if !k.halves {
		return ""
	}
	nobody, err := user.Lookup("nobody")
	must(t, err)
	uid, err := strconv.Atoi(nobody.Uid)
	must(t, err)
	must(t, os.Chmod(k.dir, 0o755))
	for _, name := range []string{"state", "run"} {
		must(t, os.Mkdir(filepath.Join(k.dir, name), 0o755))
		must(t, os.Chown(filepath.Join(k.dir, name), uid, -1))
	}
	return fmt.Sprintf("[apply]\nsocket = %q\nstate = %q\nuser = \"nobody\"\n", filepath.Join(k.dir, "apply.sock"), filepath.Join(k.dir, "own"))
}

// meshupd runs a command as a person would.
func (k *kiosk) meshupd(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command(k.binary, append(args, "--socket", filepath.Join(k.dir, "run", "api.sock"))...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("meshupd %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// until waits for a state of the device.
func (k *kiosk) until(t *testing.T, what string, ok func(control.DeviceStatus) bool) control.DeviceStatus {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	var last control.DeviceStatus
	for after := uint64(0); ; {
		st, err := k.api.Status(ctx, after)
		switch {
		case err == nil:
			after, last = st.Generation, st.Devices[0]
			if ok(last) {
				return last
			}
		case ctx.Err() != nil:
			t.Fatalf("never %s: %+v", what, last)
		default:
			after = 0
			time.Sleep(50 * time.Millisecond)
		}
	}
}

func (k *kiosk) release(t *testing.T, version string, images map[string][]byte) string {
	t.Helper()
	o := verifytest.Opts{Version: version}
	for _, name := range slices.Sorted(maps.Keys(images)) {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, images[name], 0o600); err != nil {
			t.Fatal(err)
		}
		o.Images = append(o.Images, verifytest.Image{Name: name, Path: path, Kind: verify.KindContainer})
	}
	return k.vendor.Bundle(t, o)
}

func containerStory(t *testing.T, e ocitest.Engine, halves bool) {
	dir, err := os.MkdirTemp("", "ctk")
	if err != nil {
		t.Fatal(err)
	}
	k := &kiosk{dir: dir, halves: halves, binary: filepath.Join(dir, "meshupd"), vendor: verifytest.NewVendor(t, "kiosk-a"),
		api: control.NewClient(filepath.Join(dir, "run", "api.sock"))}
	t.Cleanup(func() {
		k.api.Close()
		k.end(syscall.SIGTERM)
		if log, _ := os.ReadFile(filepath.Join(dir, "log")); t.Failed() {
			t.Logf("the daemon said:\n%s", log)
		}
		os.RemoveAll(dir)
	})
	// The user nobody does not come into the folders of a test.
	must(t, os.Rename(ocitest.Build(t, "meshupd/cmd/meshupd"), k.binary))
	must(t, os.CopyFS(filepath.Join(dir, "trust"), os.DirFS(k.vendor.Anchor())))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	web := ln.Addr().String()
	ln.Close()
	host, engine := "--network=host", fmt.Sprintf("engine = \"podman\"\ncommand = %s", tomlWords(e.Command))
	if e.Kind == "containerd" {
		host, engine = "--net-host", fmt.Sprintf("engine = \"containerd\"\naddress = %q", e.Address)
	}
	config := fmt.Sprintf(`product = "kiosk-a"
trust = %q
state = %q
run = %q
mesh.listen = ["127.0.0.1"]
mesh.port = 0
mesh.mdns = false
store.reserve = "1MiB"
[slots]
kind = "container"
factory = "1.0.0"
[slots.container]
%s
stop = "3s"
settle = "1s"
[slots.container.services.web]
args = [%q, "--env=ADDR=%s"]
[slots.container.services.job]
args = [%q]
[health]
command = ["/bin/bash", "-c", '''echo "$MESHUPD_SLOT $MESHUPD_SERVICES $MESHUPD_CONTAINERS" >%s/told
test ! -e %s/hold || { echo "on hold" >&2; exit 1; }
exec 3<>/dev/tcp/%s && printf 'GET /health HTTP/1.0\r\n\r\n' >&3 && read -r said <&3 && case $said in *200*) exit 0;; *) echo "web says $said" >&2; exit 1;; esac''']
deadline = "8s"
interval = "200ms"
%s`, filepath.Join(dir, "trust"), filepath.Join(dir, "state"), filepath.Join(dir, "run"), engine, host, web, host, dir, dir, strings.Replace(web, ":", "/", 1), k.part(t))
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	program := ocitest.Server(t)
	image := func(version string, env ...string) []byte {
		return ocitest.Image{File: program, Env: append(env, "VERSION="+version)}.Archive()
	}
	k.start(t)
	k.until(t, "up", func(control.DeviceStatus) bool { return true })

	// A good release. The daemon is killed while it is on trial; the services are not.
	if err := os.WriteFile(filepath.Join(dir, "hold"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	k.meshupd(t, "import", "--progress=none", k.release(t, "2.0.0", map[string][]byte{"web": image("2"), "job": image("2-job")}))
	k.until(t, "on trial", func(d control.DeviceStatus) bool { return d.State == control.StateTrial })
	k.end(syscall.SIGKILL)
	if err := os.Remove(filepath.Join(dir, "hold")); err != nil {
		t.Fatal(err)
	}
	k.start(t)
	k.until(t, "confirmed", func(d control.DeviceStatus) bool { return d.State == control.StateConfirmed && d.Version == "2.0.0" })
	if told, err := os.ReadFile(filepath.Join(dir, "told")); err != nil || string(told) != "b job web meshupd-job-b meshupd-web-b\n" {
		t.Fatalf("the health command was told %q, %v", told, err)
	}

	// Two bad ones: a service that is sick, a service that ends with a last word. Both services go back, and nothing stays
	// in the engine of what the first one left but in the slot.
	var held []string
	for _, bad := range []struct{ version, mode, why string }{
		{"3.0.0", "sick", "500 Internal Server Error"},
		{"4.0.0", "crash", "container meshupd-job-a ended: no such pump"},
	} {
		version := bad.version
		images := map[string][]byte{"web": image(version), "job": image(version + "-job")}
		switch bad.mode {
		case "sick":
			images["web"] = image(version, "MODE=sick")
		case "crash":
			images["job"] = image(version, "MODE=crash")
		}
		k.meshupd(t, "import", "--progress=none", k.release(t, version, images))
		d := k.until(t, "rolled back", func(d control.DeviceStatus) bool {
			return d.State == control.StateRolledBack && d.Version == "2.0.0" && d.Target == version
		})
		if d.Reason == nil || d.Reason.Code != verify.CodeHealth || !strings.Contains(d.Reason.Detail, bad.why) {
			t.Fatalf("the status does not say %q: %+v", bad.why, d.Reason)
		}
		k.until(t, "both go on", func(control.DeviceStatus) bool {
			return slices.Equal(e.Running(), []string{"meshupd-job-b", "meshupd-web-b"})
		})
		switch now := e.Images(); {
		case held == nil:
			held = now
		case len(now) != len(held) || len(now) != 4:
			t.Fatalf("the engine holds %q, and held %q after the release before", now, held)
		}
		if history := k.meshupd(t, "history", "--json"); !strings.Contains(history, bad.why) {
			t.Fatalf("the history does not say %q:\n%s", bad.why, history)
		}
	}
	k.end(syscall.SIGTERM)
	k.start(t)
	k.until(t, "rolled back still", func(d control.DeviceStatus) bool { return d.State == control.StateRolledBack && d.Version == "2.0.0" })
	conn, err := net.Dial("tcp", web)
	if err != nil {
		t.Fatalf("the old service does not answer: %v", err)
	}
	conn.Close()

	// One that is not made of containers is not begun.
	k.meshupd(t, "import", "--progress=none", k.vendor.Bundle(t, verifytest.Opts{Version: "5.0.0"}))
	d := k.until(t, "blocked", func(d control.DeviceStatus) bool { return d.State == control.StateBlocked })
	if d.Reason == nil || d.Reason.Code != verify.CodeKind {
		t.Fatalf("the reason is %+v", d.Reason)
	}

	k.meshupd(t, "import", "--progress=none", k.release(t, "6.0.0", map[string][]byte{"web": image("6")}))
	k.until(t, "confirmed", func(d control.DeviceStatus) bool { return d.State == control.StateConfirmed && d.Version == "6.0.0" })
	if now := e.Images(); len(now) != 3 { // web twice, and job only where it is still part of the release
		t.Fatalf("in the end the engine holds %q", now)
	}
	if halves {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", k.cmds[len(k.cmds)-1].Process.Pid))
		must(t, err)
		if !strings.Contains(string(raw), "CapEff:\t0000000000000000") {
			t.Fatalf("the daemon has rights:\n%s", raw)
		}
	}
}

func tomlWords(words []string) string {
	var quoted []string
	for _, w := range words {
		quoted = append(quoted, fmt.Sprintf("%q", w))
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}
