// Command bench measures what merging takes, what it saves, and what it costs the
// containers and the runtime, next to KSM of a kernel without the patches.
//
//	bench [-quick] [-vm COMMAND] [-out DIRECTORY] [-only PART,...]
//
// boots the kernels in turn, has each measure what it can, and makes a table, JSON and a
// chart of each figure of that. It fails where a figure is above its limit.
//
//	bench measure [-quick] PART...
//
// measures, in the VM, and prints a sample a line. Whoever waits for a merge there does so
// by asking the kernel's counters: it tells of one in no other way.
//
//	bench table [-short] FILE
//
// makes the table anew.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/selective-ksm/selective-ksm/test/bench/result"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	command := ""
	if len(args) > 0 && args[0] != "" && args[0][0] != '-' {
		command, args = args[0], args[1:]
	}
	flags := flag.NewFlagSet("bench "+command, flag.ExitOnError)
	switch command {
	case "":
		var r runner
		flags.BoolVar(&r.quick, "quick", false, "measure less, on less memory")
		flags.StringVar(&r.vm, "vm", "build/bin/vm", "`command` that boots a VM")
		flags.StringVar(&r.out, "out", "build/bench", "`directory` for what comes of it")
		flags.StringVar(&r.only, "only", "", "`parts` to measure, instead of all")
		flags.Parse(args)
		return r.run(ctx)
	case "measure":
		quick := flags.Bool("quick", false, "")
		flags.Parse(args)
		return measure(ctx, *quick, flags.Args())
	case "idle":
		flags.Parse(args)
		return runIdle(ctx, flags.Arg(0))
	case "probe":
		mib := flags.Int("mib", 1, "")
		flags.Parse(args)
		return probe(*mib)
	case "table":
		short := flags.Bool("short", false, "leave out cases")
		flags.Parse(args)
		r, err := result.Read(flags.Arg(0))
		if err != nil {
			return err
		}
		return r.Table(os.Stdout, figuresOf(r.Quick), *short)
	}
	return fmt.Errorf("unknown command %q", command)
}
