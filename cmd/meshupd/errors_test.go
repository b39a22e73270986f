package main

import (
	"bytes"
	"context"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"meshupd/verify"
)

// Every code that verify knows has words, a fix and an exit number here.
func TestEveryCodeHasText(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "../../verify/code.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if typ, ok := spec.Type.(*ast.Ident); !ok || typ.Name != "Code" {
			return true
		}
		for _, v := range spec.Values {
			code, err := strconv.Unquote(v.(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			seen++
			if _, ok := codeTexts[verify.Code(code)]; !ok {
				t.Errorf("%s has no text", code)
			}
		}
		return true
	})
	if seen < 30 {
		t.Fatalf("only %d codes found: the test looks in the wrong place", seen)
	}
	for code, text := range codeTexts {
		if !strings.HasSuffix(text.sentence, ".") || !strings.HasSuffix(text.fix, ".") {
			t.Errorf("%s: sentence and fix end with a full stop", code)
		}
		if text.exit == 0 || exitText(text.exit) == "" {
			t.Errorf("%s: exit %d is not one that help explains", code, text.exit)
		}
	}
}

func TestExplain(t *testing.T) {
	live := context.Background()
	dead, cancel := context.WithCancel(live)
	cancel()
	late, stop := context.WithDeadlineCause(live, epoch, verify.Refuse(verify.CodeTimeout, "not done within 1s"))
	defer stop()
	for _, tt := range []struct {
		name   string
		ctx    context.Context
		err    error
		code   verify.Code
		exit   int
		detail string
	}{
		{"refusal", live, verify.Refuse(verify.CodeProduct, "for kiosk-b"), verify.CodeProduct, 6, "for kiosk-b"},
		{"wrapped refusal", live, fmt.Errorf("import: %w", verify.Refuse(verify.CodeSpace, "full")), verify.CodeSpace, 7, "import: full"},
		{"no file", live, fmt.Errorf("open x: %w", fs.ErrNotExist), verify.CodeNotFound, 5, "open x: file does not exist"},
		{"not allowed", live, fs.ErrPermission, verify.CodePermission, 4, "permission denied"},
		{"disk full", live, syscall.ENOSPC, verify.CodeSpace, 7, "no space left on device"},
		{"stick gone", live, syscall.EIO, verify.CodeIO, 1, "input/output error"},
		{"interrupted", dead, context.Canceled, codeInterrupted, 130, "context canceled"},
		{"time out", late, context.DeadlineExceeded, verify.CodeTimeout, 8, "not done within 1s"},
		{"unknown", live, fmt.Errorf("odd"), codeFailed, 1, "odd"},
		{"newer daemon", live, verify.Refuse("E-NEW", "new"), "E-NEW", 1, "new"},
		{"empty detail", live, &verify.Refusal{Code: verify.CodeIO}, verify.CodeIO, 1, codeTexts[verify.CodeIO].sentence},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := explain(tt.ctx, tt.err)
			if f.Code != tt.code || f.Exit != tt.exit || f.Detail != tt.detail || f.Fix == "" {
				t.Errorf("got %+v, want %s, exit %d, %q", f, tt.code, tt.exit, tt.detail)
			}
		})
	}
}

// Only a broken pipe behind our own output is silence. One to the daemon was once taken for it, and an import that had failed
// exited with 0.
func TestOnlyOurOwnReaderMayGo(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		exit int
	}{
		{"standard output", fmt.Errorf("print: %w", &fs.PathError{Op: "write", Path: os.Stdout.Name(), Err: syscall.EPIPE}), 0},
		{"the daemon's socket", nothingWas("changed", verify.Refuse(verify.CodeDaemon, "the daemon stopped answering: %w",
			&net.OpError{Op: "write", Net: "unix", Err: os.NewSyscallError("write", syscall.EPIPE)})), codeTexts[verify.CodeDaemon].exit},
		{"a health command's input", &fs.PathError{Op: "write", Path: "|1", Err: syscall.EPIPE}, exitFailed},
	} {
		var out, errs bytes.Buffer
		e := newEnv(stdio{Out: &out, Err: &errs})
		if got := e.report(context.Background(), tt.err); got != tt.exit || (errs.Len() == 0) != (tt.exit == 0) {
			t.Errorf("%s: exit %d, want %d; %q", tt.name, got, tt.exit, errs.String())
		}
	}
}

// A message from elsewhere cannot write on the terminal.
func TestReportEscapes(t *testing.T) {
	var out, errs bytes.Buffer
	e := newEnv(stdio{Out: &out, Err: &errs})
	e.color = "never"
	got := e.report(context.Background(), nothingWas("copied", verify.Refuse(verify.CodeSigKey, "key \x1b[2J\u009b31m\u202e of evil\nnext")))
	if got != 6 || out.Len() != 0 {
		t.Errorf("exit %d, stdout %q", got, out.String())
	}
	first, _, _ := strings.Cut(errs.String(), "\n")
	const want = `Refused  key \x1b[2J\u009b31m\u202e of evil\x0anext; nothing was copied.  [E-SIG-KEY, exit 6]`
	if first != want {
		t.Errorf("got  %s\nwant %s", first, want)
	}
	if strings.ContainsAny(errs.String(), "\x1b\u009b\u202e") {
		t.Errorf("control characters came through: %q", errs.String())
	}
}
