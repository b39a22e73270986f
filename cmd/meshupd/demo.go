package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/lab"
	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/simnet"
	"meshupd/verify"
)

// demoOptions of the demo.
type demoOptions struct {
	devices  int
	size     Size
	rate     Rate
	keep     bool
	loopback bool
}

func newDemoCmd(e *env) *cobra.Command {
	opts := demoOptions{devices: 12, size: 64 << 20, rate: 100e6 / 8}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "A whole site on this machine: one stick, twelve devices, three accidents",
		Long: "Starts a site of real daemons on this machine, each in a network of its own where the kernel allows it\n" +
			"(no root needed), makes keys and a signed release, and plugs it in at one device. One device lacks space,\n" +
			"one fails its health check and goes back, one is killed half-way and started again. It ends with what\n" +
			"became of each device, and exits 0 only if every check passed. Nothing of this machine is touched.",
		Example: example(
			"meshupd demo",
			"meshupd demo --devices 24 --size 16MiB",
			"meshupd demo --json"),
		Args: takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opts.devices < 5 || opts.devices > 200 {
				return usage("--devices is 5 to 200, not %d", opts.devices)
			}
			if opts.size < 1<<20 {
				return usage("--size is at least 1MiB")
			}
			return runDemo(cmd.Context(), e, opts)
		},
	}
	f := cmd.Flags()
	f.IntVar(&opts.devices, "devices", opts.devices, "how many devices")
	f.Var(textFlag{&opts.size, "SIZE"}, "size", "size of the image")
	f.Var(textFlag{&opts.rate, "RATE"}, "rate", "speed of each device's link, both ways; 0: as fast as it goes")
	f.BoolVar(&opts.loopback, "loopback", false, "use this machine's loopback even where a private network could be made")
	f.BoolVar(&opts.keep, "keep", false, "keep the folder with the devices' disks and logs")
	return cmd
}

// demoSite is a private network if the kernel allows one, else the loopback.
func demoSite(e *env, loopback bool) (*simnet.Site, error) {
	err := simnet.Available()
	if err != nil {
		e.sayf("No private network here (%v).", err)
	}
	if err != nil || loopback {
		e.sayf("The devices run on this machine's loopback instead: same programs, but links have no speed limit and cannot be told apart.")
		return simnet.NewLoopbackSite(), nil
	}
	if err := simnet.Enter(); err != nil {
		return nil, fmt.Errorf("enter a private network: %w", err)
	}
	return simnet.NewSite(simnet.SiteConfig{})
}

func runDemo(ctx context.Context, e *env, opts demoOptions) error {
	site, err := demoSite(e, opts.loopback)
	if err != nil {
		return err
	}
	defer site.Close()
	dir, err := os.MkdirTemp("", "meshupd-demo-")
	if err != nil {
		return fmt.Errorf("make a folder for the demo: %w", err)
	}
	if opts.keep {
		defer e.sayf("The devices' disks and logs are in %s", dir)
	} else {
		defer os.RemoveAll(dir)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	l, err := lab.New(dir, self, site)
	if err != nil {
		return err
	}
	defer l.Close()
	show := newDemoScreen(e)
	out, err := l.Story(ctx, lab.StoryConfig{Devices: opts.devices, Size: int64(opts.size), Rate: int64(opts.rate) * 8,
		Say: show.say, Watch: show.watch})
	show.end()
	if err != nil {
		return err
	}
	if e.json != "" {
		if err := e.printJSON(demoJSON(out), false); err != nil {
			return err
		}
	} else if err := e.print(demoSummary(e.canvas(e.Out), out)); err != nil {
		return err
	}
	if !out.Passed() {
		return verify.Refuse(verify.CodeHealth, "the demo did not end as it should: see the checks above")
	}
	return nil
}

// demoScreen shows the site while the story runs: redrawn on a terminal, one line
// for each change of state elsewhere.
type demoScreen struct {
	e *env

	mu    sync.Mutex // guards the fields below: the story tells and shows from two goroutines
	lines int        // of the last drawing, to be drawn over
	last  *control.SiteStatus
	drawn time.Time
}

func newDemoScreen(e *env) *demoScreen { return &demoScreen{e: e} }

func (d *demoScreen) say(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.clear()
	d.e.sayf("* "+format, args...)
}

func (d *demoScreen) watch(st control.SiteStatus) {
	if d.e.quiet {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.e.canvas(d.e.Err)
	if !d.e.live(d.e.Err) {
		fmt.Fprint(d.e.Err, changeLines(c, d.last, st, ""))
		d.last = &st
		return
	}
	if time.Since(d.drawn) < 200*time.Millisecond {
		return
	}
	d.clear()
	text := siteScreen(c, st, false)
	fmt.Fprint(d.e.Err, text)
	d.lines, d.drawn = strings.Count(text, "\n"), time.Now()
}

// clear takes the last drawing away.
func (d *demoScreen) clear() {
	if d.lines > 0 {
		fmt.Fprintf(d.e.Err, "\x1b[%dA\x1b[J", d.lines)
		d.lines = 0
	}
}

func (d *demoScreen) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.clear()
}

// demoSummary says who got what when, and which checks passed.
func demoSummary(c screen.Canvas, out lab.Outcome) string {
	var b strings.Builder
	t := screen.Table{Columns: []screen.Column{{Title: "DEVICE"}, {Title: "STATE"}, {Title: "AFTER"}, {Title: "TOOK IT FROM", Max: 24}, {Title: "ROLE, AND WHY"}}}
	for _, r := range out.Rows {
		after := "-"
		if r.After > 0 {
			after = fmt.Sprintf("%.1f s", r.After.Seconds())
		}
		from := "-"
		if len(r.From) > 0 {
			from = strings.Join(r.From, ", ")
		}
		why := r.Role
		if r.Why != "" {
			why += ": " + r.Why
		}
		if why == "" {
			why = "-"
		}
		t.Rows = append(t.Rows, []string{c.Clean(r.Device), string(r.State), after, c.Clean(from), c.Clean(why)})
	}
	fmt.Fprintf(&b, "\n%s for %d devices, version %s, all at rest after %.1f s\n\n", screen.Bytes(out.Size), len(out.Rows), out.Version, out.Took.Seconds())
	b.WriteString(t.Draw(c))
	b.WriteString("\n")
	for _, check := range out.Checks {
		mark := "ok  "
		if !check.OK {
			mark = "FAIL"
		}
		fmt.Fprintf(&b, "%s  %s (%s)\n", mark, check.Claim, c.Clean(check.Detail))
	}
	return b.String()
}

// demoResult is the answer of demo --json.
type demoResult struct {
	Schema    string       `json:"schema"`
	Version   string       `json:"version"`
	Size      int64        `json:"size"`
	TookS     float64      `json:"took_s"`
	FirstSent float64      `json:"first_sent"` // multiples of the image
	Passed    bool         `json:"passed"`
	Devices   []demoDevice `json:"devices"`
	Checks    []demoCheck  `json:"checks"`
}

type demoDevice struct {
	Device string   `json:"device"`
	Role   string   `json:"role,omitempty"`
	State  string   `json:"state"`
	AfterS float64  `json:"after_s"`
	From   []string `json:"from,omitempty"`
	Why    string   `json:"why,omitempty"`
}

type demoCheck struct {
	Claim  string `json:"claim"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

func demoJSON(out lab.Outcome) demoResult {
	r := demoResult{Schema: "meshupd.demo/1", Version: out.Version, Size: out.Size, TookS: out.Took.Seconds(),
		FirstSent: out.FirstSent, Passed: out.Passed()}
	for _, row := range out.Rows {
		r.Devices = append(r.Devices, demoDevice{row.Device, row.Role, string(row.State), row.After.Seconds(), row.From, row.Why})
	}
	for _, c := range out.Checks {
		r.Checks = append(r.Checks, demoCheck{c.Claim, c.OK, c.Detail})
	}
	return r
}

// textFlag makes a flag of a value that reads itself from text.
type textFlag struct {
	value interface {
		UnmarshalText([]byte) error
		MarshalText() ([]byte, error)
	}
	kind string
}

func (f textFlag) String() string {
	if f.value == nil {
		return ""
	}
	text, err := f.value.MarshalText()
	if err != nil {
		return ""
	}
	return string(text)
}

func (f textFlag) Set(s string) error { return f.value.UnmarshalText([]byte(s)) }
func (f textFlag) Type() string       { return f.kind }
