package install

import (
	"context"
	"encoding/json"
	"io"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"meshupd/verify"
)

// Podman is the container engine podman, 4 or newer, by its command line.
type Podman struct {
	// Command and its options, as ["podman", "--root", "/data/containers"]; podman when empty.
	Command []string
}

func (p Podman) open(env engineEnv) (engine, error) {
	argv, err := orTool(p.Command, "podman")
	return &podman{cli{argv, env.timeout}, env.stop}, err
}

type podman struct {
	cli
	stop time.Duration
}

func (p *podman) ready(ctx context.Context) error {
	return p.do(ctx, "version", "--format", "{{.Client.Version}}")
}

// id is the config's digest: it covers the layers as they are unpacked.
func (p *podman) id(a *ociArchive) verify.Digest { return a.config }

func (p *podman) images(ctx context.Context) (map[string]verify.Digest, error) {
	out, err := p.ask(ctx, "images", "--no-trunc", "--format", "json", "--filter", "reference="+imagePrefix+"*")
	if err != nil {
		return nil, err
	}
	return parsePodmanImages(out)
}

func parsePodmanImages(data []byte) (map[string]verify.Digest, error) {
	var list []struct {
		ID    string   `json:"Id"`
		Names []string `json:"Names"`
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, verify.Refuse(verify.CodeFormat, "read podman's list of images: %w", err)
	}
	found := make(map[string]verify.Digest)
	for _, one := range list {
		id, err := verify.ParseDigest(strings.TrimPrefix(one.ID, "sha256:"))
		if err != nil {
			continue
		}
		for _, name := range one.Names {
			if ours(name) {
				found[name] = id
			}
		}
	}
	return found, nil
}

// load syncs everything: podman syncs its lists, and not the files that it unpacks.
func (p *podman) load(ctx context.Context, archive io.Reader) error {
	err := p.call(ctx, archive, nil, []string{"load", "--quiet"})
	unix.Sync()
	return err
}

func (p *podman) tag(ctx context.Context, from, to string) error { return p.do(ctx, "tag", from, to) }

func (p *podman) untag(ctx context.Context, ref string) error {
	return p.do(ctx, "rmi", "--ignore", "--no-prune", ref)
}

func (p *podman) containers(ctx context.Context) (map[string]container, error) {
	out, err := p.ask(ctx, "ps", "--all", "--no-trunc", "--format", "json", "--filter", "label="+specLabel)
	if err != nil {
		return nil, err
	}
	return parsePodmanContainers(out)
}

func parsePodmanContainers(data []byte) (map[string]container, error) {
	var list []struct {
		Names  []string          `json:"Names"`
		State  string            `json:"State"`
		Pid    int               `json:"Pid"`
		Labels map[string]string `json:"Labels"`
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, verify.Refuse(verify.CodeFormat, "read podman's list of containers: %w", err)
	}
	found := make(map[string]container)
	for _, one := range list {
		spec, labelled := one.Labels[specLabel]
		if !labelled || len(one.Names) != 1 || !strings.HasPrefix(one.Names[0], containerPrefix) {
			continue
		}
		found[one.Names[0]] = container{running: one.State == "running", pid: one.Pid, spec: spec}
	}
	return found, nil
}

func (p *podman) run(ctx context.Context, c wanted) error {
	// Without --pull=never an image that is gone would be looked for on the network.
	args := []string{"run", "--detach", "--pull=never", "--name", c.name, "--label", specLabel + "=" + c.spec}
	return p.do(ctx, append(append(append(args, c.args...), c.ref), c.command...)...)
}

func (p *podman) remove(ctx context.Context, name string) error {
	long := p.cli
	long.timeout += p.stop
	return long.do(ctx, "rm", "--force", "--ignore", "--volumes", "--time", seconds(p.stop), name)
}

func (p *podman) lastLine(ctx context.Context, name string) string {
	var said tail
	cmd := command{argv: append(append([]string(nil), p.argv...), "logs", "--tail", "1", name), timeout: p.timeout, stdout: &said, stderr: &said}
	if cmd.run(ctx) != nil {
		return ""
	}
	return said.lastLine()
}
