package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newRollbackCmd(e *env) *cobra.Command {
	var to string
	cmd := &cobra.Command{
		Use:   "rollback",
		Short: "Start the previous version of this device again",
		Long: "Start the previous version of this device again. The version that is left is not tried again here;\n" +
			"other devices of the site are not changed. With --to it is one of the versions that the device keeps beside its slots\n" +
			"(slots.keep; `status --json` lists them): it is read back and compared with what was signed first, and then on trial.",
		Example: example("sudo meshupd rollback", "sudo meshupd rollback --to=2.3.1"),
		Args:    takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client := e.client()
			defer client.Close()
			if err := client.Rollback(cmd.Context(), to); err != nil {
				return nothingWas("changed", err)
			}
			if e.json != "" {
				return e.printObject("meshupd.rollback/1", map[string]any{"started": true})
			}
			what := "The previous version"
			if to != "" {
				what = "Version " + e.canvas(e.Out).Clean(to)
			}
			fmt.Fprintln(e.Out, what+" is being started. Watch: meshupd status --watch")
			return nil
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "a version that this device keeps, instead of the one before")
	return talksToDaemon(e, cmd)
}
