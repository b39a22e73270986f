package install

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"runtime"
	"strings"

	"meshupd/verify"
)

// Bounds of what an archive may ask of this process, which reads it before an engine does.
const (
	maxArchiveEntries = 4096
	maxArchiveJSON    = 4 << 20 // of index, manifest and config each; what registries take too
	maxLayers         = 512
	maxIndexDepth     = 3
)

// Media types that stand for an image or a list of images (OCI image-spec 1.1, and what Docker writes into the same layout).
var (
	imageTypes = map[string]bool{
		"application/vnd.oci.image.manifest.v1+json":           true,
		"application/vnd.docker.distribution.manifest.v2+json": true,
	}
	indexTypes = map[string]bool{
		"application/vnd.oci.image.index.v1+json":                   true,
		"application/vnd.docker.distribution.manifest.list.v2+json": true,
	}
)

// ociArchive is an OCI image layout in a tar file, of which one image is chosen: the only one, or that for this kind of
// processor. Nothing is unpacked: blobs are places in the file.
type ociArchive struct {
	file  io.ReaderAt
	blobs map[string]extent // by digest, "sha256:..."
	raw   []byte            // the chosen manifest's descriptor, for an index of its own

	manifest, config verify.Digest
	parts            []string // digests of manifest, config and layers, each once
}

type extent struct{ at, size int64 }

// descriptor points at a blob (OCI image-spec, descriptor.md). Other fields are left out on purpose: names among them
// could replace somebody else's image in an engine.
type descriptor struct {
	MediaType string       `json:"mediaType"`
	Digest    string       `json:"digest"`
	Size      int64        `json:"size"`
	Platform  *ociPlatform `json:"platform,omitempty"`
}

type ociPlatform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

// openArchive reads the structure of an archive. Errors are E-FORMAT, and E-HARDWARE when no image in it is for this
// kind of processor.
func openArchive(f io.ReadSeeker, at io.ReaderAt) (*ociArchive, error) {
	a := &ociArchive{file: at, blobs: make(map[string]extent)}
	index, err := a.scan(f)
	if err != nil {
		return nil, err
	}
	chosen, err := a.choose(index, 0)
	if err != nil {
		return nil, err
	}
	switch {
	case len(chosen) == 0:
		return nil, verify.Refuse(verify.CodeHardware, "read a container archive: it has no image for linux/%s", runtime.GOARCH)
	case len(chosen) > 1:
		return nil, verify.Refuse(verify.CodeFormat, "read a container archive: it has %d images for linux/%s, not one", len(chosen), runtime.GOARCH)
	}
	return a, a.take(chosen[0])
}

// scan notes where the blobs are and returns index.json.
func (a *ociArchive) scan(f io.ReadSeeker) (index []byte, err error) {
	docker := false
	in := tar.NewReader(f)
	for n := 0; ; n++ {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, verify.Refuse(verify.CodeFormat, "read a container archive: %w", err)
		}
		if n == maxArchiveEntries {
			return nil, verify.Refuse(verify.CodeFormat, "read a container archive: it has more than %d entries", maxArchiveEntries)
		}
		if h.Typeflag != tar.TypeReg || h.Size < 0 {
			continue // folders, and whatever is no part of the layout
		}
		name := strings.TrimPrefix(h.Name, "./")
		docker = docker || name == "manifest.json"
		hex, blob := strings.CutPrefix(name, "blobs/sha256/")
		switch {
		case blob:
			// The reader takes whole blocks and nothing ahead, so the file stands where the bytes begin.
			begin, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, verify.Refuse(verify.CodeIO, "read a container archive: %w", err)
			}
			if _, twice := a.blobs["sha256:"+hex]; twice {
				return nil, verify.Refuse(verify.CodeFormat, "read a container archive: a blob is in it twice")
			}
			a.blobs["sha256:"+hex] = extent{begin, h.Size}
		case name == "index.json" && index != nil:
			return nil, verify.Refuse(verify.CodeFormat, "read a container archive: index.json is in it twice")
		case name == "index.json":
			if index, err = io.ReadAll(io.LimitReader(in, maxArchiveJSON+1)); err != nil || len(index) > maxArchiveJSON {
				return nil, verify.Refuse(verify.CodeFormat, "read a container archive: index.json cannot be read or is too large")
			}
		}
	}
	if index == nil && docker {
		return nil, verify.Refuse(verify.CodeFormat, "read a container archive: it is in the old form of docker save; export it as an OCI archive")
	}
	if index == nil {
		return nil, verify.Refuse(verify.CodeFormat, "read a container archive: it has no index.json, so it is no OCI archive")
	}
	return index, nil
}

// choose lists the images of an index, and of those below it, that fit this machine.
func (a *ociArchive) choose(index []byte, depth int) ([]descriptor, error) {
	var idx struct {
		Manifests []descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(index, &idx); err != nil {
		return nil, verify.Refuse(verify.CodeFormat, "read the index of a container archive: %w", err)
	}
	if depth == maxIndexDepth || len(idx.Manifests) > maxArchiveEntries {
		return nil, verify.Refuse(verify.CodeFormat, "read the index of a container archive: too many, or one below the other")
	}
	var fit []descriptor
	for _, d := range idx.Manifests {
		if p := d.Platform; p != nil && (p.OS != "linux" || p.Architecture != runtime.GOARCH) {
			continue // also what builders say of an image ("unknown")
		}
		switch {
		case imageTypes[d.MediaType] && len(fit) <= 1:
			fit = append(fit, d)
		case indexTypes[d.MediaType]:
			below, err := a.blob(d)
			if err != nil {
				return nil, err
			}
			more, err := a.choose(below, depth+1)
			if err != nil {
				return nil, err
			}
			if fit = append(fit, more...); len(fit) > 2 {
				fit = fit[:2] // more than one is all that matters
			}
		}
	}
	return fit, nil
}

// take reads the manifest of the chosen image.
func (a *ociArchive) take(d descriptor) error {
	raw, err := a.blob(d)
	if err != nil {
		return err
	}
	var m struct {
		Config descriptor   `json:"config"`
		Layers []descriptor `json:"layers"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return verify.Refuse(verify.CodeFormat, "read the manifest of a container image: %w", err)
	}
	if len(m.Layers) == 0 || len(m.Layers) > maxLayers {
		return verify.Refuse(verify.CodeFormat, "read the manifest of a container image: %d layers, not 1 to %d", len(m.Layers), maxLayers)
	}
	if _, err := a.blob(m.Config); err != nil {
		return err
	}
	if a.manifest, err = blobDigest(d.Digest); err != nil {
		return err
	}
	if a.config, err = blobDigest(m.Config.Digest); err != nil {
		return err
	}
	seen := make(map[string]bool)
	for _, part := range append([]descriptor{d, m.Config}, m.Layers...) {
		if at, found := a.blobs[part.Digest]; !found || at.size != part.Size {
			return verify.Refuse(verify.CodeFormat, "read a container archive: the blob %.80q is not in it, or not in that size", part.Digest)
		}
		if !seen[part.Digest] {
			seen[part.Digest] = true
			a.parts = append(a.parts, part.Digest)
		}
	}
	d.Platform = nil
	a.raw, err = json.Marshal(d)
	return err
}

// blob reads a small blob and checks that it is what it is called.
func (a *ociArchive) blob(d descriptor) ([]byte, error) {
	at, found := a.blobs[d.Digest]
	if !found || at.size != d.Size || at.size > maxArchiveJSON {
		return nil, verify.Refuse(verify.CodeFormat, "read a container archive: the blob %.80q is not in it, or not in that size", d.Digest)
	}
	want, err := blobDigest(d.Digest)
	if err != nil {
		return nil, err
	}
	data := make([]byte, at.size)
	if _, err := a.file.ReadAt(data, at.at); err != nil && !errors.Is(err, io.EOF) {
		return nil, verify.Refuse(verify.CodeIO, "read a container archive: %w", err)
	}
	if sha256.Sum256(data) != want {
		return nil, verify.Refuse(verify.CodeFormat, "read a container archive: the blob %.80q has other bytes", d.Digest)
	}
	return data, nil
}

func blobDigest(s string) (verify.Digest, error) {
	hex, ok := strings.CutPrefix(s, "sha256:")
	d, err := verify.ParseDigest(hex)
	if !ok || err != nil {
		return d, verify.Refuse(verify.CodeFormat, "read a container archive: %.80q is no SHA-256 digest", s)
	}
	return d, nil
}

// stream is the chosen image alone as a new archive, named ref. An engine is given this and not the file as it came:
// one image, plain files, and no name but ours, so that it cannot replace an image of somebody else.
func (a *ociArchive) stream(ref string) (io.Reader, error) {
	names := map[string]string{
		"org.opencontainers.image.ref.name": ref, // podman
		"io.containerd.image.name":          ref,
	}
	var d struct {
		descriptor
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(a.raw, &d); err != nil {
		return nil, err
	}
	d.Annotations = names
	index, err := json.Marshal(struct {
		SchemaVersion int    `json:"schemaVersion"`
		MediaType     string `json:"mediaType"`
		Manifests     []any  `json:"manifests"`
	}{2, "application/vnd.oci.image.index.v1+json", []any{d}})
	if err != nil {
		return nil, err
	}
	var parts []io.Reader
	add := func(name string, size int64, body io.Reader) error {
		var head bytes.Buffer
		if err := tar.NewWriter(&head).WriteHeader(&tar.Header{Name: name, Size: size, Mode: 0o644, Typeflag: tar.TypeReg}); err != nil {
			return err
		}
		parts = append(parts, &head, body, bytes.NewReader(make([]byte, (512-size%512)%512)))
		return nil
	}
	layout := []byte(`{"imageLayoutVersion":"1.0.0"}`)
	if err := add("oci-layout", int64(len(layout)), bytes.NewReader(layout)); err != nil {
		return nil, err
	}
	if err := add("index.json", int64(len(index)), bytes.NewReader(index)); err != nil {
		return nil, err
	}
	for _, part := range a.parts {
		at := a.blobs[part]
		if err := add("blobs/sha256/"+strings.TrimPrefix(part, "sha256:"), at.size, io.NewSectionReader(a.file, at.at, at.size)); err != nil {
			return nil, err
		}
	}
	return io.MultiReader(append(parts, bytes.NewReader(make([]byte, 1024)))...), nil
}
