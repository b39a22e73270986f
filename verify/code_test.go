package verify_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// Every code is provoked by some test of this repository: its constant, or the
// code itself, stands in a test or a script of one.
func TestEveryCodeIsProvoked(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "code.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	codes := map[string]string{}
	ast.Inspect(file, func(n ast.Node) bool {
		if spec, ok := n.(*ast.ValueSpec); ok && len(spec.Values) == 1 {
			if text, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value); err == nil {
				codes[spec.Names[0].Name] = text
			}
		}
		return true
	})
	if len(codes) < 35 {
		t.Fatalf("only %d codes found", len(codes))
	}
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || path == "code_test.go" {
			return err
		}
		if !strings.HasSuffix(path, "_test.go") && !strings.HasSuffix(path, ".txtar") {
			return nil
		}
		raw, err := os.ReadFile(path)
		for name, text := range codes {
			if regexp.MustCompile(`\b(` + name + `|` + text + `)\b`).Match(raw) {
				delete(codes, name)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range codes {
		t.Errorf("no test provokes %s (%s)", text, name)
	}
}
