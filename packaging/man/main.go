// Man writes meshupd's man pages from the command tree that `meshupd help --json`
// prints. It is a tool of the package build: the generator and its parsers stay
// out of the binary that runs on devices.
//
//	meshupd help --json | go run ./packaging/man -out DIR
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"github.com/spf13/pflag"
)

func main() {
	out := flag.String("out", ".", "folder to write the pages to")
	flag.Parse()
	if err := run(os.Stdin, *out); err != nil {
		fmt.Fprintln(os.Stderr, "man:", err)
		os.Exit(1)
	}
}

// command is the part of schema meshupd.help/1 that pages are made of.
type command struct {
	Schema   string    `json:"schema"`
	Use      string    `json:"use"`
	Short    string    `json:"short"`
	Long     string    `json:"long"`
	Example  string    `json:"example"`
	Flags    []option  `json:"flags"`
	Topics   []topic   `json:"topics"`
	Commands []command `json:"commands"`
}

type option struct {
	Name       string `json:"name"`
	Shorthand  string `json:"shorthand"`
	Type       string `json:"type"`
	Default    string `json:"default"`
	NoValue    string `json:"no_value"`
	Usage      string `json:"usage"`
	Persistent bool   `json:"persistent"`
}

type topic struct {
	Name string `json:"name"`
	Text string `json:"text"`
}

// run writes the pages of section 1. Their date is SOURCE_DATE_EPOCH, if that is set: two builds are equal.
func run(in io.Reader, out string) error {
	var tree command
	if err := json.NewDecoder(in).Decode(&tree); err != nil {
		return fmt.Errorf("read the command tree: %w", err)
	}
	if tree.Schema != "meshupd.help/1" {
		return fmt.Errorf("the input has schema %q, not meshupd.help/1", tree.Schema)
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	for _, t := range tree.Topics {
		tree.Long += "\n\n" + section(t)
	}
	header := &doc.GenManHeader{Title: "MESHUPD", Section: "1", Source: "meshupd", Manual: "Meshupd"}
	if err := doc.GenManTree(build(tree), header, out); err != nil {
		return fmt.Errorf("write the pages: %w", err)
	}
	return nil
}

// section makes a heading of a topic's first line and keeps the lines below it as they are.
func section(t topic) string {
	var b strings.Builder
	_, body, _ := strings.Cut(t.Text, "\n")
	fmt.Fprintf(&b, "# %s\n\n```\n", strings.ToUpper(strings.ReplaceAll(t.Name, "-", " ")))
	b.WriteString(strings.TrimRight(body, "\n") + "\n```\n")
	return b.String()
}

// build turns the data into commands again, which is what the generator takes.
func build(c command) *cobra.Command {
	cmd := &cobra.Command{Use: c.Use, Short: c.Short, Long: c.Long, Example: c.Example, DisableAutoGenTag: true,
		Run: func(*cobra.Command, []string) {}}
	for _, o := range c.Flags {
		set := cmd.Flags()
		if o.Persistent {
			set = cmd.PersistentFlags()
		}
		f := set.VarPF(shown{o.Type, o.Default}, o.Name, o.Shorthand, o.Usage)
		f.NoOptDefVal = o.NoValue
	}
	for _, sub := range c.Commands {
		cmd.AddCommand(build(sub))
	}
	return cmd
}

// shown is a flag that is only described.
type shown struct{ typ, def string }

var _ pflag.Value = shown{}

func (s shown) String() string   { return s.def }
func (s shown) Type() string     { return s.typ }
func (s shown) Set(string) error { return nil }
