package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"meshupd/verify"
)

// maxPassphrase in bytes.
const maxPassphrase = 1024

// passphraseFlags say where a passphrase comes from. It is never an argument or
// an environment variable: both can be read by others.
type passphraseFlags struct {
	file string
	fd   int
	none bool // no passphrase on purpose
}

func (p *passphraseFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&p.file, "passphrase-file", "", "read the passphrase from the first line of this file")
	cmd.Flags().IntVar(&p.fd, "passphrase-fd", -1, "read the passphrase from the first line of this file descriptor")
}

// given says whether the flags name a source.
func (p *passphraseFlags) given() bool { return p.file != "" || p.fd >= 0 }

func (p *passphraseFlags) check() error {
	n := 0
	for _, set := range []bool{p.file != "", p.fd >= 0, p.none} {
		if set {
			n++
		}
	}
	if n > 1 {
		return usage("give one of --passphrase-file, --passphrase-fd and --no-passphrase")
	}
	return nil
}

// read takes the passphrase from the source that the flags name.
func (p *passphraseFlags) read() ([]byte, error) {
	f := os.NewFile(uintptr(max(p.fd, 0)), "passphrase-fd")
	if p.file != "" {
		var err error
		if f, err = os.Open(p.file); err != nil {
			return nil, openError("read the passphrase from", err)
		}
	}
	if f == nil {
		return nil, usage("--passphrase-fd=%d is not open", p.fd)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxPassphrase+2))
	if err != nil {
		return nil, openError("read the passphrase from", err)
	}
	line, _, _ := bytes.Cut(raw, []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	switch {
	case len(line) == 0:
		return nil, verify.Refuse(verify.CodeKey, "the passphrase is empty")
	case len(line) > maxPassphrase:
		return nil, verify.Refuse(verify.CodeKey, "the passphrase is longer than %d bytes", maxPassphrase)
	}
	return line, nil
}

// canAsk says whether a person is there to type a passphrase.
func (e *env) canAsk() bool {
	f, ok := e.In.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// ask reads a passphrase from the terminal, unseen. Ctrl-C works while it waits.
func (e *env) ask(ctx context.Context, prompt string) ([]byte, error) {
	fd := int(e.In.(*os.File).Fd())
	before, err := term.GetState(fd)
	if err != nil {
		return nil, fmt.Errorf("read the passphrase: %w", err)
	}
	fmt.Fprint(e.Err, prompt)
	type answer struct {
		line []byte
		err  error
	}
	got := make(chan answer, 1)
	// Nothing can end this read but a key; when ctx ends first, the process ends with it.
	go func() {
		line, err := term.ReadPassword(fd)
		got <- answer{line, err}
	}()
	select {
	case <-ctx.Done():
		_ = term.Restore(fd, before)
		fmt.Fprintln(e.Err)
		return nil, ctx.Err()
	case a := <-got:
		fmt.Fprintln(e.Err)
		if a.err != nil {
			return nil, verify.Refuse(verify.CodeKey, "read the passphrase: %w", a.err)
		}
		return a.line, nil
	}
}

// askTwice is for a new passphrase: a typing error would lose the key.
func (e *env) askTwice(ctx context.Context) ([]byte, error) {
	first, err := e.ask(ctx, "New passphrase: ")
	if err != nil {
		return nil, err
	}
	if len(first) == 0 {
		return nil, verify.Refuse(verify.CodeKey, "the passphrase is empty (--no-passphrase makes a key without one)")
	}
	second, err := e.ask(ctx, "The same again: ")
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(first, second) {
		return nil, verify.Refuse(verify.CodeKey, "the two passphrases differ")
	}
	return first, nil
}
