package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/engine/control/show"
)

// one returns the only argument of a command, or the empty string if it may do without.
func one(command, what string, needed bool, args []string) (string, error) {
	flags := newFlags(command)
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return "", err
	} else if err != nil || flags.NArg() > 1 || needed && flags.NArg() == 0 {
		alternative := ", or nothing"
		if needed {
			alternative = ""
		}
		return "", fmt.Errorf("%s: takes the name of one %s%s: %w", command, what, alternative, errUsage)
	}
	return flags.Arg(0), nil
}

// runMerge has the running engine merge.
func runMerge(args []string) error {
	partition, err := one("merge", "partition", false, args)
	if err != nil {
		return err
	}
	return control.Merge(context.Background(), engine.RunDir, partition)
}

// runUnmerge has the running engine unmerge.
func runUnmerge(args []string) error {
	partition, err := one("unmerge", "partition", false, args)
	if err != nil {
		return err
	}
	return control.Unmerge(context.Background(), engine.RunDir, partition)
}

// runExplain says what becomes of a container.
func runExplain(args []string) error {
	name, err := one("explain", "pod or container", true, args)
	if err != nil {
		return err
	}
	r, err := control.Ask(context.Background(), engine.RunDir)
	if err != nil {
		return err
	}
	return show.Explain(os.Stdout, r, name)
}

// interval is a flag that may stand without a value.
type interval time.Duration

// refresh is the value then.
const refresh = 2 * time.Second

// least is the shortest.
const least = 100 * time.Millisecond

func (i *interval) String() string { return time.Duration(*i).String() }

func (i *interval) IsBoolFlag() bool { return true }

func (i *interval) Set(text string) error {
	if on, err := strconv.ParseBool(text); err == nil {
		*i = 0
		if on {
			*i = interval(refresh)
		}
		return nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < least {
		return fmt.Errorf("write a duration of %v or more, such as 5s", least)
	}
	*i = interval(d)
	return nil
}

// runStatus shows what the running engine has.
func runStatus(args []string) error {
	var (
		asJSON bool
		watch  interval
	)
	flags := newFlags("status")
	flags.BoolVar(&asJSON, "json", false, "")
	flags.Var(&watch, "watch", "")
	if err := parse(flags, args); err != nil {
		if watch != 0 && new(interval).Set(flags.Arg(0)) == nil {
			return fmt.Errorf("status: write -watch=%s: %w", flags.Arg(0), errUsage)
		}
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	write := show.Status
	if asJSON {
		write = func(w io.Writer, r control.Report) error { return writeJSON(w, r) }
	}
	for first := true; ; first = false {
		r, err := control.Ask(ctx, engine.RunDir)
		if ctx.Err() != nil {
			return nil
		} else if err != nil {
			return err
		}
		// All of it at once, so that a terminal does not show half of it.
		var screen bytes.Buffer
		switch {
		case watch == 0:
		case isTerminal(os.Stdout):
			screen.WriteString("\x1b[H\x1b[2J")
		case !first && !asJSON:
			screen.WriteString("\n")
		}
		err = write(&screen, r)
		if err == nil {
			_, err = os.Stdout.Write(screen.Bytes())
		}
		if err != nil || watch == 0 {
			return err
		}
		select {
		case <-time.After(time.Duration(watch)):
		case <-ctx.Done():
			return nil
		}
	}
}

// writeJSON writes something for programs.
func writeJSON(w io.Writer, v any) error {
	out := json.NewEncoder(w)
	out.SetIndent("", "  ")
	return out.Encode(v)
}

// isTerminal reports whether a file is one.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
