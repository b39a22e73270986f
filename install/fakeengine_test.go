package install

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"meshupd/verify"
)

// ContainersWith puts faults and a simulated systemd into Containers.
func ContainersWith(cfg ContainersConfig, step func(name string, do func() error) error, systemd func(ctx context.Context, verb, unit string) error) ContainersConfig {
	cfg.step, cfg.systemd = step, systemd
	if _, fake := cfg.Engine.(*FakeEngine); fake {
		cfg.again = time.Nanosecond // it never errs
	}
	return cfg
}

// FakeEngine is a container engine in memory. It takes in what a real one is given, and keeps it across restarts.
type FakeEngine struct {
	mu     sync.Mutex // owns all below
	Images map[string]verify.Digest
	Run    map[string]FakeContainer
	Fail   func(name string) string // when a started container ends at once, what it says; nil: none does
	Down   bool                     // the engine does not answer
	power  int
	flaky  string
}

// FakeContainer is a container of FakeEngine.
type FakeContainer struct {
	Ref     string
	Image   verify.Digest
	Running bool
	Args    []string
	spec    string
	pid     int
	said    string
}

// Power says in which start of the machine the engine is; containers do not outlast one.
func (f *FakeEngine) Power(now int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now == f.power {
		return
	}
	f.power = now
	for name, c := range f.Run {
		c.Running = false
		f.Run[name] = c
	}
}

// End ends a container.
func (f *FakeEngine) End(name, said string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.Run[name]
	c.Running, c.said = false, said
	f.Run[name] = c
}

// Restarts lets a container end and start again as soon as somebody has looked at it.
func (f *FakeEngine) Restarts(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.flaky = name
}

// Stop makes the engine not answer any more.
func (f *FakeEngine) Stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.Down = true
}

// Running lists what runs: image by container.
func (f *FakeEngine) Running() map[string]verify.Digest {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make(map[string]verify.Digest)
	for name, c := range f.Run {
		if c.Running {
			out[name] = c.Image
		}
	}
	return out
}

// Held lists the images by reference.
func (f *FakeEngine) Held() map[string]verify.Digest {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.Images)
}

// Change changes the images behind the back of whoever uses the engine.
func (f *FakeEngine) Change(change func(images map[string]verify.Digest)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f.Images)
}

func (f *FakeEngine) open(engineEnv) (engine, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.Images == nil {
		f.Images, f.Run = make(map[string]verify.Digest), make(map[string]FakeContainer)
	}
	return (*fakeEngine)(f), nil
}

type fakeEngine FakeEngine

func (f *fakeEngine) lock() func() { f.mu.Lock(); return f.mu.Unlock }

func (f *fakeEngine) ready(context.Context) error {
	defer f.lock()()
	if f.Down {
		return errors.New("no answer")
	}
	return nil
}

func (f *fakeEngine) id(a *ociArchive) verify.Digest { return a.config }

func (f *fakeEngine) images(context.Context) (map[string]verify.Digest, error) {
	defer f.lock()()
	found := make(map[string]verify.Digest)
	for ref, id := range f.Images {
		if ours(ref) {
			found[ref] = id
		}
	}
	return found, nil
}

func (f *fakeEngine) load(_ context.Context, archive io.Reader) error {
	data, err := io.ReadAll(archive)
	if err != nil {
		return err
	}
	at := bytes.NewReader(data)
	a, err := openArchive(at, at)
	if err != nil {
		return err
	}
	var idx struct {
		Manifests []struct{ Annotations map[string]string }
	}
	raw, err := tarEntry(data, "index.json")
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, &idx); err != nil || len(idx.Manifests) != 1 {
		return fmt.Errorf("index %s: %v", raw, err)
	}
	defer f.lock()()
	f.Images[idx.Manifests[0].Annotations["io.containerd.image.name"]] = a.config
	return nil
}

func tarEntry(data []byte, name string) ([]byte, error) {
	in := tar.NewReader(bytes.NewReader(data))
	for {
		h, err := in.Next()
		if err != nil {
			return nil, err
		}
		if h.Name == name {
			return io.ReadAll(in)
		}
	}
}

func (f *fakeEngine) tag(_ context.Context, from, to string) error {
	defer f.lock()()
	id, found := f.Images[from]
	if !found {
		return fmt.Errorf("no image %s", from)
	}
	f.Images[to] = id
	return nil
}

func (f *fakeEngine) untag(_ context.Context, ref string) error {
	defer f.lock()()
	for name, c := range f.Run {
		if c.Ref == ref {
			return fmt.Errorf("image is in use by a container: %s", name)
		}
	}
	delete(f.Images, ref)
	return nil
}

func (f *fakeEngine) containers(context.Context) (map[string]container, error) {
	defer f.lock()()
	found := make(map[string]container)
	for name, c := range f.Run {
		if c.spec != "" {
			found[name] = container{running: c.Running, pid: c.pid, spec: c.spec}
		}
		if name == f.flaky {
			c.pid++
			f.Run[name] = c
		}
	}
	return found, nil
}

func (f *fakeEngine) run(_ context.Context, w wanted) error {
	defer f.lock()()
	id, found := f.Images[w.ref]
	if !found {
		return fmt.Errorf("no image %s", w.ref)
	}
	if _, there := f.Run[w.name]; there {
		return fmt.Errorf("the name %s is in use", w.name)
	}
	c := FakeContainer{Ref: w.ref, Image: id, Running: true, Args: w.args, spec: w.spec, pid: len(f.Run) + 100}
	if f.Fail != nil {
		c.said = f.Fail(w.name)
		c.Running = c.said == ""
	}
	f.Run[w.name] = c
	return nil
}

func (f *fakeEngine) remove(_ context.Context, name string) error {
	defer f.lock()()
	delete(f.Run, name)
	return nil
}

func (f *fakeEngine) lastLine(_ context.Context, name string) string {
	defer f.lock()()
	return f.Run[name].said
}

// CleanArchive is what an engine is given of an archive, and what image it is.
func CleanArchive(data []byte, ref string) (out []byte, manifest, config verify.Digest, err error) {
	at := bytes.NewReader(data)
	a, err := openArchive(at, at)
	if err != nil {
		return nil, manifest, config, err
	}
	r, err := a.stream(ref)
	if err != nil {
		return nil, manifest, config, err
	}
	out, err = io.ReadAll(r)
	return out, a.manifest, a.config, err
}

// ParseEngineOutput gives bytes to every reader of what an engine prints, and returns the images and podman containers found.
func ParseEngineOutput(data []byte) (names []string) {
	images, _ := parsePodmanImages(data)
	containers, _ := parsePodmanContainers(data)
	names = append(slices.Collect(maps.Keys(images)), slices.Collect(maps.Keys(containers))...)
	names = append(names, slices.Collect(maps.Keys(parseCtrImages(data)))...)
	parseCtrTasks(data)
	_, _ = parsePins(data)
	return names
}
