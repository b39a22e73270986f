package main

import (
	"fmt"
	"net/url"
	"path/filepath"
	"regexp"
	"time"

	"meshupd/install"
)

// HealthConfig says when a trial counts as healthy: when every check passes. Without one a version that starts is healthy.
type HealthConfig struct {
	Command  []string `toml:"command" comment:"exit 0 means healthy; empty: a version that starts is taken for healthy"`
	HTTP     []string `toml:"http" comment:"addresses on this machine that have to answer with 2xx"`
	Units    []string `toml:"units" comment:"systemd units that have to be active"`
	Files    []string `toml:"files" comment:"files that have to be there"`
	Fresh    Duration `toml:"fresh" comment:"how recently the files must have changed; \"0s\": at any time"`
	Grace    Duration `toml:"grace" comment:"time before the first round of checks"`
	Deadline Duration `toml:"deadline" comment:"a trial that is not healthy by then is rolled back"`
	Interval Duration `toml:"interval" comment:"time between two rounds"`
	Timeout  Duration `toml:"timeout" comment:"how long one check may take"`
	Passes   int      `toml:"passes" comment:"good rounds after each other that are wanted, 1 to 1000"`
	Retries  int      `toml:"retries" comment:"failed rounds that are borne before the deadline; 0: no limit"`
}

func defaultHealth() HealthConfig {
	return HealthConfig{Command: []string{}, HTTP: []string{}, Units: []string{}, Files: []string{}, Deadline: Duration(2 * time.Minute),
		Interval: Duration(2 * time.Second), Timeout: Duration(30 * time.Second), Passes: 1}
}

// unitPattern is what systemd allows in the name of a unit (systemd.unit(5)), with a suffix.
var unitPattern = regexp.MustCompile(`^[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]{0,250}\.[a-z]+$`)

func (c *Config) checkHealth() error {
	h := c.Health
	switch {
	case len(h.Command) > 0 && h.Command[0] == "":
		return &fieldError{"health.command", "names no command"}
	case h.Deadline < leastDuration:
		return &fieldError{"health.deadline", tooShort}
	case h.Interval < leastDuration:
		return &fieldError{"health.interval", tooShort}
	case h.Timeout < leastDuration:
		return &fieldError{"health.timeout", tooShort}
	case h.Grace != 0 && h.Grace < leastDuration:
		return &fieldError{"health.grace", tooShort}
	case h.Grace >= h.Deadline:
		return &fieldError{"health.grace", "is not shorter than health.deadline"}
	case h.Fresh != 0 && h.Fresh < leastDuration:
		return &fieldError{"health.fresh", tooShort}
	case h.Passes < 1 || h.Passes > 1000:
		return &fieldError{"health.passes", "is not 1 to 1000"}
	case h.Retries < 0 || h.Retries > 1000:
		return &fieldError{"health.retries", "is not 0 to 1000"}
	}
	for _, text := range h.HTTP {
		if u, err := url.Parse(text); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil {
			return &fieldError{"health.http", fmt.Sprintf("has %q, which is not like \"http://127.0.0.1:8080/health\"", text)}
		}
	}
	for _, unit := range h.Units {
		if !unitPattern.MatchString(unit) {
			return &fieldError{"health.units", fmt.Sprintf("has %q, which is not a unit like \"kiosk.service\"", unit)}
		}
	}
	for _, file := range h.Files {
		if !filepath.IsAbs(file) {
			return &fieldError{"health.files", fmt.Sprintf("has %q, which does not begin with /", file)}
		}
	}
	return nil
}

// health are the checks of the config, and the hook.
func (c *Config) health() install.Health {
	h := c.Health
	return install.Health{Hooks: c.hooks(), Command: h.Command, HTTP: h.HTTP, Units: h.Units, Files: h.Files, Fresh: time.Duration(h.Fresh),
		Grace: time.Duration(h.Grace), Deadline: time.Duration(h.Deadline), Interval: time.Duration(h.Interval),
		Timeout: time.Duration(h.Timeout), Passes: h.Passes, Retries: h.Retries}
}
