package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"meshupd/verify"
)

func newHelpCmd(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND | E-CODE | exit-codes | environment]",
		Short: "Explain a command, a code or a topic",
		Example: example(
			"meshupd help release create",
			"meshupd help E-SPACE",
			"meshupd help exit-codes",
			"meshupd help --json          the whole command tree, for tools"),
		ValidArgsFunction: func(_ *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			return append(knownCodes(), "exit-codes", "environment"), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return help(e, cmd.Root(), args)
		},
	}
}

func help(e *env, root *cobra.Command, args []string) error {
	if len(args) == 0 {
		if e.json != "" {
			return e.printJSON(describe(root), false)
		}
		return root.Help()
	}
	switch topic := strings.ToUpper(args[0]); {
	case len(args) > 1:
	case strings.HasPrefix(topic, "E-"):
		return helpCode(e, verify.Code(topic))
	case topic == "EXIT-CODES":
		fmt.Fprintln(e.Out, exitCodesText())
		return nil
	case topic == "ENVIRONMENT":
		fmt.Fprintln(e.Out, environmentText)
		return nil
	}
	cmd, rest, err := root.Find(args)
	if err != nil || len(rest) > 0 {
		return verify.Refuse(verify.CodeNotFound, "no help on %q", strings.Join(args, " "))
	}
	return cmd.Help()
}

func helpCode(e *env, code verify.Code) error {
	text, ok := codeTexts[code]
	if !ok {
		return verify.Refuse(verify.CodeNotFound, "no such code: %s (`meshupd help exit-codes` lists them)", code)
	}
	if e.json != "" {
		return e.printObject("meshupd.code/1", map[string]any{"code": code, "sentence": text.sentence, "fix": text.fix, "exit": text.exit})
	}
	fmt.Fprintf(e.Out, "%s  %s\nfix: %s\nexit %d: %s\n", code, text.sentence, text.fix, text.exit, exitText(text.exit))
	return nil
}

func exitText(exit int) string {
	for _, t := range exitTexts {
		if t.exit == exit {
			return t.text
		}
	}
	return ""
}

func knownCodes() []string {
	var codes []string
	for code := range codeTexts {
		codes = append(codes, string(code))
	}
	slices.Sort(codes)
	return codes
}

// exitCodesText lists the numbers, and which codes end with each.
func exitCodesText() string {
	var b strings.Builder
	b.WriteString("EXIT CODES\n")
	for _, t := range exitTexts {
		fmt.Fprintf(&b, "  %3d  %s\n", t.exit, t.text)
	}
	b.WriteString("\nCODES (meshupd help CODE explains one)\n")
	for _, code := range knownCodes() {
		text := codeTexts[verify.Code(code)]
		fmt.Fprintf(&b, "  %-14s exit %-3d  %s\n", code, text.exit, text.sentence)
	}
	return strings.TrimRight(b.String(), "\n")
}

const environmentText = `ENVIRONMENT
  MESHUPD_SOCKET     where the daemon answers, as --socket (default ` + defaultSocket + `)
  NO_COLOR           no colours, if it is set to anything
  TERM=dumb          no colours, and no line is redrawn
  ACCESSIBLE=1       text is only appended: for screen readers and logs
  COLUMNS            the width to draw for
  LC_ALL, LC_CTYPE, LANG
                     UTF-8, or else only ASCII is written
  TZ                 the time zone of times on screens (JSON is always UTC)
  SOURCE_DATE_EPOCH  the date that release create and man pages carry, in seconds since 1970`

// The command tree as data: what man pages are made of, and what other tools
// may build on.
type commandTree struct {
	Schema   string        `json:"schema,omitempty"` // "meshupd.help/1", at the root
	Use      string        `json:"use"`
	Short    string        `json:"short"`
	Long     string        `json:"long,omitempty"`
	Example  string        `json:"example,omitempty"`
	Flags    []flagInfo    `json:"flags,omitempty"`
	Topics   []topicText   `json:"topics,omitempty"` // at the root
	Commands []commandTree `json:"commands,omitempty"`
}

type flagInfo struct {
	Name       string `json:"name"`
	Shorthand  string `json:"shorthand,omitempty"`
	Type       string `json:"type"`
	Default    string `json:"default,omitempty"`
	NoValue    string `json:"no_value,omitempty"` // meaning of the bare flag
	Usage      string `json:"usage"`
	Persistent bool   `json:"persistent,omitempty"`
}

type topicText struct {
	Name string `json:"name"`
	Text string `json:"text"`
}

// describe turns a command and those below it into data.
func describe(cmd *cobra.Command) commandTree {
	t := commandTree{Use: cmd.Use, Short: cmd.Short, Long: cmd.Long, Example: cmd.Example}
	collect := func(persistent bool) func(*pflag.Flag) {
		return func(f *pflag.Flag) {
			if f.Hidden || f.Name == "help" {
				return
			}
			t.Flags = append(t.Flags, flagInfo{f.Name, f.Shorthand, f.Value.Type(), f.DefValue, f.NoOptDefVal, f.Usage, persistent})
		}
	}
	cmd.PersistentFlags().VisitAll(collect(true))
	cmd.LocalNonPersistentFlags().VisitAll(collect(false))
	for _, sub := range cmd.Commands() {
		if !sub.Hidden && (sub.IsAvailableCommand() || sub.Name() == "help") {
			t.Commands = append(t.Commands, describe(sub))
		}
	}
	if !cmd.HasParent() {
		t.Schema = "meshupd.help/1"
		t.Topics = []topicText{{"exit-codes", exitCodesText()}, {"environment", environmentText}}
	}
	return t
}
