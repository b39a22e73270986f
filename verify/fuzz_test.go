package verify_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"meshupd/verify"
	"meshupd/verify/publish"
	"meshupd/verify/verifytest"
)

// seedFiles adds the checked-in samples of a kind: real documents that gpg and
// this project wrote, so that the fuzzer starts inside the formats.
func seedFiles(f *testing.F, pattern string) {
	f.Helper()
	paths, err := filepath.Glob(filepath.Join("testdata", "seeds", pattern))
	if err != nil || len(paths) == 0 {
		f.Fatalf("no seeds %s: %v", pattern, err)
	}
	for _, p := range paths {
		raw, err := os.ReadFile(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
		f.Add(raw[:len(raw)/2])
	}
}

// refusedWell fails unless err is nil or has a code.
func refusedWell(t *testing.T, err error) {
	t.Helper()
	if err != nil && verify.CodeOf(err) == "" {
		t.Fatalf("no code: %v", err)
	}
}

func FuzzManifest(f *testing.F) {
	seedFiles(f, "manifest*.json")
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := verify.ParseUnverifiedManifest(raw)
		refusedWell(t, err)
		if err != nil {
			return
		}
		// What is accepted can be written again and is then accepted again, the same.
		out, err := verify.EncodeManifest(m)
		if err != nil {
			t.Fatalf("accepted, but cannot be written: %v", err)
		}
		again, err := verify.ParseUnverifiedManifest(out)
		if err != nil {
			t.Fatal(err)
		}
		if twice, err := verify.EncodeManifest(again); err != nil || !bytes.Equal(twice, out) {
			t.Fatalf("not stable: %v", err)
		}
	})
}

func FuzzTrustDocument(f *testing.F) {
	seedFiles(f, "trust*.json")
	f.Fuzz(func(t *testing.T, raw []byte) {
		doc, err := verify.ParseUnverifiedTrust(raw)
		refusedWell(t, err)
		if err != nil {
			return
		}
		if doc.Root.Threshold < 1 || doc.Release.Threshold < 1 || doc.Root.Threshold > len(doc.Root.Keys) {
			t.Fatal("a threshold that cannot protect was accepted")
		}
		if _, err := verify.EncodeTrust(doc); err != nil {
			t.Fatalf("accepted, but cannot be written: %v", err)
		}
	})
}

// FuzzSignature holds hostile signatures and certificates against good ones. No
// signature but the real one may hold, whatever a certificate says.
func FuzzSignature(f *testing.F) {
	data, err := os.ReadFile("testdata/seeds/manifest.json")
	if err != nil {
		f.Fatal(err)
	}
	raw, err := os.ReadFile("testdata/seeds/release.pgp")
	if err != nil {
		f.Fatal(err)
	}
	good, err := verify.ReadCertificate(raw)
	if err != nil {
		f.Fatal(err)
	}
	seedFiles(f, "*.sig")
	seedFiles(f, "*.pgp")
	f.Fuzz(func(t *testing.T, raw []byte) {
		refusedWell(t, good.CheckSignature(data, raw))
		if err := good.CheckSignature([]byte("other data"), raw); err == nil {
			t.Fatal("a signature over other data held")
		}
		cert, err := verify.ReadCertificate(raw)
		refusedWell(t, err)
		if err == nil {
			refusedWell(t, cert.CheckSignature(data, raw))
			cert.Issued(raw)
		}
	})
}

func FuzzReadHead(f *testing.F) {
	seedFiles(f, "*.head")
	seedFiles(f, "*.update")
	f.Fuzz(func(t *testing.T, raw []byte) {
		h, err := verify.ReadHead(bytes.NewReader(raw))
		refusedWell(t, err)
		if err != nil {
			return
		}
		canonical := h.Bytes()
		again, err := verify.ReadHead(bytes.NewReader(canonical))
		if err != nil {
			t.Fatalf("the canonical form is refused: %v", err)
		}
		if !bytes.Equal(again.Bytes(), canonical) {
			t.Fatal("the canonical form is not stable")
		}
	})
}

// FuzzBundle takes whole hostile bundles through a door. Whatever comes out must
// be the one release that was really signed.
func FuzzBundle(f *testing.F) {
	seedFiles(f, "*.update")
	seedFiles(f, "*.head")
	real, err := os.ReadFile("testdata/seeds/small.update")
	if err != nil {
		f.Fatal(err)
	}
	door, err := verify.OpenDoor(verify.DoorConfig{Dir: f.TempDir(), Anchor: "testdata/seeds/anchor"})
	if err != nil {
		f.Fatal(err)
	}
	bundle, err := verify.OpenBundle(bytes.NewReader(real))
	if err != nil {
		f.Fatal(err)
	}
	want, err := door.Check(f.Context(), bundle.Head())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, err := verify.OpenBundle(bytes.NewReader(raw))
		refusedWell(t, err)
		if err != nil {
			return
		}
		rel, err := door.Check(t.Context(), b.Head())
		refusedWell(t, err)
		if err != nil {
			return
		}
		if rel.ID() != want.ID() {
			t.Fatal("a release that nobody signed came through the door")
		}
		for {
			_, r, err := b.NextImage(rel)
			if errors.Is(err, io.EOF) {
				return
			}
			refusedWell(t, err)
			if err != nil {
				return
			}
			_, err = io.Copy(io.Discard, r)
			refusedWell(t, err)
			if err != nil {
				return
			}
		}
	})
}

// TestWriteSeeds writes the samples again when they are asked for, except those of gpg:
//
//	MESHUPD_WRITE_SEEDS=1 go test -run TestWriteSeeds ./verify
func TestWriteSeeds(t *testing.T) {
	dir := filepath.Join("testdata", "seeds")
	if os.Getenv("MESHUPD_WRITE_SEEDS") == "" {
		b := readFile(t, filepath.Join(dir, "small.update"))
		door, err := verify.OpenDoor(verify.DoorConfig{Dir: t.TempDir(), Anchor: filepath.Join(dir, "anchor")})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := take(t, door, b); err != nil {
			t.Fatalf("a release written by an earlier build is refused: %v", err)
		}
		return
	}
	v := verifytest.NewVendor(t, "kiosk-a")
	folder := v.Release(t, verifytest.Opts{Size: 17_000, Requires: ">=1.0.0", Notes: []string{"a note"},
		Images: []verifytest.Image{{Name: "rootfs", Size: 17_000, PieceLength: 16 << 10}}})
	update := filepath.Join(t.TempDir(), "small.update")
	if err := publish.Pack(t.Context(), folder, update, nil); err != nil {
		t.Fatal(err)
	}
	raw := readFile(t, update)
	head, err := verify.ReadHead(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "anchor")); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(dir, "anchor"), os.DirFS(v.Anchor())); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"small.update":  raw,
		"small.head":    head.Bytes(),
		"manifest.json": head.UnverifiedManifest(),
		"manifest.sig":  head.UnverifiedSignature(),
		"trust.json":    head.UnverifiedTrust()[0],
		"trust.sig":     readFile(t, filepath.Join(v.Anchor(), "trust.1.sig")),
		"release.pgp":   v.Key.Certificate().Bytes(),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
