package main

import (
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/screen"
)

func newHistoryCmd(e *env) *cobra.Command {
	limit := 20
	cmd := &cobra.Command{
		Use:               "history [DEVICE]",
		Short:             "Tell what changed, when, who began it and how it ended",
		Example:           example("meshupd history", "meshupd history kiosk-40 --limit=3", "meshupd history --json"),
		Args:              takes(0, 1, "one DEVICE or none"),
		ValidArgsFunction: completeDevices(e),
		RunE: func(cmd *cobra.Command, args []string) error {
			if limit < 1 || limit > 10000 {
				return usage("--limit is 1 to 10000, not %d", limit)
			}
			device := ""
			if len(args) == 1 {
				device = args[0]
			}
			client := e.client()
			defer client.Close()
			h, err := client.History(cmd.Context(), device, limit)
			if err != nil {
				return err
			}
			c := e.canvas(e.Out)
			switch {
			case e.json != "":
				return e.printJSON(h, false)
			case e.plain:
				return e.print(plainHistory(c, h.Events))
			case len(h.Events) == 0:
				e.sayf("nothing has changed yet")
				return nil
			}
			return e.print(historyTable(c, h.Events))
		},
	}
	cmd.Flags().IntVarP(&limit, "limit", "n", limit, "how many events, newest first")
	return talksToDaemon(e, cmd)
}

func historyTable(c screen.Canvas, events []control.Event) string {
	t := screen.Table{Columns: []screen.Column{{Title: "WHEN", Min: 16}, {Title: "DEVICE", Min: 8, Max: 16},
		{Title: "CHANGE", Min: 10, Max: 20}, {Title: "RESULT", Min: 9, Max: 12}, {Title: "TOOK", Min: 5}, {Title: "BY, AND WHY", Min: 18}}}
	for _, ev := range events {
		took := "-"
		if ev.Took != nil {
			took = screen.Took(*ev.Took)
		}
		t.Rows = append(t.Rows, []string{c.Stamp(ev.At), orDash(c, ev.Device), change(c, ev), orDash(c, ev.Result), took, byAndWhy(c, ev)})
	}
	return t.Draw(c)
}

func orDash(c screen.Canvas, s string) string {
	if s == "" {
		return "-"
	}
	return c.Clean(s)
}

func change(c screen.Canvas, ev control.Event) string {
	switch {
	case ev.From == "" && ev.To == "":
		return "-"
	case ev.From == "":
		return c.Clean(ev.To)
	case ev.To == "" || ev.To == ev.From:
		return c.Clean(ev.From)
	}
	return fmt.Sprintf("%s > %s", c.Clean(ev.From), c.Clean(ev.To))
}

func byAndWhy(c screen.Canvas, ev control.Event) string {
	text := orDash(c, ev.By)
	if ev.Why != "" {
		text += ": " + c.Clean(ev.Why)
	}
	if ev.Code != "" {
		text += " [" + c.Clean(string(ev.Code)) + "]"
	}
	return text
}

func plainHistory(c screen.Canvas, events []control.Event) string {
	text := ""
	for _, ev := range events {
		took := ""
		if ev.Took != nil {
			took = strconv.FormatFloat(*ev.Took, 'f', 0, 64)
		}
		text += plainLine(c, ev.At.UTC().Format(time.RFC3339), ev.Device, ev.From, ev.To, ev.Result, took, ev.By, string(ev.Code), ev.Why)
	}
	return text
}
