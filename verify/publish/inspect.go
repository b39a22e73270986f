package publish

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"meshupd/verify"
)

// UnverifiedRelease is what a bundle or folder says of itself. Nothing of it was checked.
type UnverifiedRelease struct {
	ID         verify.Digest          `json:"id"`
	Manifest   verify.Manifest        `json:"manifest"`
	Trust      []verify.TrustDocument `json:"trust"`
	Signatures int                    `json:"signatures"`
	// ClaimedSigners are the keys that the signatures name, among the certificates that came along.
	ClaimedSigners []verify.Signer `json:"claimed_signers,omitempty"`
	HeadBytes      int             `json:"head_bytes"`
}

// open opens a .update file or a release folder.
func open(path string) (*verify.UnverifiedBundle, func(), error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, verify.Refuse(verify.CodeNotFound, "open %s: %w", path, err)
	}
	if err != nil {
		return nil, nil, verify.Refuse(verify.CodeIO, "open %s: %w", path, err)
	}
	if info.IsDir() {
		b, err := verify.OpenFolder(path)
		if err != nil {
			return nil, nil, err
		}
		return b, func() { b.Close() }, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, verify.Refuse(verify.CodeIO, "open %s: %w", path, err)
	}
	b, err := verify.OpenBundle(f)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return b, func() { f.Close() }, nil
}

// Inspect tells what is in a .update file or release folder without checking any
// of it and without needing a key.
func Inspect(path string) (*UnverifiedRelease, error) {
	bundle, done, err := open(path)
	if err != nil {
		return nil, err
	}
	defer done()
	head := bundle.Head()
	out := &UnverifiedRelease{ID: sha256.Sum256(head.UnverifiedManifest()), HeadBytes: len(head.Bytes())}
	if out.Manifest, err = verify.ParseUnverifiedManifest(head.UnverifiedManifest()); err != nil {
		return nil, err
	}
	for _, raw := range head.UnverifiedTrust() {
		doc, err := verify.ParseUnverifiedTrust(raw)
		if err != nil {
			return nil, err
		}
		out.Trust = append(out.Trust, doc)
	}
	return out, out.signatures(head)
}

func (u *UnverifiedRelease) signatures(head *verify.UnverifiedHead) error {
	if len(head.UnverifiedSignature()) == 0 {
		return nil
	}
	parts, err := verify.SplitSignatures(head.UnverifiedSignature())
	if err != nil {
		return err
	}
	u.Signatures = len(parts)
	for _, raw := range head.UnverifiedCertificates() {
		cert, err := verify.ReadCertificate(raw)
		if err != nil {
			return err
		}
		for _, part := range parts {
			if cert.Issued(part) {
				u.ClaimedSigners = append(u.ClaimedSigners, verify.Signer{Name: cert.Name(), Fingerprint: cert.Fingerprint()})
			}
		}
	}
	return nil
}

// Verify does what a device with this anchor and no history would do with a
// .update file or release folder, and more: every image is read, its piece table
// computed again and its content decoded. It refuses as a device would.
func Verify(ctx context.Context, path, anchor string, tell func(done, total int64)) (*verify.Release, error) {
	rel, _, err := Explain(ctx, path, anchor, verify.Device{}, tell)
	return rel, err
}

// ruleImages is the rule that Explain adds to those of the door.
const ruleImages = "images"

// Explain is Verify with every rule and its verdict. A dev with a product asks
// also whether the release is for that device.
func Explain(ctx context.Context, path, anchor string, dev verify.Device, tell func(done, total int64)) (*verify.Release, []verify.Rule, error) {
	info, err := os.Stat(path)
	isDir := err == nil && info.IsDir()
	if isDir {
		if _, err := Absorb(path); err != nil {
			return nil, nil, err
		}
	}
	var rules []verify.Rule
	rel, err := withDoor(anchor, func(door *verify.Door) (rel *verify.Release, err error) {
		rel, rules, err = ExplainAt(ctx, path, door, dev, tell)
		if err == nil && isDir {
			if err = checkSBOM(path, rel.Manifest()); err != nil {
				rel, rules[len(rules)-1] = nil, refusedImages(err)
			}
		}
		return rel, err
	})
	return rel, rules, err
}

// ExplainAt asks a door of the caller's for every rule and its verdict, and reads every byte of the images. It changes
// nothing but what the door learns of the trust chain.
func ExplainAt(ctx context.Context, path string, door *verify.Door, dev verify.Device, tell func(done, total int64)) (*verify.Release, []verify.Rule, error) {
	bundle, done, err := open(path)
	if err != nil {
		return nil, nil, err
	}
	defer done()
	rel, rules, err := door.Explain(ctx, bundle.Head(), dev)
	if err != nil {
		return nil, append(rules, verify.Rule{Name: ruleImages, Verdict: verify.VerdictNotReached}), err
	}
	if err := verifyImages(ctx, bundle, rel, tell); err != nil {
		return nil, append(rules, refusedImages(err)), err
	}
	return rel, append(rules, verify.Rule{Name: ruleImages, Verdict: verify.VerdictGood, Detail: "every byte is what was signed"}), nil
}

func refusedImages(err error) verify.Rule {
	return verify.Rule{Name: ruleImages, Verdict: verify.VerdictRefused, Code: verify.CodeOf(err), Detail: err.Error()}
}

// verifyImages reads the images to the end of the bundle.
func verifyImages(ctx context.Context, bundle *verify.UnverifiedBundle, rel *verify.Release, tell func(done, total int64)) error {
	p := &progress{tell: tell}
	for _, img := range rel.Manifest().Images {
		p.total += img.Size
	}
	for {
		img, r, err := bundle.NextImage(rel)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := verifyImage(rel, img, &watched{r: r, ctx: ctx, p: p}); err != nil {
			return err
		}
	}
}

// verifyImage reads an image once and holds all that the manifest says of it against the bytes.
func verifyImage(rel *verify.Release, img verify.Image, r io.Reader) error {
	if img.Encoding != verify.EncodingZstd {
		return verifyPieces(rel, img, r)
	}
	pr, pw := io.Pipe()
	decoded := make(chan error, 1)
	go func() {
		content, err := decodedContent(pr)
		if err == nil && content != img.Content {
			err = verify.Refuse(verify.CodeDigest, "image %s decodes to other content than was signed", img.Name)
		}
		// Drain, so that the writing side reaches the digest even when decoding failed.
		io.Copy(io.Discard, pr)
		decoded <- err
	}()
	err := verifyPieces(rel, img, io.TeeReader(r, pw))
	pw.CloseWithError(err)
	return errors.Join(err, <-decoded)
}

func verifyPieces(rel *verify.Release, img verify.Image, r io.Reader) error {
	hashed, err := verify.HashImage(r, img.Pieces.Length)
	if err != nil {
		return err
	}
	if hashed.Table.Root != rel.Pieces(img.SHA256).Root {
		return verify.Refuse(verify.CodeDigest, "the pieces of image %s are not those that were signed", img.Name)
	}
	return nil
}

// ReleaseName is the usual name of a release's .update file.
func ReleaseName(dir string) string { return filepath.Base(filepath.Clean(dir)) + ".update" }
