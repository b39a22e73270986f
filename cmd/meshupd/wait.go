package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/verify"
)

// goals of wait: how far a device has to be. Each includes those before it.
var goals = map[string]int{"fetched": 1, "installed": 2, "confirmed": 4}

func newWaitCmd(e *env) *cobra.Command {
	w := waiter{env: e}
	cmd := &cobra.Command{
		Use:   "wait",
		Short: "Wait until the site is there, for scripts",
		Long: "Wait until every device of the site has fetched, installed or confirmed a version.\n" +
			"Exit 0 when it is so, 8 when --timeout came first; then it says who is missing and why.",
		Example: example(
			"meshupd wait --for=confirmed --timeout=30m",
			"meshupd wait --for=fetched --version=2.4.0 --devices=12"),
		Args: takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if _, ok := goals[w.goal]; !ok {
				return usage("--for is fetched, installed or confirmed, not %q", w.goal)
			}
			if w.devices < 0 {
				return usage("--devices is less than nothing")
			}
			return w.run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&w.goal, "for", "confirmed", "fetched, installed or confirmed")
	cmd.Flags().StringVar(&w.version, "version", "", "which version; default: the newest release that this device knows")
	cmd.Flags().IntVar(&w.devices, "devices", 0, "enough when so many devices are there; default: all that are known")
	return talksToDaemon(e, cmd)
}

type waiter struct {
	*env
	goal    string
	version string
	devices int
}

// progress of a wait, as one status shows it.
type progress struct {
	version string // waited for; "" while no release is known
	there   []control.DeviceStatus
	missing []control.DeviceStatus
	need    int
}

func (p progress) done() bool { return p.version != "" && len(p.there) >= p.need }

func (w *waiter) run(ctx context.Context) error {
	client := w.client()
	defer client.Close()
	var last control.SiteStatus
	told := ""
	err := follow(ctx, client, func(err error) { w.sayf("waiting for the daemon: %s", err) }, func(st control.SiteStatus) (bool, error) {
		last = st
		p := w.judge(st)
		if line := w.line(p); line != told && !p.done() {
			told = line
			w.sayf("%s", line)
		}
		return p.done(), nil
	})
	p := w.judge(last)
	if err == nil {
		return w.tell(p)
	}
	if !errors.Is(err, context.DeadlineExceeded) || last.Schema == "" {
		return err
	}
	if w.json == "" {
		w.sayMissing(last, p)
	}
	return verify.Refuse(verify.CodeTimeout, "%s after %s", w.line(p), w.timeout)
}

// judge is pure: who is there, and who is not.
func (w *waiter) judge(st control.SiteStatus) progress {
	p := progress{version: w.version, need: w.devices}
	if p.version == "" && st.Release != nil {
		p.version = st.Release.Version
	}
	for _, d := range st.Devices {
		if p.version != "" && reached(d, p.version) >= goals[w.goal] {
			p.there = append(p.there, d)
		} else {
			p.missing = append(p.missing, d)
		}
	}
	if p.need == 0 {
		p.need = max(len(st.Devices), 1)
	}
	return p
}

// reached says how far a device is with a version, on the scale of goals. What a silent device reached is not known.
func reached(d control.DeviceStatus, version string) int {
	switch {
	case d.State == control.StateConfirmed && d.Version == version:
		return 4
	case d.Target != version && d.Version != version:
		return 0
	}
	switch d.State {
	case control.StateFetched:
		return 1
	case control.StateInstalled:
		return 2
	case control.StateTrial:
		return 3
	}
	return 0
}

func (w *waiter) line(p progress) string {
	if p.version == "" {
		return "no release is known yet"
	}
	return fmt.Sprintf("%d of %d devices have %s %s", len(p.there), p.need, w.goal, w.canvas(w.Err).Clean(p.version))
}

func (w *waiter) tell(p progress) error {
	if w.json != "" {
		return w.printObject("meshupd.wait/1", map[string]any{"for": w.goal, "version": p.version,
			"devices": len(p.there), "needed": p.need})
	}
	_, err := fmt.Fprintln(w.Out, w.line(p))
	return err
}

// sayMissing names who is not there and why, the first twenty.
func (w *waiter) sayMissing(st control.SiteStatus, p progress) {
	const most = 20
	c := w.canvas(w.Err)
	t := screen.Table{Columns: []screen.Column{titled(deviceColumn, "MISSING"), versionColumn, stateColumn, {Title: "WHY", Min: 20}}}
	for _, d := range p.missing[:min(len(p.missing), most)] {
		reason := "-"
		if d.Reason != nil || slices.Contains([]control.State{control.StateSilent, control.StateBlocked, control.StateRolledBack}, d.State) {
			reason = why(c, st.GeneratedAt, d)
		}
		t.Rows = append(t.Rows, []string{c.Clean(d.Label()), versions(c, d), c.Clean(string(d.State)), reason})
	}
	w.sayf("%s", strings.TrimSuffix(t.Draw(c), "\n"))
	if more := len(p.missing) - most; more > 0 {
		w.sayf("and %d more", more)
	}
}
