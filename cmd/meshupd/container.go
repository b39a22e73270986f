package main

import (
	"context"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"meshupd/install"
	"meshupd/verify"
)

// ContainerConfig says where containers run.
type ContainerConfig struct {
	Engine    string                   `toml:"engine" comment:"\"podman\" or \"containerd\""`
	Command   []string                 `toml:"command" comment:"the engine's tool with options that are always given; empty: podman, or ctr"`
	Address   string                   `toml:"address" comment:"containerd: its socket; empty: the tool's default"`
	Namespace string                   `toml:"namespace" comment:"containerd: namespace that only meshupd uses"`
	Stop      Duration                 `toml:"stop" comment:"how long a service may take to end"`
	Settle    Duration                 `toml:"settle" comment:"how long services on trial have to run, besides their health"`
	Services  map[string]ServiceConfig `toml:"services" comment:"what is run: [slots.container.services.NAME], NAME as the image in the release"`
}

// ServiceConfig says how one service is run: as a unit, or by meshupd with these arguments.
type ServiceConfig struct {
	Args         []string `toml:"args" comment:"for podman run or ctr run; \"{slot}\" becomes a or b"`
	Command      []string `toml:"command" comment:"in the place of the image's own"`
	Unit         string   `toml:"unit" comment:"systemd unit, or Quadlet, that runs localhost/meshupd/NAME:current; it is restarted"`
	Beside       bool     `toml:"beside" comment:"start the new container before the old one is stopped"`
	Ready        []string `toml:"ready" comment:"beside: exits 0 once MESHUPD_CONTAINER serves"`
	ReadyTimeout Duration `toml:"ready_timeout" comment:"beside: how long that may take; 30s"`
	Switch       []string `toml:"switch" comment:"beside: leads what comes in to MESHUPD_CONTAINER"`
}

func (c *Config) checkContainers() error {
	con := c.Slots.Container
	switch {
	case con.Engine != "podman" && con.Engine != "containerd":
		return &fieldError{"slots.container.engine", `is neither "podman" nor "containerd"`}
	case len(con.Command) > 0 && con.Command[0] == "":
		return &fieldError{"slots.container.command", "names no command"}
	case con.Engine == "containerd" && !namePattern.MatchString(con.Namespace):
		return &fieldError{"slots.container.namespace", "is not a name of a-z, 0-9, '.', '_' and '-'"}
	case con.Stop < leastDuration:
		return &fieldError{"slots.container.stop", tooShort}
	case con.Settle < leastDuration:
		return &fieldError{"slots.container.settle", tooShort}
	case len(c.Slots.Restart) > 0:
		return &fieldError{"slots.restart", "is not for containers: services are started as slots.container.services says"}
	case len(con.Services) == 0:
		return &fieldError{"slots.container.services", "has no service"}
	}
	for _, name := range slices.Sorted(maps.Keys(con.Services)) {
		if err := con.Services[name].check("slots.container.services." + name); err != nil {
			return err
		}
		if !namePattern.MatchString(name) {
			return &fieldError{"slots.container.services." + name, "is not a name of a-z, 0-9, '.', '_' and '-'"}
		}
	}
	return nil
}

func (s ServiceConfig) check(key string) error {
	for name, command := range map[string][]string{"command": s.Command, "ready": s.Ready, "switch": s.Switch} {
		if len(command) > 0 && command[0] == "" {
			return &fieldError{key + "." + name, "names no command"}
		}
	}
	switch {
	case s.Unit != "" && (strings.HasPrefix(s.Unit, "-") || strings.ContainsAny(s.Unit, "/ ")):
		return &fieldError{key + ".unit", "is not the name of a unit"}
	case s.Unit != "" && (s.Beside || len(s.Args)+len(s.Command)+len(s.Ready)+len(s.Switch) > 0):
		return &fieldError{key + ".unit", "says how the service runs, so no other key can"}
	case !s.Beside && len(s.Ready) > 0:
		return &fieldError{key + ".ready", "is only for a service with beside = true"}
	case !s.Beside && len(s.Switch) > 0:
		return &fieldError{key + ".switch", "is only for a service with beside = true"}
	case s.ReadyTimeout != 0 && s.ReadyTimeout < leastDuration:
		return &fieldError{key + ".ready_timeout", tooShort}
	}
	return nil
}

// takes are the kinds of images that the slots can hold.
func (s SlotsConfig) takes() []verify.Kind {
	if s.Kind == "container" {
		return []verify.Kind{verify.KindContainer}
	}
	return []verify.Kind{verify.KindSlot, verify.KindFiles}
}

func openContainers(ctx context.Context, cfg Config) (*install.Containers, error) {
	con := cfg.Slots.Container
	folder := cfg.Slots.Folder
	if folder == "" {
		folder = filepath.Join(cfg.State, "slots")
	}
	var engine install.Engine = install.Podman{Command: con.Command}
	if con.Engine == "containerd" {
		engine = install.Containerd{Command: con.Command, Address: con.Address, Namespace: con.Namespace}
	}
	services := make(map[string]install.Service, len(con.Services))
	for name, s := range con.Services {
		services[name] = install.Service{Args: s.Args, Command: s.Command, Unit: s.Unit, Beside: s.Beside,
			Ready: s.Ready, ReadyTimeout: time.Duration(s.ReadyTimeout), Switch: s.Switch}
	}
	return install.OpenContainers(ctx, install.ContainersConfig{
		Dir: folder, Engine: engine, Services: services, FactoryVersion: cfg.Slots.Factory, Starts: cfg.Slots.Starts,
		Timeout: time.Duration(cfg.Slots.RestartTimeout), Stop: time.Duration(con.Stop), Settle: time.Duration(con.Settle),
	})
}
