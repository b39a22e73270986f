package install

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"meshupd/verify"
)

// Service says how one image of a release is run.
type Service struct {
	// Args are given to `podman run` or `ctr run` before the image; "{slot}" in them becomes the slot's name.
	Args []string
	// Command is given after the image, in the place of the image's own.
	Command []string
	// Unit is a systemd unit, Quadlet or other, that runs localhost/meshupd/SERVICE:current. It is restarted after that
	// reference was moved; meshupd then runs no container of its own for the service.
	Unit string
	// Beside starts the new container while the old one runs, and stops that one only after Ready and Switch.
	Beside bool
	// Ready exits with 0 once the new container serves; it is asked again until ReadyTimeout (30 s when zero) has passed.
	Ready        []string
	ReadyTimeout time.Duration
	// Switch leads what comes in to the new container, before the old one is stopped. It is not run when the new
	// container ran before.
	Switch []string
}

// pin ties a service in a slot to the one image that was verified for it.
type pin struct {
	// ID is what the engine calls the image by: the digest of its config (podman) or manifest (containerd).
	ID verify.Digest `json:"id"`
	// Archive is the digest of the signed archive; zero for what the factory loaded.
	Archive verify.Digest `json:"archive"`
}

const (
	pinsSchema = "meshupd.services/1"
	maxPins    = 256 << 10
)

// parsePins reads services.json.
func parsePins(data []byte) (map[string]pin, error) {
	var pins map[string]pin
	if err := unseal(data, pinsSchema, maxPins, &pins); err != nil {
		return nil, err
	}
	for name, p := range pins {
		if !plainName(name) || p.ID.IsZero() {
			return nil, verify.Refuse(verify.CodeFormat, "read the services of a slot: %.64q is no name, or has no image", name)
		}
	}
	return pins, nil
}

// services starts and stops what a slot holds.
type services struct {
	engine  engine
	defined map[string]Service
	systemd func(ctx context.Context, verb, unit string) error
	timeout time.Duration // of a switch command
	again   time.Duration // for how long what is missing is looked for
}

// want says what container a service of a slot is.
func (s *services) want(service string, slot SlotName, p pin) wanted {
	def := s.defined[service]
	w := wanted{name: containerName(service, slot), ref: slotRef(service, slot), command: def.Command}
	for _, arg := range def.Args {
		w.args = append(w.args, strings.ReplaceAll(arg, "{slot}", string(slot)))
	}
	spec, _ := json.Marshal([]any{p.ID, w.args, w.command}) // strings always encode
	sum := sha256.Sum256(spec)
	w.spec = hex.EncodeToString(sum[:16])
	return w
}

// start makes the services of a slot run and all others of ours stop. What already runs exactly as it should is left
// alone, so a start can be repeated at any time. With afresh units are restarted too.
func (s *services) start(ctx context.Context, slot SlotName, version string, pins map[string]pin, afresh bool) error {
	if err := s.missing(ctx, slot, pins); err != nil {
		return err
	}
	there, err := s.engine.containers(ctx)
	if err != nil {
		return err
	}
	keep := make(map[string]bool)
	for _, service := range slices.Sorted(maps.Keys(pins)) {
		if unit := s.defined[service].Unit; unit != "" {
			if err := s.startUnit(ctx, service, unit, pins[service], slot, afresh); err != nil {
				return fmt.Errorf("service %s: %w", service, err)
			}
			continue
		}
		w := s.want(service, slot, pins[service])
		keep[w.name] = true
		if c, found := there[w.name]; found && c.running && c.spec == w.spec {
			if err := s.stop(ctx, there, containerName(service, slot.Other())); err != nil {
				return fmt.Errorf("service %s: %w", service, err)
			}
			continue
		}
		if err := s.startOne(ctx, service, slot, version, w, there); err != nil {
			return fmt.Errorf("service %s: %w", service, err)
		}
	}
	return s.stopRest(ctx, there, pins, keep)
}

// startOne starts one container, after the old one or beside it.
func (s *services) startOne(ctx context.Context, service string, slot SlotName, version string, w wanted, there map[string]container) error {
	def, old := s.defined[service], containerName(service, slot.Other())
	if err := s.stop(ctx, there, w.name); err != nil {
		return err
	}
	if !def.Beside {
		if err := s.stop(ctx, there, old); err != nil {
			return err
		}
		return s.engine.run(ctx, w)
	}
	if err := s.engine.run(ctx, w); err != nil {
		return err
	}
	env := append(slotEnv(slot, version), "MESHUPD_SERVICE="+service, "MESHUPD_CONTAINER="+w.name)
	if err := s.ready(ctx, def, w.name, env); err != nil {
		// The old one still serves; the new one must not get in its way.
		return withCause(err, s.engine.remove(context.WithoutCancel(ctx), w.name))
	}
	if len(def.Switch) > 0 {
		c := command{argv: def.Switch, env: env, timeout: s.timeout}
		if err := c.run(ctx); err != nil {
			return fmt.Errorf("switch over: %w", err)
		}
	}
	return s.stop(ctx, there, old)
}

// ready waits until the new container serves. One that ends is not waited for.
func (s *services) ready(ctx context.Context, def Service, name string, env []string) error {
	if len(def.Ready) == 0 {
		return s.alive(ctx, name, 0)
	}
	var last error
	ok, err := until(ctx, orElse(def.ReadyTimeout, 30*time.Second), 200*time.Millisecond, func() (bool, error) {
		c := command{argv: def.Ready, env: env, timeout: orElse(def.ReadyTimeout, 30*time.Second)}
		if last = c.run(ctx); last == nil {
			return true, nil
		}
		return false, s.alive(ctx, name, 0)
	})
	if err != nil || ok {
		return err
	}
	return verify.Refuse(verify.CodeHealth, "%s is not ready: %w", name, last)
}

// alive returns an E-HEALTH when a container does not run, or was started again since it had that pid (0: any).
func (s *services) alive(ctx context.Context, name string, pid int) error {
	there, err := s.engine.containers(ctx)
	if err != nil {
		return err
	}
	return s.ended(ctx, there, name, pid)
}

func (s *services) ended(ctx context.Context, there map[string]container, name string, pid int) error {
	c, found := there[name]
	what := ""
	switch {
	case !found:
		return verify.Refuse(verify.CodeHealth, "container %s is gone", name)
	case !c.running:
		what = "ended"
	case pid != 0 && c.pid != pid:
		what = "ended and was started again"
	default:
		return nil
	}
	if line := s.engine.lastLine(ctx, name); line != "" {
		return verify.Refuse(verify.CodeHealth, "container %s %s: %s", name, what, line)
	}
	return verify.Refuse(verify.CodeHealth, "container %s %s", name, what)
}

func (s *services) startUnit(ctx context.Context, service, unit string, p pin, slot SlotName, afresh bool) error {
	have, err := s.engine.images(ctx)
	if err != nil {
		return err
	}
	if have[currentRef(service)] != p.ID {
		if err := s.engine.tag(ctx, slotRef(service, slot), currentRef(service)); err != nil {
			return err
		}
		afresh = true
	}
	if !afresh {
		// The machine's own start runs it; here it is only made sure of.
		return s.systemd(ctx, "start", unit)
	}
	return s.systemd(ctx, "restart", unit)
}

// stopRest stops what is not part of the slot: containers of ours, and units of services that the release has not.
func (s *services) stopRest(ctx context.Context, there map[string]container, pins map[string]pin, keep map[string]bool) error {
	for _, name := range slices.Sorted(maps.Keys(there)) {
		if !keep[name] {
			if err := s.stop(ctx, there, name); err != nil {
				return err
			}
		}
	}
	for _, service := range slices.Sorted(maps.Keys(s.defined)) {
		if _, part := pins[service]; part || s.defined[service].Unit == "" {
			continue
		}
		have, err := s.engine.images(ctx)
		if err != nil {
			return err
		}
		if _, runs := have[currentRef(service)]; !runs {
			continue
		}
		if err := s.systemd(ctx, "stop", s.defined[service].Unit); err != nil {
			return err
		}
		if err := s.engine.untag(ctx, currentRef(service)); err != nil {
			return err
		}
	}
	return nil
}

// stop removes a container if it is there, and takes note of that.
func (s *services) stop(ctx context.Context, there map[string]container, name string) error {
	if _, found := there[name]; !found {
		return nil
	}
	if err := s.engine.remove(ctx, name); err != nil {
		return fmt.Errorf("stop %s: %w", name, err)
	}
	delete(there, name)
	return nil
}

// missing refuses with E-BOOT when the engine lacks an image of the slot, or has another under its reference. It looks more
// than once: a busy containerd was seen to call an image incomplete that it had just called complete.
func (s *services) missing(ctx context.Context, slot SlotName, pins map[string]pin) error {
	var lacks error
	_, err := until(ctx, s.again, s.again/4, func() (bool, error) {
		lacks = s.lacks(ctx, slot, pins)
		return lacks == nil, ctx.Err()
	})
	if err != nil {
		return err
	}
	return lacks
}

func (s *services) lacks(ctx context.Context, slot SlotName, pins map[string]pin) error {
	have, err := s.engine.images(ctx)
	if err != nil {
		return err
	}
	for _, service := range slices.Sorted(maps.Keys(pins)) {
		if have[slotRef(service, slot)] != pins[service].ID {
			return verify.Refuse(verify.CodeBoot, "the engine has not the image of service %s that slot %s holds", service, slot)
		}
	}
	return nil
}

// systemctl runs a verb on a unit.
func systemctl(timeout time.Duration) func(ctx context.Context, verb, unit string) error {
	return func(ctx context.Context, verb, unit string) error {
		c := command{argv: []string{"systemctl", verb, "--", unit}, timeout: timeout}
		if err := c.run(ctx); err != nil {
			return fmt.Errorf("%s unit %s: %w", verb, unit, err)
		}
		return nil
	}
}

// withCause adds what also went wrong to an error without hiding its code.
func withCause(err, also error) error {
	if also == nil {
		return err
	}
	return verify.Refuse(verify.CodeOf(err), "%w; then: %v", err, also)
}
