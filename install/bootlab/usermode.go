package bootlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// UserKernel is a Linux that runs as a process: the same file systems and the same order of writes as on a machine, at the speed of
// this one, and without firmware or bootloader.
type UserKernel struct {
	Image   string
	Modules []string // as in Kernel
}

// FindUserKernel looks in the folder of MESHUPD_LAB_USERMODE, or else where install/bootlab/usermode.sh puts it.
func FindUserKernel() (UserKernel, error) {
	dir := os.Getenv("MESHUPD_LAB_USERMODE")
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return UserKernel{}, err
		}
		dir = filepath.Join(cache, "meshupd-lab", "usermode")
	}
	k := UserKernel{Image: filepath.Join(dir, "usr", "bin", "linux.uml")}
	if _, err := os.Stat(k.Image); err != nil {
		return UserKernel{}, fmt.Errorf("no user-mode kernel (%w); install/bootlab/usermode.sh fetches one", err)
	}
	for _, name := range fileSystemModules {
		found, err := filepath.Glob(filepath.Join(dir, "usr", "lib", "uml", "modules", "*", "kernel", name))
		if err != nil || len(found) == 0 {
			return UserKernel{}, errors.New("the user-mode kernel's package has no " + name)
		}
		k.Modules = append(k.Modules, found[len(found)-1])
	}
	return k, nil
}

// args starts the slot of a machine. What UML keeps beside it goes to dir.
func (k UserKernel) args(m Machine, disk, dir string) ([]string, error) {
	modules := filepath.Join(dir, "modules")
	if err := os.MkdirAll(modules, 0o755); err != nil {
		return nil, err
	}
	for i, path := range k.Modules {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(modules, fmt.Sprintf("%d-%s", i, filepath.Base(path))), data, 0o600); err != nil {
			return nil, err
		}
	}
	device := "ubd0="
	if m.Log != "" {
		device = "ubd0s=" // its driver drops flushes: without this a log would hold none
	}
	args := []string{k.Image, "mem=128M", "uml_dir=" + dir, device + disk, "con=null", "con0=null,fd:1", "noreboot", "quiet", "panic=1",
		fmt.Sprintf("root=/dev/ubda%d", Part(m.Slot)), "ro", "rootwait", "meshupd.slot=" + string(m.Slot), "lab.loader=" + m.Kind.Name,
		"lab.modules=" + modules, "lab.scenario=" + m.Scenario.String()}
	if m.Stick != "" {
		args = append(args, "ubd1r="+m.Stick)
	}
	return args, nil
}

// recorder is qemu's storage daemon: it shows a disk as a file and records what is written to it.
type recorder struct {
	cmd  *exec.Cmd
	said bytes.Buffer
	file string
}

func newRecorder(ctx context.Context, m Machine, dir string) (*recorder, error) {
	r := &recorder{file: filepath.Join(dir, "recorded")}
	if err := os.WriteFile(r.file, nil, 0o600); err != nil {
		return nil, err
	}
	r.cmd = exec.CommandContext(ctx, "qemu-storage-daemon", "--blockdev", "driver=file,node-name=f0,filename="+m.Disk.Path,
		"--blockdev", "driver=file,node-name=l0,filename="+m.Log, "--blockdev", "driver=blklogwrites,node-name=d0,file=f0,log=l0",
		"--export", "type=fuse,id=e0,node-name=d0,writable=on,mountpoint="+r.file)
	r.cmd.Stderr = &r.said
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := r.cmd.Start(); err != nil {
		return nil, err
	}
	for range 3000 {
		if info, err := os.Stat(r.file); err == nil && info.Size() > 0 {
			return r, nil
		}
		time.Sleep(10 * time.Millisecond) // there is nothing that says so
	}
	return nil, errors.Join(fmt.Errorf("qemu-storage-daemon does not show the disk: %.200s", r.said.String()), r.close())
}

// close ends it in good order: only then is the log whole.
func (r *recorder) close() error {
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	var exit *exec.ExitError
	if err := r.cmd.Wait(); err != nil && !errors.As(err, &exit) {
		return err
	}
	return nil
}
