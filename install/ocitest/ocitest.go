// Package ocitest gives tests of every room small container images and private engines to run them in.
package ocitest

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
)

// Image describes a test image: one layer with one file, which it runs.
type Image struct {
	File []byte   // becomes /app
	Env  []string // of the image's config
	Name string   // the reference that the archive asks for; "" for none
}

// Blob is a part of an archive.
type Blob struct {
	Type string
	Data []byte
}

// Digest is "sha256:" and the hex digits of the blob's bytes.
func (b Blob) Digest() string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b.Data)) }

// Descriptor of the blob in an index or manifest.
func (b Blob) Descriptor() map[string]any {
	return map[string]any{"mediaType": b.Type, "digest": b.Digest(), "size": len(b.Data)}
}

// The media types of an OCI image.
const (
	TypeIndex    = "application/vnd.oci.image.index.v1+json"
	TypeManifest = "application/vnd.oci.image.manifest.v1+json"
	TypeConfig   = "application/vnd.oci.image.config.v1+json"
	TypeLayer    = "application/vnd.oci.image.layer.v1.tar"
)

// Blobs makes the manifest, config and layer of an image.
func (i Image) Blobs() []Blob {
	layer := Blob{TypeLayer, Tar(Entry{"app", i.File, 0o755})}
	config := Blob{TypeConfig, JSON(map[string]any{"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": []string{"/app"}, "Env": i.Env},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{layer.Digest()}}})}
	manifest := Blob{TypeManifest, JSON(map[string]any{"schemaVersion": 2, "mediaType": TypeManifest,
		"config": config.Descriptor(), "layers": []any{layer.Descriptor()}})}
	return []Blob{manifest, config, layer}
}

// Archive is the image as an OCI archive.
func (i Image) Archive() []byte {
	blobs := i.Blobs()
	d := blobs[0].Descriptor()
	if i.Name != "" {
		d["annotations"] = map[string]string{"org.opencontainers.image.ref.name": i.Name, "io.containerd.image.name": i.Name}
	}
	return Archive([]any{d}, blobs...)
}

// Archive is an OCI archive with these descriptors in its index.
func Archive(manifests []any, blobs ...Blob) []byte {
	entries := []Entry{{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644},
		{"index.json", JSON(map[string]any{"schemaVersion": 2, "mediaType": TypeIndex, "manifests": manifests}), 0o644}}
	for _, b := range blobs {
		entries = append(entries, Entry{"blobs/sha256/" + b.Digest()[len("sha256:"):], b.Data, 0o644})
	}
	return Tar(entries...)
}

// Entry is a file of a tar.
type Entry struct {
	Name string
	Data []byte
	Mode int64
}

// Tar packs plain files.
func Tar(entries ...Entry) []byte {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		if err := w.WriteHeader(&tar.Header{Name: e.Name, Size: int64(len(e.Data)), Mode: e.Mode, Typeflag: tar.TypeReg, Format: tar.FormatPAX}); err != nil {
			panic(err) // a buffer takes everything
		}
		_, _ = w.Write(e.Data)
	}
	_ = w.Close()
	return out.Bytes()
}

// JSON encodes what tests make up.
func JSON(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return data
}

// Need skips the test by name without root and these programs; where CI is set it fails instead.
func Need(t testing.TB, tools ...string) {
	t.Helper()
	lack := t.Skipf
	if os.Getenv("CI") != "" {
		lack = t.Fatalf
	}
	if os.Getuid() != 0 {
		lack("needs root to run containers")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			lack("needs %s", tool)
		}
	}
}

// Build compiles a program of this module for use in a container: no C library, stripped.
func Build(t testing.TB, pkg string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, said)
	}
	return out
}

// Server is the program of the package server, as bytes for an image.
func Server(t testing.TB) []byte {
	t.Helper()
	data, err := os.ReadFile(Build(t, "meshupd/install/ocitest/server"))
	if err != nil {
		t.Fatal(err)
	}
	return data
}
