package publish

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// ImageInput is a file that goes into a release.
type ImageInput struct {
	Path        string
	Name        string // default: the file's name in lower case
	Kind        verify.Kind
	Hardware    []string
	PieceLength int64 // 0: verify.DefaultPieceLength
}

// Options of Create.
type Options struct {
	Out       string // folder of releases
	Trust     string // trust folder, see InitTrust
	Version   string
	Channel   string // default "stable"
	Hardware  []string
	Requires  string
	Via       *verify.Via
	Notes     []string
	NotAfter  *time.Time
	Downgrade bool
	Critical  []string
	Images    []ImageInput // may be none beside Recalls
	// MinMeshupd is the oldest version of meshupd that may install the release.
	MinMeshupd string
	// Recalls are digests of manifests or images to withdraw. Those of the
	// release that seq is counted up from are withdrawn again, so that a device
	// that missed it still hears of them.
	Recalls []verify.Digest
	// SBOM is a file with the bill of materials (CycloneDX, SPDX): it is copied
	// beside the manifest, which signs its digest.
	SBOM string
	// Previous is a manifest.json or release folder whose seq is counted up from; default: the highest among the product's releases in Out.
	Previous string
	Seq      uint64    // set instead of counting
	IssuedAt time.Time // zero: Now()
	// Progress, if not nil, is told bytes read so far of all that will be read.
	Progress func(done, total int64)
}

// Create makes the folder <Out>/<product>_<version>/ with the layout of a bundle,
// unsigned, and returns its path. Product, line and epoch come from the trust
// folder. The same input gives the same bytes. The folder appears whole or not at
// all. Errors are Refusals: E-USAGE (exists already, no images), E-FORMAT, E-TRUST,
// E-IO, or that of ctx.
func Create(ctx context.Context, o Options) (string, error) {
	if err := checkTrust(o.Trust); err != nil {
		return "", err
	}
	docs, err := readTrust(o.Trust)
	if err != nil {
		return "", err
	}
	m, err := o.manifest(docs[len(docs)-1])
	if err != nil {
		return "", err
	}
	final := filepath.Join(o.Out, m.Product+"_"+m.Version)
	if _, err := os.Lstat(final); !errors.Is(err, fs.ErrNotExist) {
		return "", verify.Refuse(verify.CodeUsage, "create the release: %s is already there", final)
	}
	if err := durable.MkdirAll(o.Out, 0o755); err != nil {
		return "", verify.Refuse(verify.CodeIO, "create the release: %w", err)
	}
	work, err := os.MkdirTemp(o.Out, ".create-")
	if err != nil {
		return "", verify.Refuse(verify.CodeIO, "create the release: %w", err)
	}
	defer os.RemoveAll(work)
	if err := build(ctx, work, o, m); err != nil {
		return "", err
	}
	if err := os.Chmod(work, 0o755); err != nil {
		return "", verify.Refuse(verify.CodeIO, "create the release: %w", err)
	}
	if err := durable.Rename(work, final); err != nil {
		return "", verify.Refuse(verify.CodeIO, "create the release: %w", err)
	}
	return final, nil
}

// manifest fills in all but the images.
func (o *Options) manifest(trust verify.TrustDocument) (verify.Manifest, error) {
	if len(o.Images) == 0 && len(o.Recalls) == 0 {
		return verify.Manifest{}, verify.Refuse(verify.CodeUsage, "create the release: there is no image and nothing to recall")
	}
	issued := o.IssuedAt
	if issued.IsZero() {
		var err error
		if issued, err = Now(); err != nil {
			return verify.Manifest{}, err
		}
	}
	if err := notAhead(issued); err != nil {
		return verify.Manifest{}, err
	}
	seq, recalls, err := o.continued(trust)
	if err != nil {
		return verify.Manifest{}, err
	}
	m := verify.Manifest{
		Format:     verify.ManifestFormat,
		Product:    trust.Product,
		Hardware:   o.Hardware,
		Channel:    o.Channel,
		Version:    o.Version,
		Line:       trust.Line,
		Seq:        seq,
		TrustEpoch: trust.Epoch,
		Requires:   o.Requires,
		Via:        o.Via,
		MinMeshupd: o.MinMeshupd,
		Recalls:    recalls,
		IssuedAt:   issued.UTC().Truncate(time.Second),
		NotAfter:   o.NotAfter,
		Downgrade:  o.Downgrade,
		Critical:   o.Critical,
		Notes:      o.Notes,
	}
	if m.Channel == "" {
		m.Channel = verify.StableChannel
	}
	// The version becomes part of a path before the manifest is checked as a whole.
	if m.Version == "" || strings.ContainsAny(m.Version, "/\\\x00") {
		return verify.Manifest{}, verify.Refuse(verify.CodeFormat, "create the release: %q is not a version", m.Version)
	}
	return m, nil
}

// continued is the seq and the recalls that follow the previous manifest of the trust document's line.
func (o *Options) continued(trust verify.TrustDocument) (seq uint64, recalls []verify.Digest, err error) {
	last, err := o.previous(trust)
	if err != nil {
		return 0, nil, err
	}
	for _, d := range append(append([]verify.Digest{}, last.Recalls...), o.Recalls...) {
		if !slices.Contains(recalls, d) {
			recalls = append(recalls, d)
		}
	}
	if o.Seq != 0 {
		return o.Seq, recalls, nil
	}
	return max(last.Seq+1, trust.MinSeq), recalls, nil
}

// previous is the manifest with the highest seq; zero if there is none.
func (o *Options) previous(trust verify.TrustDocument) (last verify.Manifest, err error) {
	note := func(m verify.Manifest) {
		if m.Product == trust.Product && m.Line == trust.Line && m.Seq > last.Seq {
			last = m
		}
	}
	if o.Previous != "" {
		m, err := readManifest(o.Previous)
		if err != nil {
			return last, err
		}
		if m.Product != trust.Product {
			return last, verify.Refuse(verify.CodeProduct, "the previous release is for product %s, not %s", m.Product, trust.Product)
		}
		note(m)
	} else {
		siblings, err := filepath.Glob(filepath.Join(escapeGlob(o.Out), trust.Product+"_*", "manifest.json"))
		if err != nil {
			return last, verify.Refuse(verify.CodeIO, "look for earlier releases: %w", err)
		}
		for _, path := range siblings {
			m, err := readManifest(path)
			if err != nil {
				// Skipping it could count a seq twice, which every device would take for a forgery.
				return last, verify.Refuse(verify.CodeOf(err), "look for earlier releases: %s: %w", path, err)
			}
			note(m)
		}
	}
	return last, nil
}

func escapeGlob(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(s)
}

// readManifest reads a manifest.json, or the one in a release folder.
func readManifest(path string) (verify.Manifest, error) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		path = filepath.Join(path, "manifest.json")
	}
	raw, err := readAtMost(path, verify.MaxManifest)
	if err != nil {
		return verify.Manifest{}, err
	}
	return verify.ParseUnverifiedManifest(raw)
}

func readAtMost(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, verify.Refuse(verify.CodeNotFound, "read %s: %w", path, err)
	}
	if err != nil {
		return nil, verify.Refuse(verify.CodeIO, "read %s: %w", path, err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, verify.Refuse(verify.CodeIO, "read %s: %w", path, err)
	}
	if int64(len(raw)) > limit {
		return nil, verify.Refuse(verify.CodeSize, "read %s: it has more than %d bytes", path, limit)
	}
	return raw, nil
}

// build fills the folder; the manifest is written last.
func build(ctx context.Context, dir string, o Options, m verify.Manifest) error {
	for _, sub := range []string{"certs", "images"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			return verify.Refuse(verify.CodeIO, "create the release: %w", err)
		}
	}
	if err := copyTrust(o.Trust, dir); err != nil {
		return err
	}
	var total int64
	for _, in := range o.Images {
		info, err := os.Stat(in.Path)
		if errors.Is(err, fs.ErrNotExist) {
			return verify.Refuse(verify.CodeNotFound, "read the image: %w", err)
		}
		if err != nil || !info.Mode().IsRegular() {
			return verify.Refuse(verify.CodeUsage, "read the image: %s is not a file", in.Path)
		}
		total += info.Size()
	}
	p := &progress{tell: o.Progress, total: total}
	for _, in := range o.Images {
		img, err := addImage(ctx, dir, in, p)
		if err != nil {
			return err
		}
		m.Images = append(m.Images, img)
	}
	if o.SBOM != "" {
		digest, err := copySBOM(o.SBOM, dir)
		if err != nil {
			return err
		}
		m.SBOM = &digest
	}
	raw, err := verify.EncodeManifest(m)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(dir, "manifest.json"), raw, 0o644); err != nil {
		return verify.Refuse(verify.CodeIO, "create the release: %w", err)
	}
	return nil
}

// copyTrust copies the chain and exactly the certificates that it pins.
func copyTrust(from, to string) error {
	docs, err := readTrust(from)
	if err != nil {
		return err
	}
	var names []string
	for i, doc := range docs {
		names = append(names, fmt.Sprintf("trust.%d.json", i+1), fmt.Sprintf("trust.%d.sig", i+1))
		for _, set := range []verify.KeySet{doc.Root, doc.Release} {
			for _, k := range set.Keys {
				names = append(names, verify.CertificateName(k.Cert))
			}
		}
	}
	for _, name := range names {
		name = filepath.FromSlash(name)
		raw, err := readAtMost(filepath.Join(from, name), verify.MaxCertificate)
		if err != nil {
			return err
		}
		if err := durable.WriteFile(filepath.Join(to, name), raw, 0o644); err != nil {
			return verify.Refuse(verify.CodeIO, "copy the trust chain: %w", err)
		}
	}
	return nil
}

// SBOMName is the name of the bill of materials in a release folder. It is not
// part of a .update file: devices have no use for it.
const SBOMName = "sbom.json"

const maxSBOM = 64 << 20

func copySBOM(from, dir string) (verify.Digest, error) {
	raw, err := readAtMost(from, maxSBOM)
	if err != nil {
		return verify.Digest{}, err
	}
	if err := durable.WriteFile(filepath.Join(dir, SBOMName), raw, 0o644); err != nil {
		return verify.Digest{}, verify.Refuse(verify.CodeIO, "copy the bill of materials: %w", err)
	}
	return sha256.Sum256(raw), nil
}

// checkSBOM holds the file in a release folder against the manifest; a file that is not there is no fault.
func checkSBOM(dir string, m verify.Manifest) error {
	raw, err := readAtMost(filepath.Join(dir, SBOMName), maxSBOM)
	switch {
	case verify.CodeOf(err) == verify.CodeNotFound:
		return nil
	case err != nil:
		return err
	case m.SBOM == nil || *m.SBOM != sha256.Sum256(raw):
		return verify.Refuse(verify.CodeDigest, "%s is not the bill of materials that was signed", SBOMName)
	}
	return nil
}
