package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/verify"
	"meshupd/verify/durable"
	"meshupd/verify/publish"
)

// maxKeyInput bounds what is read as a key file; publish has its own, smaller bound.
const maxKeyInput = 1 << 20

func newKeyCmd(e *env) *cobra.Command {
	return group("key", "Make and show signing keys", newKeyNewCmd(e), newKeyShowCmd(e))
}

func newKeyNewCmd(e *env) *cobra.Command {
	var name, out string
	var development bool
	var pass passphraseFlags
	cmd := &cobra.Command{
		Use:   "new",
		Short: "Make a signing key: OUT.pub.asc to hand out, OUT.sec.asc to keep offline",
		Long: "Make a signing key (OpenPGP version 4, Ed25519) that gpg understands too.\n" +
			"OUT.pub.asc is for everyone; OUT.sec.asc signs, and stays where no attacker comes.",
		Example: example(
			`meshupd key new --name="Acme Releases" --out=acme`,
			`meshupd key new --name="Acme Releases" --out=acme --passphrase-file=pass.txt`,
			`meshupd key new --name="Try" --out=dev --development --no-passphrase`),
		Args: takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needFlags(cmd, "name", "out"); err != nil {
				return err
			}
			if err := pass.check(); err != nil {
				return err
			}
			return nothingWas("written", keyNew(cmd.Context(), e, pass, publish.KeyOptions{Name: name, Development: development}, out))
		},
	}
	f := cmd.Flags()
	f.StringVar(&name, "name", "", "who signs, as people will read it (required)")
	f.StringVar(&out, "out", "", "start of the names of the two files (required)")
	f.BoolVar(&development, "development", false, "mark the key as one for trying things out")
	f.BoolVar(&pass.none, "no-passphrase", false, "leave the secret key unprotected, on purpose")
	pass.add(cmd)
	return cmd
}

func keyNew(ctx context.Context, e *env, pass passphraseFlags, o publish.KeyOptions, out string) error {
	public, secret := out+".pub.asc", out+".sec.asc"
	for _, path := range []string{public, secret} {
		// A secret key that is overwritten is gone.
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			return usage("%s is already there", path)
		}
	}
	var err error
	switch {
	case pass.given():
		o.Passphrase, err = pass.read()
	case pass.none:
	case e.canAsk():
		o.Passphrase, err = e.askTwice(ctx)
	default:
		err = verify.Refuse(verify.CodeKey, "there is no terminal to ask for a passphrase (use --passphrase-file, --passphrase-fd or --no-passphrase)")
	}
	if err != nil {
		return err
	}
	key, err := publish.NewKey(o)
	if err != nil {
		return err
	}
	publicText, err := key.PublicArmored()
	if err != nil {
		return err
	}
	secretText, err := key.SecretArmored()
	if err != nil {
		return err
	}
	if err := durable.WriteFile(secret, secretText, 0o600); err != nil {
		return openError("write the secret key", err)
	}
	if err := durable.WriteFile(public, publicText, 0o644); err != nil {
		return openError("write the public key", err)
	}
	if e.json != "" {
		return e.printObject("meshupd.key/1", keyInfo(key.Certificate(), map[string]any{"public_file": public, "secret_file": secret,
			"protected": len(o.Passphrase) > 0}))
	}
	c := e.canvas(e.Out)
	fmt.Fprintf(e.Out, "%s  %s\n", c.Clean(key.Name()), screen.Fingerprint(key.Fingerprint()))
	fmt.Fprintf(e.Out, "%s  for `meshupd trust init`, and for everyone\n", c.Clean(public))
	fmt.Fprintf(e.Out, "%s  keep offline (0600)\n", c.Clean(secret))
	if len(o.Passphrase) == 0 {
		e.sayf("warning: the secret key has no passphrase: whoever reads the file can sign")
	}
	return nil
}

func keyInfo(cert *verify.Certificate, more map[string]any) map[string]any {
	info := map[string]any{"name": cert.Name(), "fingerprint": cert.Fingerprint(), "certificate": cert.Digest(),
		"development": isDevelopment(cert.Name())}
	for k, v := range more {
		info[k] = v
	}
	return info
}

func isDevelopment(name string) bool { return strings.HasSuffix(name, publish.DevelopmentMark) }

func newKeyShowCmd(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "show FILE",
		Short:   "Show name and fingerprint of a public key",
		Example: example("meshupd key show acme.pub.asc"),
		Args:    takes(1, 1, "one FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			cert, err := readCertificate(args[0])
			if err != nil {
				return err
			}
			c := e.canvas(e.Out)
			switch {
			case e.json != "":
				return e.printObject("meshupd.key/1", keyInfo(cert, nil))
			case e.plain:
				return e.print(plainLine(c, cert.Name(), cert.Fingerprint(), cert.Digest().String()))
			}
			fmt.Fprintf(e.Out, "Name         %s\n", c.Clean(cert.Name()))
			fmt.Fprintf(e.Out, "Fingerprint  %s\n", screen.Fingerprint(cert.Fingerprint()))
			fmt.Fprintf(e.Out, "Certificate  sha256 %s\n", cert.Digest())
			if isDevelopment(cert.Name()) {
				fmt.Fprintln(e.Out, "Note         a development key: not for real devices")
			}
			return nil
		},
	}
}

func readCertificate(path string) (*verify.Certificate, error) {
	raw, err := readFileMax(path, maxKeyInput)
	if err != nil {
		return nil, openError("read the public key", err)
	}
	if bytes.Contains(raw[:min(len(raw), 64)], []byte("PRIVATE KEY")) {
		return nil, verify.Refuse(verify.CodeKey, "%s is a secret key: name its .pub.asc", path)
	}
	cert, err := publish.ReadCertificate(raw)
	if err != nil {
		return nil, verify.Refuse(verify.CodeOf(err), "%s: %w", path, err)
	}
	return cert, nil
}

// openKey reads a secret key; the passphrase comes from the flags, or from the
// terminal when the key does not open without one.
func openKey(ctx context.Context, e *env, path string, pass passphraseFlags) (*publish.SecretKey, error) {
	raw, err := readFileMax(path, maxKeyInput)
	if err != nil {
		return nil, openError("read the secret key", err)
	}
	var phrase []byte
	if pass.given() {
		if phrase, err = pass.read(); err != nil {
			return nil, err
		}
	}
	key, err := publish.LoadSecretKey(raw, phrase)
	if err != nil && !pass.given() && e.canAsk() && bytes.Contains(raw, []byte("PRIVATE KEY")) {
		if phrase, err = e.ask(ctx, "Passphrase of "+e.canvas(e.Err).Clean(path)+": "); err != nil {
			return nil, err
		}
		key, err = publish.LoadSecretKey(raw, phrase)
	}
	if err != nil {
		return nil, verify.Refuse(verify.CodeOf(err), "%s: %w", path, err)
	}
	return key, nil
}
