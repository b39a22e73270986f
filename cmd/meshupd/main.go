// Meshupd brings one signed update from one stick to every device of a site.
//
// This package parses flags, reads the config, talks to the daemon's socket and
// finds words for people. It decides nothing about trust: verify does.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	// A second signal kills: after the first the handler is gone.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}))
}

// run is the program without the process: it returns the exit code.
func run(ctx context.Context, args []string, s stdio) int {
	e := newEnv(s)
	defer e.close()
	root := newRootCmd(e)
	root.SetArgs(args)
	e.wantJSON = asksJSON(args)
	return e.report(ctx, root.ExecuteContext(ctx))
}
