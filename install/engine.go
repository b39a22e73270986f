package install

import (
	"context"
	"io"
	"strings"
	"time"

	"meshupd/verify"
)

// Engine places a container engine: Podman or Containerd.
type Engine interface {
	open(env engineEnv) (engine, error) // E-CONFIG
}

// engineEnv is what an engine is given by its device.
type engineEnv struct {
	logs    string        // folder for what services print, where the engine keeps no log itself
	stop    time.Duration // for a service to end after it was asked to
	timeout time.Duration // of any other call
}

// engine is what Containers asks of a container engine. It only ever sees and touches what is ours: images below
// imagePrefix, and containers with the label specLabel. Errors have no code yet.
type engine interface {
	// ready says whether the engine answers.
	ready(ctx context.Context) error
	// id is what the engine calls an image by.
	id(a *ociArchive) verify.Digest
	// images lists ours, whole ones only: id by reference.
	images(ctx context.Context) (map[string]verify.Digest, error)
	// load takes in an archive with one image that has its reference in it, and makes it outlast a power cut.
	load(ctx context.Context, archive io.Reader) error
	// tag gives an image one more reference, which another image may have had.
	tag(ctx context.Context, from, to string) error
	// untag takes a reference away; an image without any is removed. No such reference is no error.
	untag(ctx context.Context, ref string) error
	// containers lists ours by name.
	containers(ctx context.Context) (map[string]container, error)
	// run starts a container in the background.
	run(ctx context.Context, c wanted) error
	// remove stops and removes a container. No such container is no error.
	remove(ctx context.Context, name string) error
	// lastLine is the last line that a container printed, or "".
	lastLine(ctx context.Context, name string) string
}

// wanted is a container to be.
type wanted struct {
	name, ref string
	spec      string // digest of all that it is made of
	args      []string
	command   []string
}

// container is one that is there.
type container struct {
	running bool
	pid     int // tells one start from another
	spec    string
}

const (
	imagePrefix     = "localhost/meshupd/"
	containerPrefix = "meshupd-"
	specLabel       = "meshupd.spec"

	// maxEngineOutput bounds the lists that an engine prints.
	maxEngineOutput = 4 << 20
)

// slotRef is the reference of a service's image in a slot, currentRef that of the image that runs.
func slotRef(service string, slot SlotName) string { return imagePrefix + service + ":" + string(slot) }
func currentRef(service string) string             { return imagePrefix + service + ":current" }

func containerName(service string, slot SlotName) string {
	return containerPrefix + service + "-" + string(slot)
}

// cli is a command line tool of an engine.
type cli struct {
	argv    []string
	timeout time.Duration
}

// do runs the tool.
func (c cli) do(ctx context.Context, args ...string) error { return c.call(ctx, nil, nil, args) }

// ask runs the tool and returns what it printed.
func (c cli) ask(ctx context.Context, args ...string) ([]byte, error) {
	out := &capped{limit: maxEngineOutput}
	if err := c.call(ctx, nil, out, args); err != nil {
		return nil, err
	}
	return out.data.Bytes(), nil
}

func (c cli) call(ctx context.Context, in io.Reader, out *capped, args []string) error {
	cmd := command{argv: append(append([]string(nil), c.argv...), args...), stdin: in, timeout: c.timeout}
	if out != nil {
		cmd.stdout = out
	}
	return cmd.run(ctx)
}

// ours keeps the references that we gave.
func ours(ref string) bool { return strings.HasPrefix(ref, imagePrefix) }

// orTool is the command that is configured, or the tool by its name.
func orTool(configured []string, tool string) ([]string, error) {
	if len(configured) == 0 {
		return []string{tool}, nil
	}
	if configured[0] == "" {
		return nil, verify.Refuse(verify.CodeConfig, "the command of the container engine is empty")
	}
	return configured, nil
}

// until asks again and again until the answer is yes, at most that long.
func until(ctx context.Context, longest, interval time.Duration, yes func() (bool, error)) (bool, error) {
	for end := time.Now().Add(longest); ; {
		ok, err := yes()
		if ok || err != nil || time.Now().After(end) {
			return ok, err
		}
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(interval):
		}
	}
}
