package ocitest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Engine is a private engine: nothing of the machine's own is seen or touched.
type Engine struct {
	Kind    string   // "podman" or "containerd", as in the config
	Command []string // the tool with the options that lead to it
	Address string   // of containerd
	runtime string   // of podman
	t       testing.TB
}

// Out runs the tool and returns what it printed.
func (e Engine) Out(args ...string) string {
	e.t.Helper()
	argv := append(append([]string(nil), e.Command...), args...)
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		e.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Images are all that the engine holds, with and without a name, in order.
func (e Engine) Images() []string {
	e.t.Helper()
	args := []string{"images", "ls", "--quiet"}
	if e.Kind == "podman" {
		args = []string{"images", "--all", "--format", "{{.Repository}}:{{.Tag}}"}
	}
	refs := strings.Fields(e.Out(args...))
	slices.Sort(refs)
	return refs
}

// Running are the containers that the engine says run, in order.
func (e Engine) Running() []string {
	e.t.Helper()
	var names []string
	if e.Kind == "podman" {
		names = strings.Fields(e.Out("ps", "--format", "{{.Names}}"))
	} else {
		for line := range strings.Lines(e.Out("tasks", "ls")) {
			if cells := strings.Fields(line); len(cells) == 3 && cells[2] == "RUNNING" {
				names = append(names, cells[0])
			}
		}
	}
	slices.Sort(names)
	return names
}

// Podman gives a podman with a store of its own. Its containers end with the test.
func Podman(t testing.TB) Engine {
	t.Helper()
	Need(t, "podman", "runc", "conmon")
	return Engine{runtime: Build(t, "meshupd/install/ocitest/runtime")}.Another(t)
}

// Another gives one more podman, with a store of its own.
func (e Engine) Another(t testing.TB) Engine {
	t.Helper()
	dir := short(t)
	e = Engine{Kind: "podman", t: t, runtime: e.runtime, Command: []string{"podman", "--root", filepath.Join(dir, "root"), "--runroot", filepath.Join(dir, "run"), "--tmpdir", filepath.Join(dir, "tmp"),
		"--cgroup-manager=cgroupfs", "--events-backend=file", "--runtime", e.runtime}}
	t.Cleanup(func() {
		for _, args := range [][]string{{"rm", "--all", "--force", "--time", "1"}, {"rmi", "--all", "--force"}} {
			argv := append(append([]string(nil), e.Command...), args...)
			if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
				t.Errorf("clean up: %v\n%s", err, out)
			}
		}
		unmount(t, dir)
	})
	return e
}

// Containerd starts a containerd of the test's own. It and its containers end with the test.
func Containerd(t testing.TB) Engine {
	t.Helper()
	Need(t, "containerd", "ctr", "runc")
	dir := short(t)
	address := filepath.Join(dir, "sock")
	config := filepath.Join(dir, "config.toml")
	text := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = %q\n[ttrpc]\n  address = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "state"), address, address+".ttrpc")
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("containerd", "--config", config, "--log-level", "error")
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	e := Engine{Kind: "containerd", t: t, Address: address, Command: []string{"ctr", "--address", address, "--namespace", "meshupd"}}
	t.Cleanup(func() {
		for _, name := range strings.Fields(e.Out("tasks", "ls", "--quiet")) {
			e.Out("tasks", "rm", "--force", name)
		}
		if t.Failed() {
			said, _ := os.ReadFile(log.Name())
			t.Logf("containerd said:\n%s", said[max(0, len(said)-4<<10):])
		}
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
		unmount(t, dir)
	})
	for end := time.Now().Add(time.Minute); exec.Command("ctr", "--address", address, "version").Run() != nil; {
		if time.Now().After(end) {
			t.Fatal("containerd does not answer")
		}
		time.Sleep(20 * time.Millisecond)
	}
	return e
}

// short is a folder with a short name: sockets below it must fit 108 bytes.
func short(t testing.TB) string {
	dir, err := os.MkdirTemp("", "ct")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// What podman leaves behind to clean up after a container may still write there.
		err := os.RemoveAll(dir)
		for end := time.Now().Add(20 * time.Second); err != nil && time.Now().Before(end); err = os.RemoveAll(dir) {
			time.Sleep(50 * time.Millisecond)
		}
		if err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return dir
}

// unmount takes away what an engine left mounted below a folder.
func unmount(t testing.TB, dir string) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Error(err)
		return
	}
	for line := range strings.Lines(string(mounts)) {
		if at := strings.Fields(line); len(at) > 1 && strings.HasPrefix(at[1], dir+"/") {
			_ = exec.Command("umount", "--lazy", at[1]).Run()
		}
	}
}
