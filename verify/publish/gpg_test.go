package publish_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"meshupd/verify"
	"meshupd/verify/publish"
)

// gnupg is the real gpg with a home of its own.
type gnupg struct {
	t    *testing.T
	home string
}

func newGnupg(t *testing.T) *gnupg {
	t.Helper()
	// Not t.TempDir: the agent's socket below it must fit into 108 bytes.
	need(t, "gpg")
	home, err := os.MkdirTemp("", "gpg")
	if err != nil {
		t.Fatal(err)
	}
	// Without a fixed count the agent first measures, for seconds, how slow it can make guessing.
	if err := os.WriteFile(filepath.Join(home, "gpg-agent.conf"), []byte("s2k-count 65536\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	g := &gnupg{t, home}
	t.Cleanup(func() {
		exec.Command("gpgconf", "--homedir", home, "--kill", "all").Run()
		os.RemoveAll(home)
	})
	return g
}

func (g *gnupg) try(stdin string, args ...string) ([]byte, error) {
	cmd := exec.Command("gpg", append([]string{"--homedir", g.home, "--batch", "--yes", "--no-tty", "--quiet",
		"--pinentry-mode", "loopback", "--trust-model", "always"}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		g.t.Logf("gpg %v: %s", args, stderr.String())
	}
	return out, err
}

func (g *gnupg) run(args ...string) []byte {
	g.t.Helper()
	out, err := g.try("", args...)
	if err != nil {
		g.t.Fatalf("gpg %v: %v", args, err)
	}
	return out
}

// made are the keys that tests of this package share, by name and algorithm: gpg
// takes seconds for an RSA key.
var made = map[string][]byte{}

// key makes a signing key without passphrase and returns its certificate.
func (g *gnupg) key(name, algorithm string) *verify.Certificate {
	g.t.Helper()
	id := name + " " + algorithm
	if secret := made[id]; secret != nil {
		if _, err := g.try(string(secret), "--import"); err != nil {
			g.t.Fatal(err)
		}
		return g.export(name)
	}
	g.run("--passphrase", "", "--quick-gen-key", name, algorithm, "sign", "never")
	made[id] = g.run("--armor", "--export-secret-keys", name)
	return g.export(name)
}

func (g *gnupg) export(name string) *verify.Certificate {
	g.t.Helper()
	cert, err := publish.ReadCertificate(g.run("--armor", "--export", name))
	if err != nil {
		g.t.Fatalf("read gpg's certificate: %v", err)
	}
	return cert
}

// bench is a product whose root is our key and whose release keys are given.
type bench struct {
	t      *testing.T
	root   *publish.SecretKey
	anchor string
	image  string
	out    string
}

func newBench(t *testing.T, threshold int, release ...*verify.Certificate) *bench {
	t.Helper()
	root, err := publish.NewKey(publish.KeyOptions{Name: "Root", Now: time.Unix(1_500_000_000, 0)})
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, root: root, anchor: filepath.Join(t.TempDir(), "trust"), image: filepath.Join(t.TempDir(), "rootfs.img"), out: t.TempDir()}
	err = publish.InitTrust(b.anchor, publish.TrustOptions{
		Product: "kiosk-a", Root: []*verify.Certificate{root.Certificate()}, Signers: []*publish.SecretKey{root},
		Release: release, ReleaseThreshold: threshold,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := publish.GenerateImage(b.image, 150_000, 1); err != nil {
		t.Fatal(err)
	}
	return b
}

// release makes an unsigned release folder.
func (b *bench) release(version string) string {
	b.t.Helper()
	dir, err := publish.Create(b.t.Context(), publish.Options{
		Out: b.out, Trust: b.anchor, Version: version, Images: []publish.ImageInput{{Path: b.image}},
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return dir
}

func (b *bench) verify(dir string) (*verify.Release, error) {
	return publish.Verify(b.t.Context(), dir, b.anchor, nil)
}

func TestDevicesAcceptWhatGpgSigned(t *testing.T) {
	for _, c := range []struct{ algorithm, form string }{
		{"rsa3072", "--armor"}, {"rsa3072", "--no-armor"}, {"ed25519", "--armor"}, {"ed25519", "--no-armor"}, {"nistp256", "--no-armor"},
	} {
		t.Run(c.algorithm+c.form, func(t *testing.T) {
			g := newGnupg(t)
			cert := g.key("Acme", c.algorithm)
			b := newBench(t, 1, cert)
			dir := b.release("1.0.0")
			g.run(c.form, "--detach-sign", filepath.Join(dir, "manifest.json"))
			rel, err := b.verify(dir)
			if err != nil {
				t.Fatal(err)
			}
			if s := rel.Signers(); len(s) != 1 || s[0].Fingerprint != cert.Fingerprint() || s[0].Name != "Acme" {
				t.Fatalf("signed by %+v", s)
			}
			left, _ := filepath.Glob(filepath.Join(dir, "manifest.json.*"))
			if len(left) != 0 {
				t.Fatalf("gpg's file is still there: %v", left)
			}
			// What is stored is what gpg checks, too.
			g.run("--verify", filepath.Join(dir, "manifest.sig"), filepath.Join(dir, "manifest.json"))
			out := filepath.Join(b.out, "x.update")
			if err := publish.Pack(t.Context(), dir, out, nil); err != nil {
				t.Fatal(err)
			}
			if _, err := b.verify(out); err != nil {
				t.Fatalf("the packed release: %v", err)
			}
		})
	}
}

func TestGpgAcceptsWhatWeSign(t *testing.T) {
	g := newGnupg(t)
	key, err := publish.NewKey(publish.KeyOptions{Name: "Acme Releases", Passphrase: []byte("correct horse")})
	if err != nil {
		t.Fatal(err)
	}
	b := newBench(t, 1, key.Certificate())
	dir := b.release("1.0.0")
	if err := publish.Sign(dir, key); err != nil {
		t.Fatal(err)
	}
	public, err := key.PublicArmored()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.try(string(public), "--import"); err != nil {
		t.Fatal(err)
	}
	g.run("--verify", filepath.Join(dir, "manifest.sig"), filepath.Join(dir, "manifest.json"))

	// The secret half works in gpg as well, under its passphrase.
	secret, err := key.SecretArmored()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.try(string(secret), "--passphrase", "correct horse", "--import"); err != nil {
		t.Fatal(err)
	}
	second := b.release("1.1.0")
	if _, err := g.try("", "--passphrase", "wrong", "--detach-sign", filepath.Join(second, "manifest.json")); err == nil {
		t.Fatal("gpg signed with a wrong passphrase")
	}
	exec.Command("gpgconf", "--homedir", g.home, "--kill", "gpg-agent").Run() // it remembers nothing afterwards
	g.run("--passphrase", "correct horse", "--detach-sign", filepath.Join(second, "manifest.json"))
	rel, err := b.verify(second)
	if err != nil {
		t.Fatal(err)
	}
	if rel.Manifest().Seq != 2 {
		t.Fatalf("the second release has seq %d", rel.Manifest().Seq)
	}
}

func TestSecretKeyFromGpgSigns(t *testing.T) {
	g := newGnupg(t)
	g.key("Acme", "rsa3072")
	g.run("--passphrase", "tr0ub4dor", "--quick-gen-key", "Locked", "ed25519", "sign", "never")
	locked := g.run("--passphrase", "tr0ub4dor", "--armor", "--export-secret-keys", "Locked")
	for _, wrong := range []string{"", "nope"} {
		_, err := publish.LoadSecretKey(locked, []byte(wrong))
		wantCode(t, err, verify.CodeKey)
	}
	for _, c := range []struct {
		secret     []byte
		passphrase string
	}{{g.run("--export-secret-keys", "Acme"), ""}, {locked, "tr0ub4dor"}} {
		key, err := publish.LoadSecretKey(c.secret, []byte(c.passphrase))
		wantCode(t, err, "")
		b := newBench(t, 1, key.Certificate())
		dir := b.release("1.0.0")
		wantCode(t, publish.Sign(dir, key), "")
		_, err = b.verify(dir)
		wantCode(t, err, "")
		g.run("--verify", filepath.Join(dir, "manifest.sig"), filepath.Join(dir, "manifest.json"))
	}
}

// place writes a signature where a device looks for it, past the publisher's own checks.
func place(t *testing.T, dir string, signature []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "manifest.sig"), signature, 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestProfileRefusesWhatGpgAlsoMakes(t *testing.T) {
	for _, c := range []struct {
		name, algorithm string
		sign            []string
	}{
		{"SHA-1", "rsa3072", []string{"--digest-algo", "SHA1"}},
		{"SHA-1 with Ed25519", "ed25519", []string{"--digest-algo", "SHA1"}},
		{"text mode", "ed25519", []string{"--textmode"}},
		{"critical notation", "ed25519", []string{"--sig-notation", "!a@example.org=b"}},
		{"another curve", "brainpoolP256r1", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGnupg(t)
			cert := g.key("Acme", c.algorithm)
			b := newBench(t, 1, cert)
			dir := b.release("1.0.0")
			sig := g.run(append(c.sign, "--detach-sign", "--output", "-", filepath.Join(dir, "manifest.json"))...)
			if err := publish.AddSignature(dir, sig); verify.CodeOf(err) != verify.CodeSigProfile {
				t.Errorf("the publisher's tool: %v (%s), want E-SIG-PROFILE", err, verify.CodeOf(err))
			}
			place(t, dir, sig)
			if _, err := b.verify(dir); verify.CodeOf(err) != verify.CodeSigProfile {
				t.Errorf("a device: %v (%s), want E-SIG-PROFILE", err, verify.CodeOf(err))
			}
		})
	}
}

func TestExpiryOfKeysPlaysNoPart(t *testing.T) {
	g := newGnupg(t)
	g.run("--faked-system-time", "20200101T000000!", "--passphrase", "", "--quick-gen-key", "Acme", "ed25519", "sign", "1d")
	cert := g.export("Acme")
	b := newBench(t, 1, cert)
	dir := b.release("1.0.0")
	sig := g.run("--faked-system-time", "20200101T120000!", "--detach-sign", "--output", "-", filepath.Join(dir, "manifest.json"))
	place(t, dir, sig)
	if _, err := b.verify(dir); err != nil {
		t.Fatalf("a key that has expired since: %v", err)
	}
}

func TestOnlyHardRevocationsRefuse(t *testing.T) {
	for _, c := range []struct {
		name, reason string
		want         verify.Code
	}{{"no reason", "0", verify.CodeSigKey}, {"compromised", "1", verify.CodeSigKey}, {"superseded", "2", ""}, {"retired", "3", ""}} {
		t.Run(c.name, func(t *testing.T) {
			g := newGnupg(t)
			// Made here, not shared: importing a revocation wants the trust database that making a key leaves.
			g.run("--passphrase", "", "--quick-gen-key", "Acme", "ed25519", "sign", "never")
			doc := newBench(t, 1, g.export("Acme")).release("1.0.0")
			manifest, err := os.ReadFile(filepath.Join(doc, "manifest.json"))
			if err != nil {
				t.Fatal(err)
			}
			sig := g.run("--detach-sign", "--output", "-", filepath.Join(doc, "manifest.json"))
			cmd := exec.Command("gpg", "--homedir", g.home, "--no-tty", "--pinentry-mode", "loopback", "--command-fd", "0",
				"--output", filepath.Join(g.home, "rev.asc"), "--gen-revoke", "Acme")
			cmd.Stdin = strings.NewReader("y\n" + c.reason + "\n\ny\n")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("gpg --gen-revoke: %v: %s", err, out)
			}
			g.run("--import", filepath.Join(g.home, "rev.asc"))
			if err := g.export("Acme").CheckSignature(manifest, sig); verify.CodeOf(err) != c.want {
				t.Fatalf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestSigningSubkeysCountAsTheirPrimary(t *testing.T) {
	g := newGnupg(t)
	g.run("--passphrase", "", "--quick-gen-key", "Acme", "ed25519", "cert", "never")
	fingerprint := g.export("Acme").Fingerprint()
	g.run("--passphrase", "", "--quick-add-key", fingerprint, "ed25519", "sign", "never")
	cert := g.export("Acme")
	// Two of two: one primary with two subkeys must not pass for both keys.
	other, err := publish.NewKey(publish.KeyOptions{Name: "Other"})
	if err != nil {
		t.Fatal(err)
	}
	b := newBench(t, 2, cert, other.Certificate())
	dir := b.release("1.0.0")
	path := filepath.Join(dir, "manifest.json")
	first := g.run("--detach-sign", "--output", "-", path)
	g.run("--passphrase", "", "--quick-add-key", fingerprint, "rsa3072", "sign", "never")
	place(t, dir, append(bytes.Clone(first), first...))
	if _, err := b.verify(dir); verify.CodeOf(err) != verify.CodeSigKey {
		t.Fatalf("one key twice: %v, want E-SIG-KEY", err)
	}
	place(t, dir, first)
	if err := publish.Sign(dir, other); err != nil {
		t.Fatal(err)
	}
	rel, err := b.verify(dir)
	if err != nil {
		t.Fatal(err)
	}
	if s := rel.Signers(); len(s) != 2 || s[0].Fingerprint != fingerprint {
		t.Fatalf("signed by %+v", s)
	}
}

func TestUnknownSignaturesAreIgnored(t *testing.T) {
	g := newGnupg(t)
	g.key("Stranger", "ed25519")
	key, err := publish.NewKey(publish.KeyOptions{Name: "Acme"})
	if err != nil {
		t.Fatal(err)
	}
	b := newBench(t, 1, key.Certificate())
	dir := b.release("1.0.0")
	path := filepath.Join(dir, "manifest.json")
	strange := g.run("--digest-algo", "SHA1", "--detach-sign", "--output", "-", path)
	if err := publish.AddSignature(dir, strange); verify.CodeOf(err) != verify.CodeSigKey {
		t.Fatalf("the publisher's tool: %v, want E-SIG-KEY", err)
	}
	place(t, dir, strange)
	if _, err := b.verify(dir); verify.CodeOf(err) != verify.CodeSigKey {
		t.Fatalf("only a stranger's signature: %v, want E-SIG-KEY", err)
	}
	if err := publish.Sign(dir, key); err != nil {
		t.Fatal(err)
	}
	if _, err := b.verify(dir); err != nil {
		t.Fatalf("a stranger's signature beside ours: %v", err)
	}
}
