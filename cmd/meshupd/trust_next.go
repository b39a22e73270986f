package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/verify"
	"meshupd/verify/publish"
)

// trustNext is the command line of trust next.
type trustNext struct {
	changes                     publish.TrustChanges
	addRoot, addRelease         []string
	rootThreshold, relThreshold int
	until                       string
}

func newTrustNextCmd(e *env) *cobra.Command {
	var t trustNext
	cmd := &cobra.Command{
		Use:   "next DIR",
		Short: "Propose the next trust document: other keys, another threshold, a new line",
		Long: "Write a proposal for the next trust document into a trust folder (trust.next.json). It comes into force when enough\n" +
			"root keys of the present document, and of the new one, have signed it: see trust sign. Devices learn it from the\n" +
			"next release. After a theft of release keys, drop them and --raise-line: whatever the thief signed is then void.",
		Example: example(
			"meshupd trust next trust --add-release=new.pub.asc --drop-release=9F2C44E1",
			"meshupd trust next trust --drop-release=9F2C44E1 --add-release=new.pub.asc --raise-line",
			"meshupd trust next trust --add-root=r4.pub.asc --root-threshold=3 --release-until=2036-01-01"),
		Args: takes(1, 1, "one DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			return nothingWas("written", t.run(e, args[0]))
		},
	}
	f, c := cmd.Flags(), &t.changes
	f.StringArrayVar(&t.addRoot, "add-root", nil, "public root key to add; again for more")
	f.StringArrayVar(&t.addRelease, "add-release", nil, "public release key to add; again for more")
	f.StringArrayVar(&c.DropRoot, "drop-root", nil, "fingerprint of a root key to drop, or its last 8 digits and more")
	f.StringArrayVar(&c.DropRelease, "drop-release", nil, "fingerprint of a release key to drop, or its last 8 digits and more")
	f.IntVar(&t.rootThreshold, "root-threshold", 0, "how many root keys have to sign a trust document (default: as before)")
	f.IntVar(&t.relThreshold, "release-threshold", 0, "how many release keys have to sign a release (default: as before)")
	f.BoolVar(&c.RaiseLine, "raise-line", false, "begin a new line: releases and recalls of the present one are void")
	f.Uint64Var(&c.MinSeq, "min-seq", 0, "refuse releases with a lower sequence number (default: as before)")
	f.StringVar(&t.until, "release-until", "", "last day of which releases may be dated, as 2036-01-01 (default: as before)")
	f.BoolVar(&c.Replace, "replace", false, "drop an older proposal and its signatures")
	return cmd
}

func (t *trustNext) run(e *env, dir string) error {
	c := &t.changes
	c.RootThreshold, c.ReleaseThreshold = t.rootThreshold, t.relThreshold
	if c.RootThreshold < 0 || c.ReleaseThreshold < 0 {
		return usage("a threshold is at least 1")
	}
	var err error
	if c.AddRoot, err = certificates(t.addRoot); err != nil {
		return err
	}
	if c.AddRelease, err = certificates(t.addRelease); err != nil {
		return err
	}
	if t.until != "" {
		day, err := time.Parse(time.DateOnly, t.until)
		if err != nil {
			return usage("--release-until is a day like 2036-01-01, not %q", t.until)
		}
		c.ReleaseUntil = day.AddDate(0, 0, 1).Add(-time.Second)
	}
	if _, err := publish.NextTrust(dir, *c); err != nil {
		return err
	}
	return showTrust(e, dir)
}

func newTrustSignCmd(e *env) *cobra.Command {
	var keys, signatures []string
	var pass passphraseFlags
	cmd := &cobra.Command{
		Use:   "sign DIR",
		Short: "Sign the proposed trust document, or take up signatures that gpg or others made",
		Long: "Sign trust.next.json in a trust folder. Root keys on other machines sign a copy of the folder, or the file with\n" +
			"`gpg --detach-sign`; name their trust.next.sig by --signature. With the last one the document comes into force.",
		Example: example(
			"meshupd trust sign trust --key=r1.sec.asc",
			"meshupd trust sign trust --signature=/media/usb0/trust/trust.next.sig",
			"gpg --armor --detach-sign trust/trust.next.json && meshupd trust sign trust"),
		Args: takes(1, 1, "one DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := pass.check(); err != nil {
				return err
			}
			return nothingWas("signed", signTrust(cmd.Context(), e, args[0], keys, signatures, pass))
		},
	}
	cmd.Flags().StringArrayVar(&keys, "key", nil, "secret root key; again for more")
	cmd.Flags().StringArrayVar(&signatures, "signature", nil, "detached signature over trust.next.json to take up; again for more")
	pass.add(cmd)
	return cmd
}

func signTrust(ctx context.Context, e *env, dir string, keys, signatures []string, pass passphraseFlags) error {
	var secret []*publish.SecretKey
	for _, path := range keys {
		key, err := openKey(ctx, e, path, pass)
		if err != nil {
			return err
		}
		secret = append(secret, key)
	}
	var raw [][]byte
	for _, path := range signatures {
		sig, err := readFileMax(path, maxKeyInput)
		if err != nil {
			return openError("read the signature", err)
		}
		raw = append(raw, sig)
	}
	p, done, err := publish.SignTrust(dir, secret, raw...)
	if err != nil {
		return err
	}
	if e.json == "" && !done {
		e.sayf("document %d is not in force yet: %s", p.Document.Epoch, proposalNeeds(p))
	}
	return showTrust(e, dir)
}

// proposalNeeds says how many signatures a proposal still lacks.
func proposalNeeds(p publish.Proposal) string {
	switch old, now := p.Old.Missing(), p.New.Missing(); {
	case old > 0 && now > 0:
		return fmt.Sprintf("needs %s of the present root and %d of the new root", count(old, "signature"), now)
	case old > 0:
		return fmt.Sprintf("needs %s of the present root", count(old, "signature"))
	case now > 0:
		return fmt.Sprintf("needs %s of the new root", count(now, "signature"))
	}
	return "signed by all it needs"
}

func newTrustDiffCmd(e *env) *cobra.Command {
	var from, to int
	cmd := &cobra.Command{
		Use:   "diff DIR",
		Short: "Show what a trust document changes",
		Long: "Show what changes from the newest trust document to the proposed one; without a proposal, what the newest changed.\n" +
			"With --from and --to, what changed between these two.",
		Example: example("meshupd trust diff trust", "meshupd trust diff trust --from=1 --to=3"),
		Args:    takes(1, 1, "one DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			view, err := publish.ShowTrust(args[0])
			if err != nil {
				return err
			}
			docs := view.Documents
			if view.Proposal != nil {
				docs = append(docs, view.Proposal.Document)
			}
			if to == 0 {
				to = len(docs)
			}
			if from == 0 {
				from = max(1, to-1)
			}
			if from < 1 || to > len(docs) || from > to {
				return usage("%s holds the documents 1 to %d: nothing is between %d and %d", args[0], len(docs), from, to)
			}
			changes := publish.DiffTrust(docs[from-1], docs[to-1])
			if e.json != "" {
				return e.printObject("meshupd.trust-diff/1", map[string]any{"from": from, "to": to, "signers": view.Signers,
					"changes": append([]publish.Change{}, changes...)})
			}
			fmt.Fprintf(e.Out, "document %d to %d\n", from, to)
			printChanges(e, view, changes)
			return nil
		},
	}
	cmd.Flags().IntVar(&from, "from", 0, "number of a document (default: the one before)")
	cmd.Flags().IntVar(&to, "to", 0, "number of a document (default: the proposed or newest one)")
	return cmd
}

func printChanges(e *env, view publish.TrustView, changes []publish.Change) {
	c := e.canvas(e.Out)
	for _, ch := range changes {
		text := ch.What
		if ch.Key != "" {
			text += "  " + screen.Fingerprint(ch.Key) + "  " + c.Clean(view.Signers[ch.Key].Name)
		}
		if ch.From != "" {
			text += "  " + ch.From + " > " + ch.To
		}
		fmt.Fprintf(e.Out, "  %s\n", text)
	}
}

// explainRules draws the verdicts of release verify --explain.
func explainRules(c screen.Canvas, rules []verify.Rule) string {
	words := map[verify.Verdict]string{verify.VerdictGood: "good", verify.VerdictRefused: "REFUSED", verify.VerdictNotReached: "-"}
	t := screen.Table{Columns: []screen.Column{{Title: "RULE", Min: 16}, {Title: "VERDICT", Min: 7}, {Title: "BECAUSE", Min: 20}}}
	for _, r := range rules {
		detail := c.Clean(r.Detail)
		switch r.Verdict {
		case verify.VerdictRefused:
			detail += " [" + string(r.Code) + "]"
		case verify.VerdictNotReached:
			detail = "not reached"
		}
		t.Rows = append(t.Rows, []string{r.Name, words[r.Verdict], detail})
	}
	return t.Draw(c)
}
