package publish_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"meshupd/verify"
	"meshupd/verify/publish"
)

func newKey(t *testing.T, name string) *publish.SecretKey {
	t.Helper()
	k, err := publish.NewKey(publish.KeyOptions{Name: name, Now: time.Unix(1_600_000_000, 0)})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func wantCode(t *testing.T, err error, want verify.Code) {
	t.Helper()
	if verify.CodeOf(err) != want || (want == "" && err != nil) {
		t.Fatalf("got %v (%s), want %q", err, verify.CodeOf(err), want)
	}
}

// tree is every file below dir with its content's digest.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		fmt.Fprintf(&b, "%s %x\n", rel, sha256.Sum256(raw))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestSameInputSameBytes(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	key := newKey(t, "Acme")
	var trees, bundles []string
	for range 2 {
		b := newBench(t, 1, key.Certificate())
		// The root key is new each time; what belongs to the release itself must not change.
		dir := b.release("1.0.0")
		wantCode(t, publish.Sign(dir, key), "")
		once := tree(t, dir)
		wantCode(t, publish.Sign(dir, key), "")
		if tree(t, dir) != once {
			t.Fatal("signing again changes the release")
		}
		var own []string
		for _, line := range strings.Split(once, "\n") {
			if !strings.HasPrefix(line, "trust.") && !strings.HasPrefix(line, "certs/") {
				own = append(own, line)
			}
		}
		trees = append(trees, strings.Join(own, "\n"))
		for range 2 {
			out := filepath.Join(t.TempDir(), "x.update")
			wantCode(t, publish.Pack(t.Context(), dir, out, nil), "")
			raw, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			bundles = append(bundles, string(raw))
		}
	}
	if trees[0] != trees[1] {
		t.Fatalf("two runs differ:\n%s\n%s", trees[0], trees[1])
	}
	if bundles[0] != bundles[1] || bundles[2] != bundles[3] {
		t.Fatal("packing twice gives two files")
	}
	if !strings.Contains(bundles[0], `"issued_at": "2023-11-14T22:13:20Z"`) {
		t.Fatal("SOURCE_DATE_EPOCH is not the date of the release")
	}
	t.Setenv("SOURCE_DATE_EPOCH", "yesterday")
	_, err := publish.Now()
	wantCode(t, err, verify.CodeUsage)
}

func TestPackedReleaseIsAPlainTar(t *testing.T) {
	key := newKey(t, "Acme")
	b := newBench(t, 1, key.Certificate())
	dir := b.release("1.0.0")
	wantCode(t, publish.Sign(dir, key), "")
	out := filepath.Join(b.out, "x.update")
	wantCode(t, publish.Pack(t.Context(), dir, out, nil), "")
	unpacked := t.TempDir()
	if msg, err := exec.Command("tar", "-xf", out, "-C", unpacked).CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, msg)
	}
	if tree(t, unpacked) != tree(t, dir) {
		t.Fatal("plain tar takes out something else than was put in")
	}
	// And what plain tar makes, in the right order, a device takes, in each of tar's formats.
	list, err := exec.Command("tar", "-tf", out).Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"ustar", "gnu", "pax"} {
		again := filepath.Join(b.out, format+".update")
		args := append([]string{"-cf", again, "--format", format, "-C", dir}, strings.Fields(string(list))...)
		if msg, err := exec.Command("tar", args...).CombinedOutput(); err != nil {
			t.Fatalf("tar: %v: %s", err, msg)
		}
		_, err := b.verify(again)
		wantCode(t, err, "")
	}
}

func TestSeqCountsUp(t *testing.T) {
	key := newKey(t, "Acme")
	b := newBench(t, 1, key.Certificate())
	seq := func(dir string) uint64 {
		t.Helper()
		u, err := publish.Inspect(dir)
		wantCode(t, err, "")
		return u.Manifest.Seq
	}
	for i, version := range []string{"1.0.0", "1.1.0", "1.0.1"} {
		if got := seq(b.release(version)); got != uint64(i+1) {
			t.Fatalf("release %s has seq %d", version, got)
		}
	}
	options := publish.Options{Out: t.TempDir(), Trust: b.anchor, Version: "2.0.0", Images: []publish.ImageInput{{Path: b.image}},
		Previous: filepath.Join(b.out, "kiosk-a_1.1.0")}
	dir, err := publish.Create(t.Context(), options)
	wantCode(t, err, "")
	if got := seq(dir); got != 3 {
		t.Fatalf("after seq 2 comes %d", got)
	}
	_, err = publish.Create(t.Context(), options)
	wantCode(t, err, verify.CodeUsage) // it is there already
	options.Version, options.Seq = "2.1.0", 77
	dir, err = publish.Create(t.Context(), options)
	wantCode(t, err, "")
	if got := seq(dir); got != 77 {
		t.Fatalf("seq 77 became %d", got)
	}
	// A manifest that cannot be read must not be counted as none.
	if err := os.WriteFile(filepath.Join(b.out, "kiosk-a_1.1.0", "manifest.json"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = publish.Create(t.Context(), publish.Options{Out: b.out, Trust: b.anchor, Version: "3.0.0", Images: []publish.ImageInput{{Path: b.image}}})
	wantCode(t, err, verify.CodeFormat)
}

func TestCreateRefusesAndLeavesNothing(t *testing.T) {
	key := newKey(t, "Acme")
	b := newBench(t, 1, key.Certificate())
	base := publish.Options{Out: b.out, Trust: b.anchor, Version: "1.0.0", Images: []publish.ImageInput{{Path: b.image}}}
	empty := filepath.Join(t.TempDir(), "empty.img")
	if err := os.WriteFile(empty, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		change func(o *publish.Options)
		want   verify.Code
	}{
		{"no image", func(o *publish.Options) { o.Images = nil }, verify.CodeUsage},
		{"image missing", func(o *publish.Options) { o.Images = []publish.ImageInput{{Path: b.image + "x"}} }, verify.CodeNotFound},
		{"image is a folder", func(o *publish.Options) { o.Images = []publish.ImageInput{{Path: b.out}} }, verify.CodeUsage},
		{"image empty", func(o *publish.Options) { o.Images = []publish.ImageInput{{Path: empty}} }, verify.CodeSize},
		{"image name", func(o *publish.Options) { o.Images = []publish.ImageInput{{Path: b.image, Name: "Root FS"}} }, verify.CodeFormat},
		{"version", func(o *publish.Options) { o.Version = "1.0" }, verify.CodeFormat},
		{"version that climbs", func(o *publish.Options) { o.Version = "../../1.0.0" }, verify.CodeFormat},
		{"requires", func(o *publish.Options) { o.Requires = "soon" }, verify.CodeFormat},
		{"channel", func(o *publish.Options) { o.Channel = "A B" }, verify.CodeFormat},
		{"no trust", func(o *publish.Options) { o.Trust = t.TempDir() }, verify.CodeTrust},
		{"previous missing", func(o *publish.Options) { o.Previous = filepath.Join(b.out, "none") }, verify.CodeNotFound},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := base
			c.change(&o)
			_, err := publish.Create(t.Context(), o)
			wantCode(t, err, c.want)
			if left, _ := os.ReadDir(b.out); len(left) != 0 {
				t.Fatalf("the folder holds %v", left)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := publish.Create(ctx, base); err == nil || ctx.Err() == nil {
		t.Fatal("a cancelled Create went on")
	}
	if left, _ := os.ReadDir(b.out); len(left) != 0 {
		t.Fatalf("a cancelled Create left %v", left)
	}
}

func TestCompressedSlotImageIsDescribedDecoded(t *testing.T) {
	key := newKey(t, "Acme")
	b := newBench(t, 1, key.Certificate())
	content := bytes.Repeat([]byte("all work and no play "), 50_000)
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	packed := enc.EncodeAll(content, nil)
	path := filepath.Join(t.TempDir(), "rootfs.img.zst")
	if err := os.WriteFile(path, packed, 0o644); err != nil {
		t.Fatal(err)
	}
	create := func(out string, in publish.ImageInput) (string, error) {
		return publish.Create(t.Context(), publish.Options{Out: out, Trust: b.anchor, Version: "1.0.0", Images: []publish.ImageInput{in}})
	}
	dir, err := create(b.out, publish.ImageInput{Path: path})
	wantCode(t, err, "")
	u, err := publish.Inspect(dir)
	wantCode(t, err, "")
	img := u.Manifest.Images[0]
	want := verify.Content{Size: int64(len(content)), SHA256: sha256.Sum256(content)}
	if img.Encoding != verify.EncodingZstd || img.Content != want || img.Size != int64(len(packed)) || img.Name != "rootfs.img.zst" {
		t.Fatalf("the image is %+v", img)
	}
	wantCode(t, publish.Sign(dir, key), "")
	_, err = b.verify(dir)
	wantCode(t, err, "")

	// Only slots are decoded on a device; other kinds are files as they are.
	dir, err = create(t.TempDir(), publish.ImageInput{Path: path, Kind: verify.KindFiles})
	wantCode(t, err, "")
	u, err = publish.Inspect(dir)
	wantCode(t, err, "")
	if u.Manifest.Images[0].Encoding != verify.EncodingNone {
		t.Fatal("a file was taken for a compressed slot")
	}
	if err := os.WriteFile(path+".cut", packed[:len(packed)/2], 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = create(t.TempDir(), publish.ImageInput{Path: path + ".cut"})
	wantCode(t, err, verify.CodeFormat)

	// A signed lie about the content is found before it is published.
	dir, err = create(t.TempDir(), publish.ImageInput{Path: path})
	wantCode(t, err, "")
	manifest := filepath.Join(dir, "manifest.json")
	raw, err := os.ReadFile(manifest)
	wantCode(t, err, "")
	raw = bytes.Replace(raw, fmt.Appendf(nil, `"size": %d,`, len(content)), fmt.Appendf(nil, `"size": %d,`, len(content)+1), 1)
	if err := os.WriteFile(manifest, raw, 0o644); err != nil {
		t.Fatal(err)
	}
	wantCode(t, publish.Sign(dir, key), "")
	_, err = b.verify(dir)
	wantCode(t, err, verify.CodeDigest)
}

func TestSignReplacesTheOlderSignatureOfTheSameKey(t *testing.T) {
	a, c := newKey(t, "A"), newKey(t, "C")
	b := newBench(t, 2, a.Certificate(), c.Certificate())
	dir := b.release("1.0.0")
	count := func(want int) {
		t.Helper()
		u, err := publish.Inspect(dir)
		wantCode(t, err, "")
		if u.Signatures != want || len(u.ClaimedSigners) != want {
			t.Fatalf("%d signatures by %+v, want %d", u.Signatures, u.ClaimedSigners, want)
		}
	}
	count(0)
	wantCode(t, publish.Pack(t.Context(), dir, filepath.Join(b.out, "x.update"), nil), verify.CodeSigNone)
	wantCode(t, publish.Sign(dir, a), "")
	wantCode(t, publish.Sign(dir, a), "")
	count(1)
	_, err := b.verify(dir)
	wantCode(t, err, verify.CodeSigKey)
	wantCode(t, publish.Sign(dir, c), "")
	count(2)
	rel, err := b.verify(dir)
	wantCode(t, err, "")
	if len(rel.Signers()) != 2 {
		t.Fatalf("signers %+v", rel.Signers())
	}
	wantCode(t, publish.Sign(dir, newKey(t, "Stranger")), verify.CodeSigKey)
	count(2)
}

func TestVerifyIsAsStrictAsADevice(t *testing.T) {
	key := newKey(t, "Acme")
	b := newBench(t, 1, key.Certificate())
	dir := b.release("1.0.0")
	wantCode(t, publish.Sign(dir, key), "")
	stranger := newBench(t, 1, key.Certificate())
	_, err := publish.Verify(t.Context(), dir, stranger.anchor, nil)
	wantCode(t, err, verify.CodeTrust)
	_, err = publish.Verify(t.Context(), filepath.Join(b.out, "none"), b.anchor, nil)
	wantCode(t, err, verify.CodeNotFound)
	var last, total int64
	_, err = publish.Verify(t.Context(), dir, b.anchor, func(d, n int64) { last, total = d, n })
	wantCode(t, err, "")
	if last != 150_000 || total != 150_000 {
		t.Fatalf("progress ended at %d of %d", last, total)
	}
	images, _ := filepath.Glob(filepath.Join(dir, "images", "*"))
	raw, err := os.ReadFile(images[0])
	wantCode(t, err, "")
	raw[99] ^= 1
	wantCode(t, os.Remove(images[0]), "")
	wantCode(t, os.WriteFile(images[0], raw, 0o644), "")
	_, err = b.verify(dir)
	wantCode(t, err, verify.CodeDigest)
	out := filepath.Join(b.out, "x.update")
	wantCode(t, publish.Pack(t.Context(), dir, out, nil), verify.CodeDigest)
	if _, err := os.Stat(out); err == nil {
		t.Fatal("a refused Pack left a file")
	}
}

// Two images with a root that does not fit their bytes pass every digest; only
// the merkle tree shows it, and devices could never fetch such a release.
func TestWrongPiecesRootIsFound(t *testing.T) {
	key := newKey(t, "Acme")
	b := newBench(t, 1, key.Certificate())
	small := filepath.Join(t.TempDir(), "small.img")
	wantCode(t, publish.GenerateImage(small, 100, 1), "")
	dir, err := publish.Create(t.Context(), publish.Options{Out: b.out, Trust: b.anchor, Version: "1.0.0", Images: []publish.ImageInput{{Path: small}}})
	wantCode(t, err, "")
	u, err := publish.Inspect(dir)
	wantCode(t, err, "")
	m := u.Manifest
	m.Images[0].Pieces.Root[0] ^= 1
	raw, err := verify.EncodeManifest(m)
	wantCode(t, err, "")
	wantCode(t, os.WriteFile(filepath.Join(dir, "manifest.json"), raw, 0o644), "")
	wantCode(t, publish.Sign(dir, key), "")
	_, err = b.verify(dir)
	wantCode(t, err, verify.CodeDigest)
}

func TestAbsorbRefusesWhatDoesNotBelong(t *testing.T) {
	key := newKey(t, "Acme")
	b := newBench(t, 1, key.Certificate())
	dir, other := b.release("1.0.0"), b.release("1.1.0")
	manifest, err := os.ReadFile(filepath.Join(other, "manifest.json"))
	wantCode(t, err, "")
	sig, err := key.DetachSign(manifest, time.Unix(1_700_000_000, 0))
	wantCode(t, err, "")
	left := filepath.Join(dir, "manifest.json.sig")
	wantCode(t, os.WriteFile(left, sig, 0o644), "")
	_, err = publish.Absorb(dir)
	wantCode(t, err, verify.CodeSigBad)
	if _, err := os.Stat(left); err != nil {
		t.Fatal("a refused signature was removed")
	}
	if _, err := os.Stat(filepath.Join(dir, "manifest.sig")); err == nil {
		t.Fatal("a refused signature was stored")
	}
}

func TestKeys(t *testing.T) {
	for _, name := range []string{"", "a(b)", "x\x00y", strings.Repeat("n", 49), "a\nb"} {
		_, err := publish.NewKey(publish.KeyOptions{Name: name})
		wantCode(t, err, verify.CodeKey)
	}
	dev, err := publish.NewKey(publish.KeyOptions{Name: "Acme", Development: true, Passphrase: []byte("p")})
	wantCode(t, err, "")
	if dev.Name() != "Acme DEVELOPMENT" {
		t.Fatalf("the key is called %q", dev.Name())
	}
	secret, err := dev.SecretArmored()
	wantCode(t, err, "")
	if !bytes.HasPrefix(secret, []byte("-----BEGIN PGP PRIVATE KEY BLOCK-----")) {
		t.Fatalf("not an armored secret key: %.40s", secret)
	}
	_, err = publish.LoadSecretKey(secret, nil)
	wantCode(t, err, verify.CodeKey)
	again, err := publish.LoadSecretKey(secret, []byte("p"))
	wantCode(t, err, "")
	if again.Fingerprint() != dev.Fingerprint() || again.Certificate().Digest() != dev.Certificate().Digest() {
		t.Fatal("the key came back as another one")
	}
	if _, err := dev.DetachSign([]byte("x"), time.Now()); err != nil {
		t.Fatalf("after it was written the key does not sign any more: %v", err)
	}
	public, err := dev.PublicArmored()
	wantCode(t, err, "")
	cert, err := publish.ReadCertificate(public)
	wantCode(t, err, "")
	if cert.Digest() != dev.Certificate().Digest() {
		t.Fatal("the public half came back as another one")
	}
	for _, bad := range [][]byte{nil, []byte("x"), public[:100], secret[:300]} {
		_, err := publish.ReadCertificate(bad)
		wantCode(t, err, verify.CodeKey)
		_, err = publish.LoadSecretKey(bad, nil)
		wantCode(t, err, verify.CodeKey)
	}
	_, err = publish.ReadCertificate(secret)
	wantCode(t, err, verify.CodeKey) // a secret key must never be taken for a certificate to ship
	_, err = publish.LoadSecretKey(public, nil)
	wantCode(t, err, verify.CodeKey)
}

func TestInitTrustDoesNotReplace(t *testing.T) {
	key := newKey(t, "Acme")
	dir := filepath.Join(t.TempDir(), "trust")
	o := publish.TrustOptions{Product: "kiosk-a", Root: []*verify.Certificate{key.Certificate()}, Signers: []*publish.SecretKey{key}}
	wantCode(t, publish.InitTrust(dir, o), "")
	before := tree(t, dir)
	wantCode(t, publish.InitTrust(dir, o), verify.CodeUsage)
	if tree(t, dir) != before {
		t.Fatal("a refused InitTrust changed the folder")
	}
	o.Product = "Not A Name"
	wantCode(t, publish.InitTrust(filepath.Join(t.TempDir(), "x"), o), verify.CodeFormat)
}
