package main

import (
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// The groups of commands, by who types them.
const (
	groupEveryDay   = "every-day"
	groupStuck      = "when-stuck"
	groupPublisher  = "publisher"
	groupIntegrator = "integrator"
)

func newRootCmd(e *env) *cobra.Command {
	root := &cobra.Command{
		Use:   "meshupd",
		Short: "One stick, a whole site: signed updates from device to device",
		Long: "Meshupd brings one signed update from one stick to every device of a site.\n" +
			"Devices take it from each other; each verifies by itself, tries it and goes back if it is not healthy.",
		Example: example(
			"meshupd status                    the site as this device sees it",
			"sudo meshupd import /media/usb0   take a release from a stick and offer it to the site",
			"meshupd help E-SIG-KEY            what a code means and what to do",
			"meshupd demo                      a simulated site on this machine"),
		SilenceErrors:     true, // errors.go has the words
		SilenceUsage:      true,
		DisableAutoGenTag: true,
		Args:              noSuchCommand,
		RunE:              func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			ctx, err := e.prepare(cmd.Context())
			if err == nil {
				cmd.SetContext(ctx)
			}
			return err
		},
	}
	root.SetIn(e.In)
	root.SetOut(e.Out)
	root.SetErr(e.Err)
	root.SetFlagErrorFunc(flagError)
	root.SetHelpTemplate(helpTemplate)
	root.SetUsageTemplate(helpTemplate)

	f := root.PersistentFlags()
	f.StringVar(&e.json, "json", "", "answer in JSON; a version of the schema may be asked: --json=1")
	f.Lookup("json").NoOptDefVal = "1"
	f.BoolVar(&e.plain, "plain", false, "answer with one record a line, fields between tabs")
	f.BoolVarP(&e.quiet, "quiet", "q", false, "tell nothing on the side")
	f.BoolVarP(&e.verbose, "verbose", "v", false, "tell more on the side")
	f.DurationVar(&e.timeout, "timeout", 0, "give up after this time, as 30s or 5m (exit 8)")
	f.StringVar(&e.color, "color", "auto", "auto, always or never (NO_COLOR works too)")

	root.AddGroup(
		&cobra.Group{ID: groupEveryDay, Title: "EVERY DAY"},
		&cobra.Group{ID: groupStuck, Title: "WHEN STUCK"},
		&cobra.Group{ID: groupPublisher, Title: "PUBLISHER"},
		&cobra.Group{ID: groupIntegrator, Title: "INTEGRATOR"})
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add(groupEveryDay, newStatusCmd(e), newImportCmd(e), newWaitCmd(e), newHistoryCmd(e), newRollbackCmd(e))
	add(groupStuck, newDoctorCmd(e))
	add(groupPublisher, newKeyCmd(e), newTrustCmd(e), newReleaseCmd(e))
	add(groupIntegrator, newDaemonCmd(e), newApplyCmd(e), newConfigCmd(e), newDemoCmd(e), newVersionCmd(e))
	root.SetHelpCommand(newHelpCmd(e))
	root.SetHelpCommandGroupID(groupIntegrator)
	root.SetCompletionCommandGroupID(groupIntegrator)
	return root
}

// group is a command that only holds others.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: noSuchCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(subs...)
	return cmd
}

// talksToDaemon gives a command the --socket flag.
func talksToDaemon(e *env, cmd *cobra.Command) *cobra.Command {
	socket := e.getenv("MESHUPD_SOCKET")
	if socket == "" {
		socket = defaultSocket
	}
	cmd.Flags().StringVar(&e.socket, "socket", socket, "where the daemon answers ($MESHUPD_SOCKET)")
	return cmd
}

// example writes examples in the shape of the help text.
func example(lines ...string) string { return "  " + strings.Join(lines, "\n  ") }

// noSuchCommand refuses words behind a command that takes none, with a hint for a typing error.
func noSuchCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	hint := ""
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		hint = ": did you mean " + strings.Join(near, " or ") + "?"
	}
	return usage("%s has no command %q%s", cmd.CommandPath(), args[0], hint)
}

// takes checks the number of arguments and names them when they are missing.
func takes(least, most int, names string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < least:
			return usage("%s needs %s", cmd.CommandPath(), names)
		case most >= 0 && len(args) > most && most == 0:
			return usage("%s takes no arguments, not %q", cmd.CommandPath(), args[0])
		case most >= 0 && len(args) > most:
			return usage("%s takes %s, and nothing like %q", cmd.CommandPath(), names, args[most])
		}
		return nil
	}
}

// needFlags refuses a command line without these flags.
func needFlags(cmd *cobra.Command, names ...string) error {
	for _, name := range names {
		if f := cmd.Flags().Lookup(name); f == nil || !f.Changed {
			return usage("%s needs --%s", cmd.CommandPath(), name)
		}
	}
	return nil
}

// flagError words an error of the flag parser, with a hint for a typing error.
func flagError(cmd *cobra.Command, err error) error {
	text := strings.TrimPrefix(err.Error(), "unknown flag: --")
	if text == err.Error() {
		return usage("%s: %w", cmd.CommandPath(), err)
	}
	hint, best := "", 3
	see := func(f *pflag.Flag) {
		if d := distance(text, f.Name); d < best {
			hint, best = ": did you mean --"+f.Name+"?", d
		}
	}
	cmd.Flags().VisitAll(see)
	cmd.InheritedFlags().VisitAll(see)
	return usage("%s has no flag --%s%s", cmd.CommandPath(), text, hint)
}

// distance is the number of letters to change, add or drop (Levenshtein).
func distance(a, b string) int {
	prev := make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := range len(a) {
		row := make([]int, len(b)+1)
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			row[j+1] = min(prev[j+1]+1, row[j]+1, prev[j]+cost)
		}
		prev = row
	}
	return prev[len(b)]
}

// helpTemplate puts what people copy first: the examples.
const helpTemplate = `{{with (or .Long .Short)}}{{.}}

{{end}}{{if .HasExample}}EXAMPLES
{{.Example}}

{{end}}USAGE
  {{if .HasAvailableSubCommands}}{{.CommandPath}} COMMAND{{else}}{{.UseLine}}{{end}}
{{if .HasAvailableSubCommands}}{{$cmds := .Commands}}{{if eq (len .Groups) 0}}
COMMANDS{{range $cmds}}{{if .IsAvailableCommand}}
  {{rpad .Name 12}} {{.Short}}{{end}}{{end}}
{{else}}{{range $g := .Groups}}
{{.Title}}{{range $cmds}}{{if and (eq .GroupID $g.ID) (or .IsAvailableCommand (eq .Name "help"))}}
  {{rpad .Name 12}} {{.Short}}{{end}}{{end}}
{{end}}{{end}}{{end}}{{if .HasAvailableLocalFlags}}
FLAGS
{{.LocalFlags.FlagUsages | trimTrailingWhitespaces}}
{{end}}{{if .HasAvailableInheritedFlags}}
FLAGS OF ALL COMMANDS
{{.InheritedFlags.FlagUsages | trimTrailingWhitespaces}}
{{end}}
Codes and numbers: meshupd help exit-codes, meshupd help environment, meshupd help E-CODE
`
