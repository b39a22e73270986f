package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"
)

func newDaemonCmd(e *env) *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Run the service of this device",
		Long: "Run the service of this device until it is told to stop (SIGTERM).\n" +
			"Without --config it reads " + vendorConfig + ", then " + localConfig + ", then " + configParts + "/*.toml.",
		Example: example("meshupd daemon", "meshupd daemon --config ./my.toml -v"),
		Args:    takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(path)
			if err != nil {
				return err
			}
			if e.verbose {
				cfg.Log.Level = "debug"
			}
			err = runDaemon(cmd.Context(), cfg, newLogger(e, cfg.Log))
			if errors.Is(context.Cause(cmd.Context()), context.Canceled) {
				return nil // told to stop, which is no failure
			}
			return err
		},
	}
	cmd.Flags().StringVar(&path, "config", "", "this file alone instead of the layers of the system")
	_ = cmd.MarkFlagFilename("config", "toml")
	return cmd
}
