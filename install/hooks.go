package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"meshupd/verify"
)

// Hook names an executable in the folder of Hooks by the moment at which it is run.
type Hook string

// The hooks.
const (
	HookPreInstall  Hook = "pre-install"  // before a slot is changed; a failure puts that off
	HookPostInstall Hook = "post-install" // the slot is whole; it is not armed before this passed
	HookPreReboot   Hook = "pre-reboot"   // before the new version is armed and started; a failure holds that
	HookHealth      Hook = "health"       // one more health check of a trial
	HookState       Hook = "state"        // the device's state changed; a failure changes nothing
)

var hookNames = []Hook{HookPreInstall, HookPostInstall, HookPreReboot, HookHealth, HookState}

// Hooks runs the executables of a folder that an integrator puts there. None of them has to be there, nor the folder. They
// are run without a shell and without input, in a process group of their own that is killed at the timeout; what they leave
// running in the background is not waited for. Exit 0 is consent; the last line on standard error is the reason otherwise.
// They may be run again after a cut, and so have to bear that.
type Hooks struct {
	Dir string // empty: no hooks
	// Timeout of one run; 30 s when zero.
	Timeout time.Duration
	// Env is told to each, in addition to MESHUPD_HOOK and what the moment adds.
	Env []string
	// Guard refuses a hook that others than root own, or can change or replace, as for a process that runs as root.
	Guard bool
}

// Run runs a hook, if it is there. Errors are E-HOOK; when ctx ends, its error.
func (h Hooks) Run(ctx context.Context, hook Hook, env ...string) error {
	path, err := h.find(hook)
	if err != nil || path == "" {
		return err
	}
	c := command{argv: []string{path}, timeout: orElse(h.Timeout, 30*time.Second),
		env: slices.Concat(h.Env, []string{"MESHUPD_HOOK=" + string(hook)}, env)}
	err = c.run(ctx)
	if err == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	if _, gone := os.Lstat(path); errors.Is(gone, fs.ErrNotExist) && errors.Is(err, fs.ErrNotExist) {
		return nil // it went away a moment ago
	}
	return verify.Refuse(verify.CodeHook, "hook %s: %w", hook, err)
}

// Check refuses with E-HOOK when a hook is there and cannot be run.
func (h Hooks) Check() error {
	for _, hook := range hookNames {
		if _, err := h.find(hook); err != nil {
			return err
		}
	}
	return nil
}

// Strange lists what is in the folder and has the name of no hook: a typing error would otherwise be a hook that is never run.
func (h Hooks) Strange() []string {
	if h.Dir == "" {
		return nil
	}
	entries, _ := os.ReadDir(h.Dir) // that there is no folder is no error
	var names []string
	for _, e := range entries {
		if name := e.Name(); !slices.Contains(hookNames, Hook(name)) && !strings.HasPrefix(name, ".") && len(names) < 8 {
			names = append(names, printable(name, 64))
		}
	}
	return names
}

// find returns the path of a hook, or "" when there is none.
func (h Hooks) find(hook Hook) (string, error) {
	if h.Dir == "" {
		return "", nil
	}
	path := filepath.Join(h.Dir, string(hook))
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	info, err := os.Stat(path)
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = errors.New("it is no regular file")
	case info.Mode().Perm()&0o111 == 0:
		err = errors.New("it is not executable")
	case h.Guard:
		err = rootsOwn(path)
	}
	if err != nil {
		return "", verify.Refuse(verify.CodeHook, "hook %s: %w", hook, err)
	}
	return path, nil
}

// rootsOwn fails unless only root can change a file, or put another in its place.
func rootsOwn(path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	for _, at := range []string{path, real} {
		for ; ; at = filepath.Dir(at) {
			var st unix.Stat_t
			if err := unix.Stat(at, &st); err != nil {
				return err
			}
			// What root owns in a folder with the sticky bit only root can rename.
			sticky := st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Mode&unix.S_ISVTX != 0
			if st.Uid != 0 || st.Mode&0o022 != 0 && !sticky {
				return fmt.Errorf("%s can be changed by others than root (owner %d, mode %o)", printable(at, maxReason), st.Uid, st.Mode&0o7777)
			}
			if at == filepath.Dir(at) {
				break
			}
		}
	}
	return nil
}
