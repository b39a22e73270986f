package verify_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"meshupd/verify"
	"meshupd/verify/publish"
	"meshupd/verify/verifytest"
)

// take does what a device does with a bundle: head, door, every image.
func take(t *testing.T, door *verify.Door, raw []byte) (*verify.Release, error) {
	t.Helper()
	b, err := verify.OpenBundle(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	return takeOpen(t, door, b)
}

func takeOpen(t *testing.T, door *verify.Door, b *verify.UnverifiedBundle) (*verify.Release, error) {
	t.Helper()
	defer b.Close()
	rel, err := door.Check(t.Context(), b.Head())
	if err != nil {
		return nil, err
	}
	for {
		img, r, err := b.NextImage(rel)
		if errors.Is(err, io.EOF) {
			return rel, nil
		}
		if err != nil {
			return nil, err
		}
		h := sha256.New()
		n, err := io.Copy(h, r)
		if err != nil {
			return nil, err
		}
		if n != img.Size || verify.Digest(h.Sum(nil)) != img.SHA256 {
			t.Fatal("the reader ended well with bytes that were not signed")
		}
	}
}

func TestBadBundlesAreRefusedByNameAndLeaveNoTrace(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	good := readFile(t, v.Bundle(t, verifytest.Opts{Images: []verifytest.Image{{Name: "rootfs"}, {Name: "extra", Size: 1000}}}))
	files := untar(t, good)
	state := t.TempDir()
	door := v.DoorAt(t, state)
	before := snapshot(t, state)

	stranger := verifytest.NewVendor(t, "kiosk-a")
	other := verifytest.NewVendor(t, "kiosk-b")
	sameKeys := &verifytest.Vendor{Vendor: &publish.Vendor{Dir: t.TempDir(), Product: "kiosk-b", Key: v.Key}}
	if err := publish.InitTrust(sameKeys.Anchor(), publish.TrustOptions{
		Product: "kiosk-b", Root: []*verify.Certificate{v.Key.Certificate()}, Signers: []*publish.SecretKey{v.Key},
	}); err != nil {
		t.Fatal(err)
	}
	with := func(change func(f []file) []file) []byte { return retar(t, change(append([]file{}, files...))) }
	edit := func(prefix string, change func(data []byte) []byte) []byte {
		return with(func(f []file) []file {
			i := find(t, f, prefix)
			f[i].data = change(bytes.Clone(f[i].data))
			return f
		})
	}
	flip := func(data []byte) []byte { data[len(data)/2] ^= 0x10; return data }
	swapSignature := func(path string) []byte {
		theirs := untar(t, readFile(t, path))
		return edit("manifest.sig", func([]byte) []byte { return theirs[find(t, theirs, "manifest.sig")].data })
	}
	link := func(kind byte) []byte {
		return with(func(f []file) []file {
			i := find(t, f, "images/")
			f[i] = file{tar.Header{Name: f[i].Name, Typeflag: kind, Linkname: "/etc/passwd"}, nil}
			return f
		})
	}
	cases := []struct {
		name string
		raw  []byte
		want verify.Code
	}{
		{"empty file", nil, verify.CodeTruncated},
		{"not a tar", bytes.Repeat([]byte("not a bundle "), 200), verify.CodeFormat},
		{"only zeros", make([]byte, 4096), verify.CodeBundle},
		{"unsigned", with(func(f []file) []file { return remove(f, find(t, f, "manifest.sig")) }), verify.CodeSigNone},
		{"empty signature", edit("manifest.sig", func([]byte) []byte { return nil }), verify.CodeSigNone},
		{"signed by a stranger", swapSignature(stranger.Bundle(t, verifytest.Opts{})), verify.CodeSigKey},
		{"a stranger's bundle", readFile(t, stranger.Bundle(t, verifytest.Opts{})), verify.CodeSigKey},
		{"a stranger's bundle for another product", readFile(t, other.Bundle(t, verifytest.Opts{})), verify.CodeSigKey},
		{"our publisher's bundle for another product", readFile(t, sameKeys.Bundle(t, verifytest.Opts{})), verify.CodeProduct},
		{"signature of another manifest", swapSignature(v.Bundle(t, verifytest.Opts{})), verify.CodeSigBad},
		{"manifest changed", edit("manifest.json", flip), verify.CodeSigBad},
		{"manifest with a space added", edit("manifest.json", func(d []byte) []byte { return append(d, ' ') }), verify.CodeSigBad},
		{"signature with bytes after it", edit("manifest.sig", func(d []byte) []byte { return append(d, "junk"...) }), verify.CodeFormat},
		{"signature cut", edit("manifest.sig", func(d []byte) []byte { return d[:len(d)-5] }), verify.CodeFormat},
		{"nine signatures", edit("manifest.sig", func(d []byte) []byte { return bytes.Repeat(d, 9) }), verify.CodeFormat},
		{"signature too large", edit("manifest.sig", func(d []byte) []byte { return make([]byte, verify.MaxSignature+1) }), verify.CodeSize},
		{"armored signature", edit("manifest.sig", func(d []byte) []byte { return []byte("-----BEGIN PGP SIGNATURE-----\n") }), verify.CodeFormat},
		{"manifest too large", edit("manifest.json", func([]byte) []byte { return make([]byte, verify.MaxManifest+1) }), verify.CodeSize},
		{"trust document changed", edit("trust.1.json", flip), verify.CodeTrust},
		{"trust document too large", edit("trust.1.json", func([]byte) []byte { return make([]byte, verify.MaxTrustDocument+1) }), verify.CodeSize},
		{"certificate changed", edit("certs/", flip), verify.CodeDigest},
		{"certificate too large", edit("certs/", func([]byte) []byte { return make([]byte, verify.MaxCertificate+1) }), verify.CodeSize},
		{"no trust document", with(func(f []file) []file { return f[2:] }), verify.CodeBundle},
		{"no trust signature", with(func(f []file) []file { return remove(f, 1) }), verify.CodeBundle},
		{"no certificate", with(func(f []file) []file { return remove(f, find(t, f, "certs/")) }), verify.CodeBundle},
		{"extra certificate", with(func(f []file) []file {
			c := stranger.Key.Certificate()
			extra := plain(verify.CertificateName(c.Digest()), c.Bytes())
			i := find(t, f, "certs/")
			if extra.Name > f[i].Name {
				i++
			}
			return insert(f, i, extra)
		}), verify.CodeBundle},
		{"no manifest", with(func(f []file) []file { return remove(f, find(t, f, "manifest.json")) }), verify.CodeBundle},
		{"no piece table", with(func(f []file) []file { return remove(f, find(t, f, "pieces/")) }), verify.CodeBundle},
		{"piece table changed", edit("pieces/", flip), verify.CodeDigest},
		{"piece table of a stranger", with(func(f []file) []file {
			return insert(f, find(t, f, "pieces/"), plain("pieces/"+strings.Repeat("0", 64), make([]byte, 64)))
		}), verify.CodeBundle},
		{"empty piece table for an image of one piece", with(func(f []file) []file {
			last := strings.TrimPrefix(f[len(f)-1].Name, "images/")
			i := find(t, f, "pieces/")
			if f[i].Name < "pieces/"+last {
				i++
			}
			return insert(f, i, plain("pieces/"+last, nil))
		}), verify.CodeBundle},
		{"image changed", edit("images/", flip), verify.CodeDigest},
		{"image shorter", edit("images/", func(d []byte) []byte { return d[1:] }), verify.CodeSize},
		{"image longer", edit("images/", func(d []byte) []byte { return append(d, 0) }), verify.CodeSize},
		{"image missing", with(func(f []file) []file { return f[:len(f)-1] }), verify.CodeBundle},
		{"images swapped", with(func(f []file) []file {
			n := len(f)
			f[n-1], f[n-2] = f[n-2], f[n-1]
			return f
		}), verify.CodeBundle},
		{"image renamed", with(func(f []file) []file { f[len(f)-1].Name = "images/rootfs"; return f }), verify.CodeBundle},
		{"image twice", with(func(f []file) []file { return append(f, f[len(f)-1]) }), verify.CodeBundle},
		{"extra file at the end", with(func(f []file) []file { return append(f, plain("README", []byte("hello"))) }), verify.CodeBundle},
		{"extra file at the start", with(func(f []file) []file { return insert(f, 0, plain("README", []byte("hello"))) }), verify.CodeBundle},
		{"manifest twice", with(func(f []file) []file {
			i := find(t, f, "manifest.json")
			return insert(f, i, f[i])
		}), verify.CodeBundle},
		{"name with a dot", with(func(f []file) []file { f[0].Name = "./trust.1.json"; return f }), verify.CodeBundle},
		{"name that climbs", with(func(f []file) []file { f[len(f)-1].Name = "../" + f[len(f)-1].Name; return f }), verify.CodeBundle},
		{"epoch spelled otherwise", with(func(f []file) []file { f[0].Name = "trust.01.json"; return f }), verify.CodeBundle},
		{"symbolic link", link(tar.TypeSymlink), verify.CodeBundle},
		{"hard link", link(tar.TypeLink), verify.CodeBundle},
		{"device", link(tar.TypeChar), verify.CodeBundle},
		{"pipe", link(tar.TypeFifo), verify.CodeBundle},
		{"folder", with(func(f []file) []file {
			return insert(f, 0, file{tar.Header{Name: "images/", Typeflag: tar.TypeDir, Mode: 0o755}, nil})
		}), verify.CodeBundle},
		{"attributes", with(func(f []file) []file {
			f[0].PAXRecords = map[string]string{"SCHILY.xattr.user.x": "y"}
			return f
		}), verify.CodeBundle},
		{"data after the end", append(bytes.Clone(good), append(make([]byte, 4096), 1)...), verify.CodeBundle},
		{"endless zeros after the end", append(bytes.Clone(good), make([]byte, 2<<20)...), verify.CodeSize},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			rel, err := take(t, door, c.raw)
			if verify.CodeOf(err) != c.want {
				t.Fatalf("got %v (%s), want %s", err, verify.CodeOf(err), c.want)
			}
			if rel != nil {
				t.Fatal("a refused bundle gave a release")
			}
			if snapshot(t, state) != before {
				t.Fatal("a refused bundle changed the state folder")
			}
		})
	}
	if _, err := take(t, door, good); err != nil {
		t.Fatalf("the good bundle: %v", err)
	}
}

func TestSparseEntriesAreRefused(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	raw := readFile(t, v.Bundle(t, verifytest.Opts{}))
	// An old GNU sparse header is an ordinary one with another type and magic.
	header := raw[:512]
	header[156] = tar.TypeGNUSparse
	copy(header[257:], "ustar  \x00")
	sum := 0
	copy(header[148:156], "        ")
	for _, b := range header {
		sum += int(b)
	}
	copy(header[148:156], fmt.Sprintf("%06o\x00 ", sum))
	if _, err := take(t, v.Door(t), raw); verify.CodeOf(err) != verify.CodeBundle {
		t.Fatalf("got %v, want E-BUNDLE", err)
	}
}

func TestTruncatedAnywhere(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	raw := readFile(t, v.Bundle(t, verifytest.Opts{Size: 70_000}))
	state := t.TempDir()
	door := v.DoorAt(t, state)
	before := snapshot(t, state)
	// The archive ends with two blocks of zeros; with one of them it is still a whole archive.
	for n := 0; n < len(raw)-1024; n += 97 {
		if _, err := take(t, door, raw[:n]); verify.CodeOf(err) != verify.CodeTruncated {
			t.Fatalf("cut at %d of %d: %v (%s), want E-TRUNCATED", n, len(raw), err, verify.CodeOf(err))
		}
	}
	for n := 512; n < len(raw)-1024; n += 512 { // exactly between blocks
		if _, err := take(t, door, raw[:n]); verify.CodeOf(err) != verify.CodeTruncated {
			t.Fatalf("cut at block %d of %d: %v (%s), want E-TRUNCATED", n/512, len(raw)/512, err, verify.CodeOf(err))
		}
	}
	if snapshot(t, state) != before {
		t.Fatal("a truncated bundle changed the state folder")
	}
}

// A flipped bit is refused, or it was in a place that carries no meaning (a date
// in a tar header, an unsigned part of a signature): then the release is the same to the byte.
func TestBitFlippedAnywhere(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	raw := readFile(t, v.Bundle(t, verifytest.Opts{Size: 70_000}))
	door := v.Door(t)
	want, err := take(t, door, raw)
	if err != nil {
		t.Fatal(err)
	}
	heads := len(raw) - 71_000
	refused, same := 0, 0
	for at := 0; at < len(raw); at++ {
		if at > heads && at%251 != 0 {
			continue // the image: every byte of it is under one digest
		}
		bad := bytes.Clone(raw)
		bad[at] ^= 1 << (at % 8)
		got, err := take(t, door, bad)
		switch {
		case err != nil && verify.CodeOf(err) == "":
			t.Fatalf("bit flipped at %d: %v has no code", at, err)
		case err != nil:
			refused++
		case got.ID() != want.ID():
			t.Fatalf("bit flipped at %d: another release was accepted", at)
		default:
			same++
		}
	}
	if refused == 0 || refused < same {
		t.Fatalf("%d flips refused, %d without effect", refused, same)
	}
}

// failing gives some bytes and then the error of a stick that was pulled.
type failing struct {
	r   io.Reader
	err error
}

func (f failing) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if errors.Is(err, io.EOF) {
		err = f.err
	}
	return n, err
}

func TestStickPulledIsNotCalledTruncated(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	raw := readFile(t, v.Bundle(t, verifytest.Opts{}))
	gone := errors.New("no such device")
	for _, n := range []int{0, 100, 5000, len(raw) - 50_000} {
		b, err := verify.OpenBundle(failing{bytes.NewReader(raw[:n]), gone})
		if err == nil {
			_, err = takeOpen(t, v.Door(t), b)
		}
		if verify.CodeOf(err) != verify.CodeIO || !errors.Is(err, gone) {
			t.Fatalf("stick pulled at %d: %v (%s), want E-IO", n, err, verify.CodeOf(err))
		}
	}
}

func TestHeadBytesAreCanonical(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	raw := readFile(t, v.Bundle(t, verifytest.Opts{}))
	b, err := verify.OpenBundle(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	head := b.Head().Bytes()
	if !bytes.HasPrefix(raw, head[:len(head)-1024]) {
		t.Error("the head of a packed bundle is not its beginning")
	}
	again, err := verify.ReadHead(bytes.NewReader(head))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again.Bytes(), head) {
		t.Error("reading and writing a head changes it")
	}
	files := untar(t, raw)
	for i := range files {
		files[i].ModTime, files[i].Uid, files[i].Uname, files[i].Mode = time.Unix(1e9, 5), 1000, "me", 0o600
	}
	other, err := verify.ReadHead(bytes.NewReader(retar(t, files)))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(other.Bytes(), head) {
		t.Error("the same head in another tar has other bytes")
	}
	rel, err := v.Door(t).Check(t.Context(), other)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(rel.Head(), head) {
		t.Error("the head that is handed on differs from the one that came")
	}
	if _, err := verify.ReadHead(bytes.NewReader(append(head, 1))); verify.CodeOf(err) != verify.CodeBundle {
		t.Errorf("a head with data after it: %v, want E-BUNDLE", err)
	}
}

func TestAnImageMayBeLeftUnread(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	path := v.Bundle(t, verifytest.Opts{Images: []verifytest.Image{{Name: "a"}, {Name: "b", Size: 5}, {Name: "c"}}})
	b, err := verify.OpenBundle(bytes.NewReader(readFile(t, path)))
	if err != nil {
		t.Fatal(err)
	}
	rel, err := v.Door(t).Check(t.Context(), b.Head())
	if err != nil {
		t.Fatal(err)
	}
	for range rel.Manifest().Images {
		_, r, err := b.NextImage(rel)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Read(make([]byte, 3)); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := b.NextImage(rel); !errors.Is(err, io.EOF) {
		t.Fatalf("after the last image: %v, want io.EOF", err)
	}
}

func TestBundleWithManyZerosAfterTheEnd(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	raw := readFile(t, v.Bundle(t, verifytest.Opts{}))
	// `tar` fills up to 10 KiB, or more when told to.
	for _, n := range []int{512, 10240, 1 << 19} {
		if _, err := take(t, v.Door(t), append(bytes.Clone(raw), make([]byte, n)...)); err != nil {
			t.Fatalf("%d zeros after the end: %v", n, err)
		}
	}
}
