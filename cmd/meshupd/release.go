package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/verify"
	"meshupd/verify/publish"
)

func newReleaseCmd(e *env) *cobra.Command {
	return group("release", "Make, sign, check and pack releases", newCreateCmd(e), newSignCmd(e), newVerifyCmd(e), newInspectCmd(e), newPackCmd(e))
}

// create is the command line of release create.
type create struct {
	options  publish.Options
	product  string
	notes    string // file
	images   []string
	kind     string
	notAfter string
	recalls  []string
	via      string
}

func newCreateCmd(e *env) *cobra.Command {
	var cr create
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make an unsigned release folder from images",
		Long: "Make the folder OUT/PRODUCT_VERSION with images, piece tables, trust chain and manifest, ready to be signed.\n" +
			"The sequence number is counted up from the earlier releases in OUT. The same input and SOURCE_DATE_EPOCH give the same bytes.",
		Example: example(
			"meshupd release create --product=kiosk-a --version=2.4.0 --trust=trust --image=rootfs.img.zst",
			"meshupd release create --version=2.4.1 --requires='>=2.2.0' --notes=NOTES.md --trust=trust \\",
			"    --image=rootfs=build/rootfs.img --image=data=build/data.img --hardware=rev2"),
		Args: takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			need := []string{"version", "trust", "image"}
			if len(cr.recalls) > 0 {
				need = need[:2] // a recall needs no image
			}
			if err := needFlags(cmd, need...); err != nil {
				return err
			}
			return nothingWas("written", cr.run(cmd.Context(), e))
		},
	}
	o, f := &cr.options, cmd.Flags()
	f.StringVar(&cr.product, "product", "", "name of the product; has to be that of the trust folder (default: that)")
	f.StringVar(&o.Version, "version", "", "semantic version, as 2.4.0 (required)")
	f.StringVar(&o.Channel, "channel", "stable", "channel that devices follow")
	f.StringVar(&o.Requires, "requires", "", "which running versions it can be installed over, as '>=2.2.0'")
	f.StringVar(&cr.via, "via", "", "release folder to go through first where --requires is not met")
	f.StringVar(&o.MinMeshupd, "min-meshupd", "", "oldest version of meshupd that may install it, as 1.4.0")
	f.StringArrayVar(&cr.recalls, "recall", nil, "digest of a manifest or image to withdraw; again for more, then no --image is needed")
	f.StringVar(&o.SBOM, "sbom", "", "bill of materials (CycloneDX, SPDX) to sign and keep beside the manifest")
	f.StringVar(&cr.notes, "notes", "", "file with release notes, one a line")
	f.StringArrayVar(&o.Notes, "note", nil, "one release note; again for more")
	f.StringArrayVar(&cr.images, "image", nil, "NAME=PATH or PATH of an image; again for more (required)")
	f.StringSliceVar(&o.Hardware, "hardware", nil, "kinds of hardware that the release is for, as rev2 or rev-* (default: all of the product)")
	f.StringVar(&cr.kind, "kind", string(verify.KindSlot), "what the images are: slot, container or files")
	f.StringVar(&o.Trust, "trust", "", "trust folder that meshupd trust init made (required)")
	f.StringVar(&o.Out, "out", "dist", "folder of releases")
	f.StringVar(&o.Previous, "previous", "", "release folder or manifest.json to count the sequence number up from")
	f.BoolVar(&o.Downgrade, "downgrade", false, "say that the lower version is meant")
	f.StringVar(&cr.notAfter, "not-after", "", "last day on which it may be installed, as 2027-12-31")
	return cmd
}

func (cr *create) run(ctx context.Context, e *env) error {
	o := cr.options
	if cr.product != "" {
		info, err := openTrust(o.Trust)
		if err != nil {
			return err
		}
		if info.Product != cr.product {
			return verify.Refuse(verify.CodeProduct, "the trust folder is for product %s, not %s", info.Product, cr.product)
		}
	}
	if cr.notes != "" {
		raw, err := readFileMax(cr.notes, verify.MaxManifest)
		if err != nil {
			return openError("read the notes", err)
		}
		o.Notes = append(noteLines(string(raw)), o.Notes...)
	}
	if cr.notAfter != "" {
		day, err := time.Parse(time.DateOnly, cr.notAfter)
		if err != nil {
			return usage("--not-after is a day like 2027-12-31, not %q", cr.notAfter)
		}
		end := day.AddDate(0, 0, 1).Add(-time.Second)
		o.NotAfter = &end
	}
	for _, text := range cr.recalls {
		digest, err := verify.ParseDigest(text)
		if err != nil {
			return usage("--recall is a digest of 64 hex digits, not %q", text)
		}
		o.Recalls = append(o.Recalls, digest)
	}
	if cr.via != "" {
		u, err := publish.Inspect(cr.via)
		if err != nil {
			return err
		}
		o.Via = &verify.Via{Version: u.Manifest.Version, SHA256: u.ID}
	}
	for _, arg := range cr.images {
		name, path, named := strings.Cut(arg, "=")
		if !named {
			name, path = "", arg
		}
		o.Images = append(o.Images, publish.ImageInput{Path: path, Name: name, Kind: verify.Kind(cr.kind)})
	}
	tell, end := e.hashing("Reading   ")
	o.Progress = tell
	dir, err := publish.Create(ctx, o)
	end(err == nil)
	if err != nil {
		return err
	}
	return e.tellRelease(dir)
}

// noteLines takes the notes from a text file: no empty lines, no list marks.
func noteLines(text string) []string {
	var notes []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if rest, ok := strings.CutPrefix(line, "- "); ok {
			line = rest
		}
		if line != "" && !strings.HasPrefix(line, "#") {
			notes = append(notes, line)
		}
	}
	return notes
}

// hashing shows how far a pass over the images is: on a terminal, else only with -v.
func (e *env) hashing(label string) (tell func(done, total int64), end func(ok bool)) {
	if !e.live(e.Err) && !e.verbose {
		return nil, func(bool) {}
	}
	var m *meter
	tell = func(done, total int64) {
		if m == nil {
			m = newMeter(e, "auto", label, total)
		}
		m.set(done)
	}
	return tell, func(ok bool) {
		if m != nil {
			m.end(ok)
		}
	}
}

// tellRelease shows a release folder that was just written.
func (e *env) tellRelease(dir string) error {
	u, err := publish.Inspect(dir)
	if err != nil {
		return err
	}
	if e.json != "" {
		return e.printJSON(releaseInfo(dir, u), false)
	}
	c := e.canvas(e.Out)
	m := u.Manifest
	signed := "not signed yet"
	if u.Signatures > 0 {
		signed = count(u.Signatures, "signature")
		p, err := publish.SigningProgress(dir)
		if err != nil {
			return err
		}
		if n := p.Missing(); n > 0 {
			signed += fmt.Sprintf(", %d more of %d needed", n, p.Need)
		}
	}
	_, err = fmt.Fprintf(e.Out, "%s   %s, %s   line %d, seq %d   %s\n", c.Clean(filepath.Join(dir, "manifest.json")),
		count(len(m.Images), "image"), screen.Bytes(imageBytes(m)), m.Line, m.Seq, signed)
	return err
}

func imageBytes(m verify.Manifest) int64 {
	var n int64
	for _, img := range m.Images {
		n += img.Size
	}
	return n
}

func newSignCmd(e *env) *cobra.Command {
	var keys []string
	var signature string
	var pass passphraseFlags
	cmd := &cobra.Command{
		Use:   "sign DIR",
		Short: "Sign a release folder, or take up a signature that gpg made",
		Long: "Sign the manifest of a release folder. A key that is kept elsewhere signs manifest.json with\n" +
			"`gpg --detach-sign` (also --armor); a file left beside the manifest is taken up, another is named by --signature.",
		Example: example(
			"meshupd release sign dist/kiosk-a_2.4.0 --key=acme.sec.asc --passphrase-file=pass.txt",
			"gpg --armor --detach-sign dist/kiosk-a_2.4.0/manifest.json && meshupd release sign dist/kiosk-a_2.4.0"),
		Args: takes(1, 1, "one DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := pass.check(); err != nil {
				return err
			}
			return nothingWas("signed", sign(cmd.Context(), e, args[0], keys, signature, pass))
		},
	}
	cmd.Flags().StringArrayVar(&keys, "key", nil, "secret release key; again for more")
	cmd.Flags().StringVar(&signature, "signature", "", "detached signature over manifest.json to take up, armored or binary")
	pass.add(cmd)
	return cmd
}

func sign(ctx context.Context, e *env, dir string, keys []string, signature string, pass passphraseFlags) error {
	if _, err := os.Stat(dir); err != nil {
		return openError("open the release", err)
	}
	taken, err := publish.Absorb(dir)
	if err != nil {
		return err
	}
	if signature != "" {
		raw, err := readFileMax(signature, maxKeyInput)
		if err != nil {
			return openError("read the signature", err)
		}
		if err := publish.AddSignature(dir, raw); err != nil {
			return err
		}
		taken++
	}
	if taken == 0 && len(keys) == 0 {
		return usage("meshupd release sign needs --key or --signature: gpg left no manifest.json.asc or .sig in %s", dir)
	}
	for _, path := range keys {
		key, err := openKey(ctx, e, path, pass)
		if err != nil {
			return err
		}
		if isDevelopment(key.Name()) {
			e.sayf("warning: %s is a key for trying things out: it does not count on the channel %s", e.canvas(e.Err).Clean(key.Name()), verify.StableChannel)
		}
		if err := publish.Sign(dir, key); err != nil {
			return err
		}
	}
	return e.tellRelease(dir)
}

func newVerifyCmd(e *env) *cobra.Command {
	var trust string
	var explain bool
	var dev verify.Device
	cmd := &cobra.Command{
		Use:   "verify PATH",
		Short: "Check a release folder or .update file as a device would, and every byte of it",
		Example: example(
			"meshupd release verify dist/kiosk-a_2.4.0 --trust=trust",
			"meshupd release verify kiosk-a_2.4.0.update --trust=/usr/lib/meshupd/trust"),
		Args: takes(1, 1, "one PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := needFlags(cmd, "trust"); err != nil {
				return err
			}
			tell, end := e.hashing("Checking  ")
			if dev.Hardware != "" || dev.Running != "" {
				info, err := openTrust(trust)
				if err != nil {
					return err
				}
				dev.Product, dev.Meshupd = info.Product, buildVersion().Version
			}
			rel, rules, err := publish.Explain(cmd.Context(), args[0], trust, dev, tell)
			end(err == nil)
			c := e.canvas(e.Out)
			if explain && e.json == "" && len(rules) > 0 {
				if err := e.print(explainRules(c, rules)); err != nil {
					return err
				}
			}
			if err != nil {
				return err
			}
			m := rel.Manifest()
			if e.json != "" {
				answer := map[string]any{"verified": true, "path": args[0], "id": rel.ID(), "signers": rel.Signers(), "manifest": m}
				if explain {
					answer["rules"] = rules
				}
				return e.printObject("meshupd.verified/1", answer)
			}
			fmt.Fprintf(e.Out, "good   %s %s, channel %s, line %d, seq %d   %s, %s\n", c.Clean(m.Product), c.Clean(m.Version),
				c.Clean(m.Channel), m.Line, m.Seq, count(len(m.Images), "image"), screen.Bytes(imageBytes(m)))
			for _, s := range rel.Signers() {
				fmt.Fprintf(e.Out, "signed %s  %s\n", screen.Fingerprint(s.Fingerprint), c.Clean(s.Name))
			}
			if warning := rel.ClockWarning(e.now()); warning != "" {
				e.sayf("warning: %s", warning)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&trust, "trust", "", "trust folder to check against (required)")
	f.BoolVar(&explain, "explain", false, "show each rule with its verdict")
	f.StringVar(&dev.Hardware, "hardware", "", "also check that it is for this kind of hardware")
	f.StringVar(&dev.Running, "running", "", "also check that it can be installed over this version")
	return cmd
}

func newPackCmd(e *env) *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:     "pack DIR",
		Short:   "Write a signed release folder as one .update file for a stick",
		Example: example("meshupd release pack dist/kiosk-a_2.4.0", "meshupd release pack dist/kiosk-a_2.4.0 --out=/media/usb0/kiosk-a_2.4.0.update"),
		Args:    takes(1, 1, "one DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if out == "" {
				dir, err := filepath.Abs(args[0])
				if err != nil {
					return fmt.Errorf("find %s: %w", args[0], err)
				}
				out = filepath.Join(filepath.Dir(filepath.Clean(args[0])), publish.ReleaseName(dir))
			}
			tell, end := e.hashing("Packing   ")
			err := publish.Pack(cmd.Context(), args[0], out, tell)
			end(err == nil)
			if err != nil {
				return nothingWas("written", err)
			}
			u, err := publish.Inspect(out)
			if err != nil {
				return err
			}
			if e.json != "" {
				return e.printJSON(releaseInfo(out, u), false)
			}
			_, err = fmt.Fprintf(e.Out, "%s   %s\n", e.canvas(e.Out).Clean(out), screen.Bytes(int64(u.HeadBytes)+imageBytes(u.Manifest)))
			return err
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "file to write (default: DIR.update beside it)")
	return cmd
}
