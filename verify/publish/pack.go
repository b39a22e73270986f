package publish

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// Pack writes a release folder as one .update file; the same folder gives the
// same bytes. The image bytes are compared with the manifest on the way. It
// refuses an unsigned release (E-SIG-NONE), one that too few keys signed
// (E-SIG-KEY), and one of the stable channel with a development key's signature
// (E-DEV-KEY). Errors leave no file behind.
func Pack(ctx context.Context, dir, out string, tell func(done, total int64)) error {
	if _, err := Absorb(dir); err != nil {
		return err
	}
	bundle, err := verify.OpenFolder(dir)
	if err != nil {
		return err
	}
	defer bundle.Close()
	head := bundle.Head()
	if len(head.UnverifiedSignature()) == 0 {
		return verify.Refuse(verify.CodeSigNone, "pack %s: the release is not signed yet", dir)
	}
	m, err := verify.ParseUnverifiedManifest(head.UnverifiedManifest())
	if err != nil {
		return err
	}
	if err := checkComplete(dir, m); err != nil {
		return err
	}
	file, err := durable.Create(out, 0o644)
	if err != nil {
		return verify.Refuse(verify.CodeIO, "pack %s: %w", dir, err)
	}
	defer file.Abort()
	tw := tar.NewWriter(file)
	if err := head.WriteTar(tw); err != nil {
		return verify.Refuse(verify.CodeIO, "pack %s: %w", dir, err)
	}
	if err := packImages(ctx, tw, dir, m, tell); err != nil {
		return err
	}
	if err := tw.Close(); err != nil {
		return verify.Refuse(verify.CodeIO, "pack %s: %w", dir, err)
	}
	if err := file.Commit(); err != nil {
		return verify.Refuse(verify.CodeIO, "pack %s: %w", dir, err)
	}
	return nil
}

// checkComplete counts the signatures; whether the folder's own trust is the right one is for Verify.
func checkComplete(dir string, m verify.Manifest) error {
	p, err := SigningProgress(dir)
	if err != nil {
		return err
	}
	if n := p.Missing(); n > 0 {
		return verify.Refuse(verify.CodeSigKey, "pack %s: %d of the %d keys it needs signed, %d more must", dir, len(p.Signers), p.Need, n)
	}
	for _, s := range p.Signers {
		if s.Development && m.Channel == verify.StableChannel {
			return verify.Refuse(verify.CodeDevKey, "pack %s: %s is a development key, which does not count on the channel %s", dir, s.Name, m.Channel)
		}
	}
	return nil
}

func packImages(ctx context.Context, tw *tar.Writer, dir string, m verify.Manifest, tell func(done, total int64)) error {
	p := &progress{tell: tell}
	for _, img := range m.Images {
		p.total += img.Size
	}
	for _, img := range m.Images {
		name := verify.ImageName(img.SHA256)
		if err := tw.WriteHeader(verify.TarHeader(name, img.Size)); err != nil {
			return verify.Refuse(verify.CodeIO, "pack %s: %w", name, err)
		}
		if err := packImage(ctx, tw, filepath.Join(dir, filepath.FromSlash(name)), img, p); err != nil {
			return err
		}
	}
	return nil
}

func packImage(ctx context.Context, w io.Writer, path string, img verify.Image, p *progress) error {
	f, err := os.Open(path)
	if err != nil {
		return verify.Refuse(verify.CodeBundle, "pack image %s: %w", img.Name, err)
	}
	defer f.Close()
	hashed, err := verify.HashImage(io.TeeReader(&watched{r: f, ctx: ctx, p: p}, w), img.Pieces.Length)
	switch {
	case errors.Is(err, tar.ErrWriteTooLong):
		return verify.Refuse(verify.CodeSize, "pack image %s: it is longer than the manifest says", img.Name)
	case err != nil:
		return verify.Refuse(verify.CodeIO, "pack image %s: %w", img.Name, err)
	case hashed.SHA256 != img.SHA256 || hashed.Table.Root != img.Pieces.Root:
		return verify.Refuse(verify.CodeDigest, "pack image %s: the file is not the one in the manifest", img.Name)
	}
	return nil
}
