package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/verify"
)

func newStatusCmd(e *env) *cobra.Command {
	var all, watch, exitCode bool
	cmd := &cobra.Command{
		Use:   "status [DEVICE]",
		Short: "Show the site as this device sees it",
		Long: "Show the site as this device sees it: what needs you first, then what is at work.\n" +
			"Only `confirmed` counts as done: the device started the version and proved healthy.",
		Example: example(
			"meshupd status",
			"meshupd status --watch",
			"meshupd status kiosk-31        all about one device",
			"meshupd status --json | jq '.devices[] | select(.state==\"blocked\")'"),
		Args:              takes(0, 1, "one DEVICE or none"),
		ValidArgsFunction: completeDevices(e),
		RunE: func(cmd *cobra.Command, args []string) error {
			v := statusView{env: e, all: all}
			if len(args) == 1 {
				v.device = args[0]
			}
			client := e.client()
			defer client.Close()
			if watch {
				return v.watch(cmd.Context(), client)
			}
			st, err := client.Status(cmd.Context(), 0)
			if err != nil {
				return err
			}
			if err := v.once(cmd.Context(), client, st); err != nil {
				return err
			}
			if exitCode {
				return notAllConfirmed(st)
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "show every device, also those that are fine")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on showing until interrupted; in a pipe one line for each change")
	cmd.Flags().BoolVar(&exitCode, "exit-code", false, "exit 11 when not all devices are confirmed")
	return talksToDaemon(e, cmd)
}

// exitError asks for an exit code without a message: the answer is on the screen already.
type exitError int

func (x exitError) Error() string { return fmt.Sprintf("exit %d", int(x)) }

// exitNotConfirmed is the opt-in code of status --exit-code.
const exitNotConfirmed exitError = 11

func notAllConfirmed(st control.SiteStatus) error {
	if confirmed(st) == len(st.Devices) {
		return nil
	}
	return exitNotConfirmed
}

// confirmed counts the devices that are done: on the site's release, not only on any.
func confirmed(st control.SiteStatus) int {
	n := 0
	for _, d := range st.Devices {
		if d.State == control.StateConfirmed && (st.Release == nil || d.Version == st.Release.Version) {
			n++
		}
	}
	return n
}

// oneDevice is a device of a status, alone.
type oneDevice struct {
	Schema string `json:"schema"`
	control.DeviceStatus
}

const deviceSchema = "meshupd.device/1"

// statusView is one way to show a status.
type statusView struct {
	*env
	all    bool
	device string // "" for the site
}

// once shows a status in the form that was asked for.
func (v statusView) once(ctx context.Context, client *control.Client, st control.SiteStatus) error {
	if v.device == "" {
		switch {
		case v.json != "":
			return v.printJSON(st, false)
		case v.plain:
			return v.print(plainStatus(v.canvas(v.Out), st))
		}
		return v.print(siteScreen(v.canvas(v.Out), st, v.all))
	}
	d, err := findDevice(st, v.device)
	if err != nil {
		return err
	}
	switch {
	case v.json != "":
		return v.printJSON(oneDevice{deviceSchema, d}, false)
	case v.plain:
		return v.print(plainDevice(v.canvas(v.Out), d))
	}
	history, err := client.History(ctx, d.ID, 5)
	if err != nil {
		return err
	}
	return v.print(deviceScreen(v.canvas(v.Out), st, d, history.Events))
}

func (e *env) print(s string) error {
	_, err := e.Out.Write([]byte(s))
	return err
}

// findDevice finds a device by name or id, or says which it may have been.
func findDevice(st control.SiteStatus, name string) (control.DeviceStatus, error) {
	var found []control.DeviceStatus
	near, best := "", 3
	for _, d := range st.Devices {
		if d.ID == name {
			return d, nil
		}
		if d.Name == name {
			found = append(found, d)
		}
		if dist := distance(name, d.Label()); len(d.Label()) < 256 && dist < best {
			near, best = d.Label(), dist
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return control.DeviceStatus{}, verify.Refuse(verify.CodeNotFound, "%d devices call themselves %q: name one by its id, as in status --plain", len(found), name)
	case near != "":
		return control.DeviceStatus{}, verify.Refuse(verify.CodeNotFound, "no device %q: did you mean %s?", name, near)
	}
	return control.DeviceStatus{}, verify.Refuse(verify.CodeNotFound, "no device %q among the %d of this site", name, len(st.Devices))
}

// watchPause keeps a busy site from redrawing more often than people read.
const watchPause = 500 * time.Millisecond

// follow hands on each new status until ctx ends or each says stop. A daemon that restarts is waited for.
func follow(ctx context.Context, client *control.Client, away func(error), each func(control.SiteStatus) (stop bool, err error)) error {
	var gen uint64
	for {
		st, err := client.Status(ctx, gen)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case verify.CodeOf(err) == verify.CodeDaemon && gen != 0:
			away(err)
		case err != nil:
			return err
		default:
			gen = st.Generation
			if stop, err := each(st); stop || err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(watchPause):
		}
	}
}

// watch redraws on a terminal; elsewhere it only ever appends lines.
func (v statusView) watch(ctx context.Context, client *control.Client) error {
	switch {
	case v.json != "":
		return follow(ctx, client, v.away, func(st control.SiteStatus) (bool, error) {
			if v.device == "" {
				return false, v.printJSON(st, true)
			}
			d, err := findDevice(st, v.device)
			if err != nil {
				return false, err
			}
			return false, v.printJSON(oneDevice{deviceSchema, d}, true)
		})
	case v.live(v.Out) && !v.plain:
		return follow(ctx, client, v.away, func(st control.SiteStatus) (bool, error) { return false, v.redraw(ctx, client, st) })
	}
	var last *control.SiteStatus
	return follow(ctx, client, v.away, func(st control.SiteStatus) (bool, error) {
		err := v.print(changeLines(v.canvas(v.Out), last, st, v.device))
		last = &st
		return false, err
	})
}

func (v statusView) away(err error) { v.sayf("waiting for the daemon: %s", err) }

// redraw draws from the top left; what does not fit the height is counted, not scrolled.
func (v statusView) redraw(ctx context.Context, client *control.Client, st control.SiteStatus) error {
	c := v.canvas(v.Out)
	text := ""
	if v.device == "" {
		text = siteScreen(c, st, v.all)
	} else {
		d, err := findDevice(st, v.device)
		if err != nil {
			return err
		}
		history, err := client.History(ctx, d.ID, 5)
		if err != nil {
			return err
		}
		text = deviceScreen(c, st, d, history.Events)
	}
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if most := c.Height - 1; len(lines) > most && most > 2 {
		lines = append(lines[:most-1], fmt.Sprintf("%d more lines: make the window taller, or use `meshupd status`", len(lines)-most+1))
	}
	var b strings.Builder
	b.WriteString("\x1b[H")
	for _, line := range lines {
		b.WriteString(line + "\x1b[K\n")
	}
	b.WriteString("\x1b[J")
	return v.print(b.String())
}

// completeDevices offers the names of the site's devices to the shell.
func completeDevices(e *env) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
		defer cancel()
		client := e.client()
		defer client.Close()
		st, err := client.Status(ctx, 0)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		c := e.canvas(e.Out)
		c.ASCII = true
		var names []cobra.Completion
		for _, d := range st.Devices {
			// A name that would have to be escaped cannot be typed, and could say something to the shell.
			if name := d.Label(); c.Clean(name) == name && !strings.ContainsAny(name, " \"'`$\\;&|<>()*?[]{}!#~:") {
				names = append(names, cobra.CompletionWithDesc(name, string(d.State)))
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// asExit finds a wish for an exit code without a message.
func asExit(err error) (exitError, bool) {
	var x exitError
	ok := errors.As(err, &x)
	return x, ok
}
