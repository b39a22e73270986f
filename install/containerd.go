package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"meshupd/verify"
)

// Containerd is the container engine containerd, 1.6 or newer, by its tool ctr.
type Containerd struct {
	// Command and its options; ctr when empty.
	Command []string
	// Address of its socket; the tool's own default when empty.
	Address string
	// Namespace that only meshupd uses; "meshupd" when empty.
	Namespace string
}

func (c Containerd) open(env engineEnv) (engine, error) {
	argv, err := orTool(c.Command, "ctr")
	if err != nil {
		return nil, err
	}
	argv = slices.Clone(argv)
	if c.Address != "" {
		argv = append(argv, "--address", c.Address)
	}
	namespace := c.Namespace
	if namespace == "" {
		namespace = "meshupd"
	}
	return &containerd{cli{append(argv, "--namespace", namespace), env.timeout}, env}, nil
}

type containerd struct {
	cli
	env engineEnv
}

func (c *containerd) ready(ctx context.Context) error { return c.do(ctx, "version") }

func (c *containerd) id(a *ociArchive) verify.Digest { return a.manifest }

func (c *containerd) images(ctx context.Context) (map[string]verify.Digest, error) {
	out, err := c.ask(ctx, "images", "check", "name~=^"+imagePrefix)
	if err != nil {
		return nil, err
	}
	return parseCtrImages(out), nil
}

// parseCtrImages reads the table of `ctr images check`: REF TYPE DIGEST STATUS SIZE UNPACKED. What is not complete and
// unpacked could not be started, so it is not listed.
func parseCtrImages(table []byte) map[string]verify.Digest {
	found := make(map[string]verify.Digest)
	for line := range strings.Lines(string(table)) {
		cells := strings.Fields(line)
		if len(cells) < 6 || !ours(cells[0]) || cells[3] != "complete" || cells[len(cells)-1] != "true" {
			continue
		}
		if id, err := verify.ParseDigest(strings.TrimPrefix(cells[2], "sha256:")); err == nil {
			found[cells[0]] = id
		}
	}
	return found
}

// load syncs everything: containerd syncs the blobs, and not the files that it unpacks.
func (c *containerd) load(ctx context.Context, archive io.Reader) error {
	err := c.call(ctx, archive, nil, []string{"images", "import", "-"})
	unix.Sync()
	return err
}

func (c *containerd) tag(ctx context.Context, from, to string) error {
	return c.do(ctx, "images", "tag", "--force", from, to)
}

func (c *containerd) untag(ctx context.Context, ref string) error {
	return c.do(ctx, "images", "rm", "--sync", ref)
}

func (c *containerd) containers(ctx context.Context) (map[string]container, error) {
	names, err := c.ask(ctx, "containers", "ls", "--quiet", `labels."`+specLabel+`"`)
	if err != nil {
		return nil, err
	}
	tasks, err := c.tasks(ctx)
	if err != nil {
		return nil, err
	}
	found := make(map[string]container)
	for name := range strings.FieldsSeq(string(names)) {
		if !strings.HasPrefix(name, containerPrefix) {
			continue
		}
		info, err := c.ask(ctx, "containers", "info", name)
		if err != nil {
			return nil, err
		}
		var said struct{ Labels map[string]string }
		if err := json.Unmarshal(info, &said); err != nil {
			return nil, verify.Refuse(verify.CodeFormat, "read what containerd says of %s: %w", name, err)
		}
		task := tasks[name]
		found[name] = container{running: task.running, pid: task.pid, spec: said.Labels[specLabel]}
	}
	return found, nil
}

func (c *containerd) tasks(ctx context.Context) (map[string]container, error) {
	out, err := c.ask(ctx, "tasks", "ls")
	if err != nil {
		return nil, err
	}
	return parseCtrTasks(out), nil
}

// parseCtrTasks reads the table of `ctr tasks ls`: TASK PID STATUS. Only what is said to have stopped has: on a busy machine
// containerd says UNKNOWN of a task whose shim did not answer in time.
func parseCtrTasks(table []byte) map[string]container {
	found := make(map[string]container)
	for line := range strings.Lines(string(table)) {
		cells := strings.Fields(line)
		if len(cells) != 3 {
			continue
		}
		if pid, err := strconv.Atoi(cells[1]); err == nil {
			found[cells[0]] = container{pid: pid, running: cells[2] != "STOPPED"}
		}
	}
	return found
}

func (c *containerd) run(ctx context.Context, w wanted) error {
	args := []string{"run", "--detach", "--label", specLabel + "=" + w.spec}
	if !slices.ContainsFunc(w.args, func(a string) bool { return strings.HasPrefix(a, "--log-uri") }) {
		// The log of the start before says nothing about this one.
		if err := os.Remove(c.log(w.name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		args = append(args, "--log-uri", "file://"+c.log(w.name))
	}
	err := c.do(ctx, append(append(append(args, w.args...), w.ref, w.name), w.command...)...)
	if err != nil {
		// A container whose task could not be started would stay, and would keep its name.
		_ = c.remove(context.WithoutCancel(ctx), w.name)
	}
	return err
}

func (c *containerd) log(name string) string { return filepath.Join(c.env.logs, name+".log") }

func (c *containerd) remove(ctx context.Context, name string) error {
	gone := func() (bool, error) {
		tasks, err := c.tasks(ctx)
		return !tasks[name].running, err
	}
	tasks, err := c.tasks(ctx)
	if err != nil {
		return err
	}
	if _, found := tasks[name]; found {
		ended := !tasks[name].running
		for _, how := range [][]string{{"tasks", "kill", name}, {"tasks", "kill", "--signal", "SIGKILL", name}} {
			if ended {
				break
			}
			said := c.do(ctx, how...) // it may have ended by itself meanwhile
			if ended, err = until(ctx, c.env.stop, 50*time.Millisecond, gone); err != nil {
				return err
			}
			if said != nil {
				err = said
			}
		}
		if !ended {
			return errors.Join(fmt.Errorf("%s does not end", name), err)
		}
		if err := c.do(ctx, "tasks", "rm", "--force", name); err != nil {
			return err
		}
	}
	names, err := c.ask(ctx, "containers", "ls", "--quiet", "id=="+name)
	if err != nil || len(strings.Fields(string(names))) == 0 {
		return err
	}
	return c.do(ctx, "containers", "rm", name)
}

func (c *containerd) lastLine(ctx context.Context, name string) string {
	// The shim copies what a container printed beside its end: the last line may come a little after it. Removing the ended task
	// waits for the copy, but not for ever, so the log has to settle too.
	_ = c.do(ctx, "tasks", "rm", name)
	size := int64(-1)
	for range logLooks {
		info, err := os.Stat(c.log(name))
		if err != nil || info.Size() == size || pause(ctx, logSettles) != nil {
			break
		}
		size = info.Size()
	}
	f, err := os.Open(c.log(name))
	if err != nil {
		return ""
	}
	defer f.Close()
	if _, err := f.Seek(-tailSize, io.SeekEnd); err != nil {
		_, _ = f.Seek(0, io.SeekStart) // it is shorter than that
	}
	var said tail
	if _, err := io.Copy(&said, io.LimitReader(f, tailSize)); err != nil {
		return ""
	}
	return said.lastLine()
}

// A log that stays as it is for logSettles is taken for complete; one that goes on growing is looked at logLooks times.
const (
	logSettles = 250 * time.Millisecond
	logLooks   = 8
)

// seconds writes a duration for a tool that counts whole seconds, at least one.
func seconds(d time.Duration) string {
	return strconv.FormatInt(int64(max(d.Round(time.Second), time.Second)/time.Second), 10)
}
