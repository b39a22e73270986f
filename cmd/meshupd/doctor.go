package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"meshupd/cmd/meshupd/internal/doctor"
	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/verify"
)

// doctorSchema is the schema of the JSON answer.
const doctorSchema = "meshupd.doctor/1"

// check is one thing that doctor looks at.
type check = doctor.Check[*patient]

// patient is what doctor looks at: this device, or the tree of an image.
type patient struct {
	*env
	tree   *doctor.Tree // "/" when live
	live   bool
	config string // --config
	bundle string // --bundle
	strict bool

	files     []configFile
	cfg       *Config // nil: it cannot be used, and configErr says why
	configErr error

	scratch string       // a temporary folder
	door    *verify.Door // over a copy of what the device knows; nil: doorErr says why
	doorErr error
	seen    observed
}

func newDoctorCmd(e *env) *cobra.Command {
	var root string
	p := &patient{env: e}
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Find what would make an update fail, on this device or in an image",
		Long: "Look at everything that an update needs, and say of each thing whether it is fine, what is wrong and what to do.\n" +
			"Nothing is changed. As root it sees the most; what it may not look at it says.\n" +
			"With --root it looks at the files of an image while it is built, runs nothing of it and does not leave the folder.\n" +
			"With --bundle it also says whether the device, or one with that image, would take this release and could install it.\n" +
			"It exits with 1 when something failed (6 or 7 when only the release was refused), and with 0 when there are only warnings.",
		Example: example(
			"sudo meshupd doctor",
			"meshupd doctor --root=build/rootfs --strict        in the build of an image",
			"sudo meshupd doctor --bundle=/media/usb0/kiosk-a_2.4.0.update"),
		Args: takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			p.live = root == "" && !cmd.Flags().Changed("root")
			if p.live {
				root = "/"
			}
			return p.examine(cmd.Context(), root)
		},
	}
	f := cmd.Flags()
	f.StringVar(&root, "root", "", "look at the files of an image below this folder instead of this device")
	f.StringVar(&p.config, "config", "", "this file alone instead of the layers of the system; with --root a path inside the image")
	f.StringVar(&p.bundle, "bundle", "", "also look whether this .update file or release folder would be taken")
	f.BoolVar(&p.strict, "strict", false, "exit with 1 on a warning too")
	_ = cmd.MarkFlagDirname("root")
	_ = cmd.MarkFlagFilename("bundle", "update")
	return talksToDaemon(e, cmd)
}

// examine makes all checks and tells what came of them.
func (p *patient) examine(ctx context.Context, root string) error {
	var err error
	if p.tree, err = doctor.OpenTree(root); err != nil {
		return err
	}
	defer p.tree.Close()
	if p.scratch, err = os.MkdirTemp("", "meshupd-doctor-"); err != nil {
		return fmt.Errorf("make a temporary folder: %w", err)
	}
	defer os.RemoveAll(p.scratch)
	p.open()
	checks := slices.Concat(configChecks, imageChecks)
	if p.live {
		checks = slices.Concat(configChecks, liveChecks)
	}
	if p.bundle != "" {
		checks = append(checks, bundleChecks...)
	}
	var all []doctor.Finding
	var counts doctor.Counts
	c := p.canvas(p.Out)
	err = doctor.Run(ctx, p, checks, func(f doctor.Finding) {
		all = append(all, f)
		counts.Add(f)
		if p.json == "" && (!f.Beside || p.verbose || p.plain) {
			fmt.Fprint(p.Out, p.drawFinding(c, f))
		}
	})
	if err != nil {
		return err
	}
	if err := p.conclude(c, all, counts); err != nil {
		return err
	}
	return p.verdict(all, counts)
}

// open reads config and trust; the checks tell what came of it.
func (p *patient) open() {
	var cfg Config
	var src fileSource = p.tree
	if p.live {
		src = hostFiles{}
	}
	if p.files, p.configErr = configFilesIn(src, p.config); p.configErr == nil {
		cfg, p.configErr = parseConfig(p.files)
	}
	if p.configErr != nil {
		p.doorErr = p.configErr
		return
	}
	p.cfg = &cfg
	p.door, p.doorErr = p.openDoor()
}

// openDoor opens a door that knows what the device knows, in the temporary folder.
func (p *patient) openDoor() (*verify.Door, error) {
	state := filepath.Join(p.scratch, "state")
	if err := os.Mkdir(state, 0o700); err != nil {
		return nil, fmt.Errorf("make a temporary folder: %w", err)
	}
	cfg := verify.DoorConfig{Dir: p.cfg.State, Anchor: p.cfg.Trust, Product: p.cfg.Product, BuildTime: buildTime()}
	if !p.live {
		cfg.Dir, cfg.Anchor = filepath.Join(p.scratch, "new"), filepath.Join(p.scratch, "anchor")
		if err := p.copyAnchor(cfg.Anchor); err != nil {
			return nil, err
		}
	}
	return verify.OpenCopy(cfg, state)
}

// maxAnchorFile is above the limit of everything in a trust folder: verify judges the size.
const maxAnchorFile = 1 << 20

// copyAnchor copies the trust folder out of the tree, so that it is read inside it. Its files are judged as they are: what is
// no regular file stays one that verify refuses.
func (p *patient) copyAnchor(to string) error {
	for _, sub := range []string{"", "certs"} {
		list, err := p.tree.ReadDir(filepath.Join(p.cfg.Trust, sub))
		if sub != "" && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return verify.Refuse(verify.CodeTrust, "open the trust folder: %w", err)
		}
		if err := os.MkdirAll(filepath.Join(to, sub), 0o700); err != nil {
			return fmt.Errorf("make a temporary folder: %w", err)
		}
		for _, entry := range list {
			name := filepath.Join(sub, entry.Name())
			switch {
			case entry.IsDir():
				continue
			case !entry.Type().IsRegular():
				err = os.Symlink("refused", filepath.Join(to, name))
			default:
				var data []byte
				if data, err = p.tree.ReadFile(filepath.Join(p.cfg.Trust, name), maxAnchorFile); err == nil {
					err = os.WriteFile(filepath.Join(to, name), data, 0o600)
				}
			}
			if err != nil {
				return verify.Refuse(verify.CodeTrust, "read the trust folder: %w", err)
			}
		}
	}
	return nil
}

// words are what is shown for a level, and its colour.
var levelWords = map[doctor.Level][2]string{
	doctor.LevelOK: {"ok", "32"}, doctor.LevelWarning: {"WARN", "33"}, doctor.LevelError: {"FAIL", "31"}, doctor.LevelSkipped: {"-", ""},
}

// idWidth is that of the longest id.
const idWidth = 17

func (p *patient) drawFinding(c screen.Canvas, f doctor.Finding) string {
	if p.plain {
		return fmt.Sprintf("%s\t%s\t%s\t%s\t%s\n", f.Level, f.ID, c.Clean(f.Detail), c.Clean(f.Why), c.Clean(f.Fix))
	}
	word := levelWords[f.Level]
	out := c.Paint(word[1], c.Pad(word[0], 4)) + "  " + c.Pad(f.ID, idWidth) + "  "
	indent := 4 + 2 + idWidth + 2
	detail := c.Clean(f.Detail)
	if f.Code != "" {
		detail += "  [" + c.Clean(string(f.Code)) + "]"
	}
	text := hang(detail, c.Width, indent)
	if f.Why != "" {
		text += hang("why: "+c.Clean(f.Why), c.Width, indent)
	}
	if f.Fix != "" {
		text += hang("fix: "+c.Clean(f.Fix), c.Width, indent)
	}
	return out + text[indent:]
}

// hang wraps text to the width with an indent before each line.
func hang(text string, width, indent int) string {
	out := ""
	for i, line := range screen.Wrap(text, max(width-indent-5, 20)) {
		pad := indent
		if i > 0 && (len(text) > 5 && (text[:5] == "why: " || text[:5] == "fix: ")) {
			pad += 5
		}
		out += fmt.Sprintf("%*s%s\n", pad, "", line)
	}
	return out
}

// conclude tells the sums, or all of it in JSON.
func (p *patient) conclude(c screen.Canvas, all []doctor.Finding, counts doctor.Counts) error {
	if p.json != "" {
		answer := map[string]any{"generated_at": p.now().UTC().Truncate(1e9), "mode": "live", "checks": all, "counts": counts}
		if !p.live {
			answer["mode"], answer["root"] = "root", p.tree.Dir()
		}
		if p.bundle != "" {
			answer["bundle"] = p.bundle
		}
		return p.printObject(doctorSchema, answer)
	}
	if p.plain {
		return nil
	}
	line := fmt.Sprintf("%d failed, %s, %d ok", counts.Errors, count(counts.Warnings, "warning"), counts.OK)
	if counts.Skipped > 0 {
		line += fmt.Sprintf(", %d not looked at (-v says why)", counts.Skipped)
	}
	_, err := fmt.Fprintln(p.Out, line)
	return err
}

// verdict is the exit code: 1 when something failed, that of the refusal when only the release was refused.
func (p *patient) verdict(all []doctor.Finding, counts doctor.Counts) error {
	exit := exitOK
	for _, f := range all {
		if f.Level != doctor.LevelError {
			continue
		}
		code := exitFailed
		if isBundleCheck(f.ID) && codeTexts[f.Code].exit != 0 {
			code = codeTexts[f.Code].exit
		}
		if exit == exitOK || code == exitFailed {
			exit = code
		}
	}
	if exit == exitOK && p.strict && counts.Warnings > 0 {
		exit = exitFailed
	}
	if exit == exitOK {
		return nil
	}
	return exitError(exit)
}

// failed makes a finding of an error, with the advice for its code.
func failed(err error, why string) doctor.Finding {
	f := doctor.Fail(err.Error(), why, codeTexts[codeOf(context.Background(), err)].fix)
	return f.With(err)
}
