package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"meshupd/install"
	"meshupd/peer"
	"meshupd/verify"
)

// HooksConfig says where the integrator's executables are that are run at certain moments: pre-install, post-install,
// pre-reboot, health and state.
type HooksConfig struct {
	Dir     string   `toml:"dir" comment:"folder of the executables pre-install, post-install, pre-reboot, health and state; each may be missing; empty: none is run"`
	Timeout Duration `toml:"timeout" comment:"how long one may take"`
}

func defaultHooks() HooksConfig {
	return HooksConfig{Dir: "/etc/meshupd/hooks.d", Timeout: Duration(30 * time.Second)}
}

func (c *Config) checkHooks() error {
	switch {
	case c.Hooks.Dir != "" && !filepath.IsAbs(c.Hooks.Dir):
		return &fieldError{"hooks.dir", "is no absolute path"}
	case c.Hooks.Timeout < leastDuration:
		return &fieldError{"hooks.timeout", tooShort}
	}
	return nil
}

// hooks are those of the config, for the process that calls: one that runs as root runs nothing that others can change.
func (c *Config) hooks() install.Hooks {
	return install.Hooks{Dir: c.Hooks.Dir, Timeout: time.Duration(c.Hooks.Timeout), Guard: os.Geteuid() == 0,
		Env: []string{"MESHUPD_PRODUCT=" + c.Product, "MESHUPD_HARDWARE=" + c.Hardware, "MESHUPD_CHANNEL=" + c.Channel, "MESHUPD_KIND=" + c.Slots.Kind}}
}

// hooked puts the hooks around slots; state is the folder of the process that writes them.
func (c *Config) hooked(slots startedSlots, state string, log *slog.Logger) (startedSlots, error) {
	if c.Hooks.Dir == "" {
		return slots, nil
	}
	if names := c.hooks().Strange(); len(names) > 0 {
		log.Warn("the folder of the hooks has files that are no hooks", "dir", c.Hooks.Dir, "names", names)
	}
	return install.OpenHooked(slots, c.hooks(), filepath.Join(state, "hooks"))
}

// maxStates is how many changes of state may wait for the state hook. A hook that is slower than that misses the oldest.
const maxStates = 32

// stateHook tells the state hook what this device became, one change after the other.
type stateHook struct {
	hooks install.Hooks
	log   *slog.Logger
	queue chan []string
	last  peer.DeviceStatus // the loop of the node owns it
}

func newStateHook(cfg Config, log *slog.Logger) *stateHook {
	return &stateHook{hooks: cfg.hooks(), log: log, queue: make(chan []string, maxStates)}
}

// changed is called by the loop of the node: it never waits.
func (s *stateHook) changed(st peer.DeviceStatus) {
	before := s.last
	if st.State == before.State && st.Version == before.Version && st.Target == before.Target && codeIn(st) == codeIn(before) {
		return
	}
	s.last = st
	env := []string{"MESHUPD_STATE=" + st.State, "MESHUPD_PREVIOUS=" + before.State, "MESHUPD_RUNNING=" + st.Version,
		"MESHUPD_TARGET=" + st.Target, "MESHUPD_CODE=" + string(codeIn(st)), "MESHUPD_REASON="}
	if st.Reason != nil {
		env[len(env)-1] += shown(st.Reason.Detail, 256)
	}
	for {
		select {
		case s.queue <- env:
			return
		default:
		}
		select {
		case missed := <-s.queue:
			s.log.Warn("the state hook is too slow, and is not told a change", "change", missed[0])
		default:
		}
	}
}

func codeIn(st peer.DeviceStatus) verify.Code {
	if st.Reason == nil {
		return ""
	}
	return st.Reason.Code
}

// run runs the hook until ctx ends.
func (s *stateHook) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case env := <-s.queue:
			if err := s.hooks.Run(ctx, install.HookState, env...); err != nil && ctx.Err() == nil {
				s.log.Warn("the state hook failed", "code", verify.CodeOf(err), "err", err)
			}
		}
	}
}
