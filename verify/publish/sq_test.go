package publish_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"meshupd/verify"
	"meshupd/verify/publish"
)

// sequoia is the real sq (Sequoia PGP, Debian package sq), which shares no code
// with gpg nor with the library that devices use.
type sequoia struct {
	t   *testing.T
	dir string
}

// need skips a test whose foreign tool is missing on this machine. CI has them all, so there it fails.
func need(t *testing.T, tool string) {
	t.Helper()
	if _, err := exec.LookPath(tool); err == nil {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatalf("CI must have %s", tool)
	}
	t.Skipf("%s is not installed here: what it makes of our signatures is not tested", tool)
}

func newSequoia(t *testing.T) *sequoia {
	t.Helper()
	need(t, "sq")
	return &sequoia{t, t.TempDir()}
}

func (q *sequoia) run(args ...string) {
	q.t.Helper()
	if out, err := exec.Command("sq", args...).CombinedOutput(); err != nil {
		q.t.Fatalf("sq %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// file writes data where sq can read it.
func (q *sequoia) file(name string, data []byte) string {
	q.t.Helper()
	path := filepath.Join(q.dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		q.t.Fatal(err)
	}
	return path
}

// sign returns a detached signature by the secret key in the file.
func (q *sequoia) sign(key, document string) []byte {
	q.t.Helper()
	out := filepath.Join(q.dir, "sig")
	q.run("--force", "sign", "--detached", "--signer-key", key, "--output", out, document)
	raw, err := os.ReadFile(out)
	if err != nil {
		q.t.Fatal(err)
	}
	return raw
}

// both takes a secret key, unprotected, through both directions: sq signs and a
// device believes it; we sign with the same key and sq believes it.
func (q *sequoia) both(secret []byte, cert *verify.Certificate) {
	q.t.Helper()
	t := q.t
	keyFile := q.file("key.pgp", secret)
	b := newBench(t, 1, cert)
	dir := b.release("1.0.0")
	wantCode(t, publish.AddSignature(dir, q.sign(keyFile, filepath.Join(dir, "manifest.json"))), "")
	rel, err := b.verify(dir)
	if err != nil {
		t.Fatalf("a device refuses what sq signed: %v", err)
	}
	if s := rel.Signers(); len(s) != 1 || s[0].Fingerprint != cert.Fingerprint() {
		t.Fatalf("signed by %+v", s)
	}
	key, err := publish.LoadSecretKey(secret, nil)
	wantCode(t, err, "")
	second := b.release("1.1.0")
	wantCode(t, publish.Sign(second, key), "")
	_, err = b.verify(second)
	wantCode(t, err, "")
	public, err := key.PublicArmored()
	wantCode(t, err, "")
	q.run("verify", "--signer-cert", q.file("cert.pgp", public), "--detached", filepath.Join(second, "manifest.sig"), filepath.Join(second, "manifest.json"))
	if out, err := exec.Command("sq", "verify", "--signer-cert", filepath.Join(q.dir, "cert.pgp"), "--detached",
		filepath.Join(second, "manifest.sig"), filepath.Join(dir, "manifest.json")).CombinedOutput(); err == nil {
		t.Errorf("sq believes the signature of another release: %s", out)
	}
}

func TestSequoiaKeysWorkBothWays(t *testing.T) {
	for _, suite := range []string{"cv25519", "rsa3k"} {
		t.Run(suite, func(t *testing.T) {
			q := newSequoia(t)
			path := filepath.Join(q.dir, "made.pgp")
			q.run("key", "generate", "--userid", "Acme", "--cipher-suite", suite, "--creation-time", "20240101", "--export", path)
			secret, err := os.ReadFile(path)
			wantCode(t, err, "")
			public := filepath.Join(q.dir, "public.pgp")
			q.run("key", "extract-cert", "--output", public, path)
			raw, err := os.ReadFile(public)
			wantCode(t, err, "")
			cert, err := publish.ReadCertificate(raw)
			wantCode(t, err, "")
			q.both(secret, cert)
		})
	}
}

func TestSequoiaSignsWithKeysOfGpg(t *testing.T) {
	for _, algorithm := range []string{"rsa3072", "ed25519", "nistp256"} {
		t.Run(algorithm, func(t *testing.T) {
			q, g := newSequoia(t), newGnupg(t)
			cert := g.key("Acme", algorithm)
			q.both(g.run("--export-secret-keys", "Acme"), cert)
		})
	}
	t.Run("ed25519 with a signing subkey", func(t *testing.T) {
		q, g := newSequoia(t), newGnupg(t)
		g.run("--passphrase", "", "--quick-gen-key", "Acme", "ed25519", "cert", "never")
		g.run("--passphrase", "", "--quick-add-key", g.export("Acme").Fingerprint(), "ed25519", "sign", "never")
		q.both(g.run("--export-secret-keys", "Acme"), g.export("Acme"))
	})
}

func TestSequoiaAcceptsWhatWeSign(t *testing.T) {
	q := newSequoia(t)
	key, err := publish.NewKey(publish.KeyOptions{Name: "Acme Releases", Now: time.Unix(1_600_000_000, 0)})
	wantCode(t, err, "")
	secret, err := key.SecretArmored()
	wantCode(t, err, "")
	q.both(secret, key.Certificate())
}

// One signature by gpg, one by sq, one by us: three tools, one release of 3 of 3, each on a copy of its own.
func TestThreeToolsOnThreeMachines(t *testing.T) {
	g, q := newGnupg(t), newSequoia(t)
	byGpg := g.key("By gpg", "ed25519")
	path := filepath.Join(q.dir, "sq.pgp")
	q.run("key", "generate", "--userid", "By sq", "--creation-time", "20240101", "--export", path)
	secret, err := os.ReadFile(path)
	wantCode(t, err, "")
	sqKey, err := publish.LoadSecretKey(secret, nil)
	wantCode(t, err, "")
	ours := newKey(t, "Ours")
	b := newBench(t, 3, byGpg, sqKey.Certificate(), ours.Certificate())
	dir := b.release("1.0.0")
	missing := func(want int) {
		t.Helper()
		p, err := publish.SigningProgress(dir)
		if err != nil || p.Missing() != want {
			t.Fatalf("%d missing (%v), want %d", p.Missing(), err, want)
		}
	}
	missing(3)
	wantCode(t, publish.Pack(t.Context(), dir, filepath.Join(b.out, "x.update"), nil), verify.CodeSigNone)
	g.run("--armor", "--detach-sign", filepath.Join(dir, "manifest.json"))
	_, err = publish.Absorb(dir)
	wantCode(t, err, "")
	missing(2)
	wantCode(t, publish.AddSignature(dir, q.sign(path, filepath.Join(dir, "manifest.json"))), "")
	missing(1)
	wantCode(t, publish.Pack(t.Context(), dir, filepath.Join(b.out, "x.update"), nil), verify.CodeSigKey)
	_, err = b.verify(dir)
	wantCode(t, err, verify.CodeSigKey)
	wantCode(t, publish.Sign(dir, ours), "")
	missing(0)
	wantCode(t, publish.Pack(t.Context(), dir, filepath.Join(b.out, "x.update"), nil), "")
	rel, err := b.verify(filepath.Join(b.out, "x.update"))
	wantCode(t, err, "")
	if len(rel.Signers()) != 3 {
		t.Fatalf("signed by %+v", rel.Signers())
	}
}
