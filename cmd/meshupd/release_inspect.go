package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/verify"
	"meshupd/verify/publish"
)

func newInspectCmd(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "inspect PATH",
		Short: "Show what a release says of itself, without a key and without checking",
		Example: example(
			"meshupd release inspect kiosk-a_2.4.0.update",
			"meshupd release inspect dist/kiosk-a_2.4.0 --json"),
		Args: takes(1, 1, "one PATH"),
		RunE: func(_ *cobra.Command, args []string) error {
			u, err := publish.Inspect(args[0])
			if err != nil {
				return err
			}
			if e.json != "" {
				return e.printJSON(releaseInfo(args[0], u), false)
			}
			return e.print(inspectScreen(e.canvas(e.Out), u))
		},
	}
}

// releaseSchema is what a release says of itself; "verified" is false in all of it.
type releaseSchema struct {
	Schema   string `json:"schema"`
	Verified bool   `json:"verified"`
	Path     string `json:"path"`
	*publish.UnverifiedRelease
}

func releaseInfo(path string, u *publish.UnverifiedRelease) releaseSchema {
	return releaseSchema{"meshupd.release/1", false, path, u}
}

func inspectScreen(c screen.Canvas, u *publish.UnverifiedRelease) string {
	var b strings.Builder
	line := func(label, text string) {
		if text != "" {
			fmt.Fprintf(&b, "%-10s %s\n", label, text)
		}
	}
	m := u.Manifest
	b.WriteString(c.Paint(screen.Yellow, "NOT VERIFIED: this is what the file says of itself. `meshupd release verify` checks it.") + "\n\n")
	line("Release", c.Clean(m.Product)+" "+c.Clean(m.Version)+", channel "+c.Clean(m.Channel))
	line("Id", u.ID.String())
	line("Order", fmt.Sprintf("line %d, seq %d, trust document %d", m.Line, m.Seq, m.TrustEpoch))
	line("Made", m.IssuedAt.UTC().Format(time.RFC3339))
	if m.NotAfter != nil {
		line("Not after", m.NotAfter.UTC().Format(time.RFC3339))
	}
	line("Hardware", c.Clean(strings.Join(m.Hardware, ", ")))
	line("Requires", c.Clean(m.Requires))
	if m.Via != nil {
		line("Via", c.Clean(m.Via.Version)+", manifest "+m.Via.SHA256.String())
	}
	line("Meshupd", c.Clean(m.MinMeshupd))
	for _, d := range m.Recalls {
		line("Recalls", d.String())
	}
	if m.SBOM != nil {
		line("SBOM", "sha256 "+m.SBOM.String())
	}
	if m.Downgrade {
		line("Downgrade", "yes, on purpose")
	}
	switch {
	case u.Signatures == 0:
		line("Signed", "no")
	case len(u.ClaimedSigners) == 0:
		line("Signed", count(u.Signatures, "signature")+" by keys that are not in the file")
	}
	for _, s := range u.ClaimedSigners {
		line("Signed", "says "+screen.Fingerprint(s.Fingerprint)+"  "+c.Clean(s.Name))
	}
	for _, img := range m.Images {
		line("Image", imageLine(c, img))
		line("", "sha256 "+img.SHA256.String())
	}
	for _, note := range m.Notes {
		line("Note", c.Clean(note))
	}
	return b.String()
}

func imageLine(c screen.Canvas, img verify.Image) string {
	pieces := (img.Size + img.Pieces.Length - 1) / max(img.Pieces.Length, 1)
	text := fmt.Sprintf("%s, %s, %s, %d pieces of %s", c.Clean(img.Name), c.Clean(string(img.Kind)), screen.Bytes(img.Size), pieces, screen.Bytes(img.Pieces.Length))
	if img.Encoding != verify.EncodingNone {
		text += ", " + c.Clean(string(img.Encoding)) + " of " + screen.Bytes(img.Content.Size)
	}
	return text
}
