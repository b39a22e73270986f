package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"

	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/verify"
	"meshupd/verify/publish"
)

func newTrustCmd(e *env) *cobra.Command {
	return group("trust", "Say which keys a product's devices believe", newTrustInitCmd(e), newTrustNextCmd(e), newTrustSignCmd(e), newTrustShowCmd(e), newTrustDiffCmd(e))
}

// trustInit is the command line of trust init.
type trustInit struct {
	product          string
	root, release    []string
	rootThreshold    int
	releaseThreshold int
	keys             []string
	pass             passphraseFlags
	out              string
}

func newTrustInitCmd(e *env) *cobra.Command {
	var t trustInit
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make the first trust document of a product",
		Long: "Make the folder that is built into a product's devices and that releases are made with: it names the root keys,\n" +
			"which may name other keys later, and the release keys, which sign releases. One key can be both.",
		Example: example(
			"meshupd trust init --product=kiosk-a --key=acme.sec.asc --out=trust",
			"meshupd trust init --product=kiosk-a --root=r1.pub.asc --root=r2.pub.asc --root-threshold=2 \\",
			"    --release=acme.pub.asc --key=r1.sec.asc --key=r2.sec.asc --out=trust"),
		Args: takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needFlags(cmd, "product", "key", "out"); err != nil {
				return err
			}
			if err := t.pass.check(); err != nil {
				return err
			}
			return nothingWas("written", t.run(cmd.Context(), e))
		},
	}
	f := cmd.Flags()
	f.StringVar(&t.product, "product", "", "name of the product (required)")
	f.StringArrayVar(&t.root, "root", nil, "public root key; again for more (default: that of --key)")
	f.IntVar(&t.rootThreshold, "root-threshold", 1, "how many root keys have to sign a trust document")
	f.StringArrayVar(&t.release, "release", nil, "public release key; again for more (default: the root keys)")
	f.IntVar(&t.releaseThreshold, "release-threshold", 1, "how many release keys have to sign a release")
	f.StringArrayVar(&t.keys, "key", nil, "secret root key that signs; again for more (required)")
	f.StringVar(&t.out, "out", "", "folder to make (required)")
	t.pass.add(cmd)
	return cmd
}

func (t *trustInit) run(ctx context.Context, e *env) error {
	o := publish.TrustOptions{Product: t.product, RootThreshold: t.rootThreshold, ReleaseThreshold: t.releaseThreshold}
	if t.rootThreshold < 1 || t.releaseThreshold < 1 {
		return usage("a threshold is at least 1")
	}
	for _, path := range t.keys {
		key, err := openKey(ctx, e, path, t.pass)
		if err != nil {
			return err
		}
		o.Signers = append(o.Signers, key)
	}
	var err error
	if o.Root, err = certificates(t.root); err != nil {
		return err
	}
	if o.Release, err = certificates(t.release); err != nil {
		return err
	}
	if len(o.Root) == 0 {
		for _, key := range o.Signers {
			o.Root = append(o.Root, key.Certificate())
		}
	}
	if err := publish.InitTrust(t.out, o); err != nil {
		return err
	}
	return showTrust(e, t.out)
}

func certificates(paths []string) ([]*verify.Certificate, error) {
	var certs []*verify.Certificate
	for _, path := range paths {
		cert, err := readCertificate(path)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	return certs, nil
}

func newTrustShowCmd(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "show DIR",
		Short:   "Verify a trust folder and show the keys in force, and what is proposed",
		Example: example("meshupd trust show trust", "meshupd trust show /usr/lib/meshupd/trust --json"),
		Args:    takes(1, 1, "one DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			return showTrust(e, args[0])
		},
	}
}

// openTrust verifies a trust folder as a new device would.
func openTrust(dir string) (verify.TrustInfo, error) {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return verify.TrustInfo{}, openError("open the trust folder", err)
	}
	state, err := os.MkdirTemp("", "meshupd-trust-")
	if err != nil {
		return verify.TrustInfo{}, fmt.Errorf("make a temporary folder: %w", err)
	}
	defer os.RemoveAll(state)
	door, err := verify.OpenDoor(verify.DoorConfig{Dir: state, Anchor: dir})
	if err != nil {
		return verify.TrustInfo{}, err
	}
	return door.Trust(), nil
}

func showTrust(e *env, dir string) error {
	info, err := openTrust(dir)
	if err != nil {
		return err
	}
	view, err := publish.ShowTrust(dir)
	if err != nil {
		return err
	}
	c := e.canvas(e.Out)
	if e.json != "" {
		return e.printJSON(struct {
			Schema string `json:"schema"`
			verify.TrustInfo
			publish.TrustView
		}{"meshupd.trust/1", info, view}, false)
	}
	if e.plain {
		text := ""
		for _, k := range info.Keys {
			text += plainLine(c, info.Product, fmt.Sprint(info.Epoch), k.Name, k.Fingerprint)
		}
		return e.print(text)
	}
	fmt.Fprintf(e.Out, "Product   %s\n", c.Clean(info.Product))
	doc := view.Documents[len(view.Documents)-1]
	fmt.Fprintf(e.Out, "Trust     document %d, root %s\n", info.Epoch, info.RootID.String()[:16])
	fmt.Fprintf(e.Out, "Order     line %d, seq %d and up\n", doc.Line, doc.MinSeq)
	fmt.Fprintf(e.Out, "Valid     for releases made from %s to %s\n", doc.IssuedAt.Format(time.DateOnly), doc.ReleaseUntil.Format(time.DateOnly))
	for _, r := range []struct {
		label string
		set   verify.KeySet
	}{{"Root", doc.Root}, {"Releases", doc.Release}} {
		fmt.Fprintf(e.Out, "%-9s %d of %s must sign\n", r.label, r.set.Threshold, count(len(r.set.Keys), "key"))
		for _, k := range r.set.Keys {
			fmt.Fprintf(e.Out, "  key     %s  %s\n", screen.Fingerprint(k.Fingerprint), c.Clean(view.Signers[k.Fingerprint].Name))
		}
	}
	if p := view.Proposal; p != nil {
		fmt.Fprintf(e.Out, "Proposed  document %d: %s\n", p.Document.Epoch, proposalNeeds(*p))
		printChanges(e, view, publish.DiffTrust(doc, p.Document))
	}
	for _, k := range info.Keys {
		if isDevelopment(k.Name) {
			e.sayf("warning: %s is a key for trying things out: do not build it into real devices", e.canvas(e.Err).Clean(k.Name))
		}
	}
	return nil
}
