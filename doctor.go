package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/engine/kernel/detect"
	"github.com/selective-ksm/selective-ksm/engine/memory"
	"github.com/selective-ksm/selective-ksm/engine/pressure"
	"github.com/selective-ksm/selective-ksm/engine/process"
)

// runDoctor says what this machine has of what is needed, a line each. The error is
// that the engine could not run here.
func runDoctor(args []string) error {
	var path string
	flags := newFlags("doctor")
	flags.StringVar(&path, "config", "", "")
	if err := parse(flags, args); err != nil {
		return err
	}
	cfg, err := load(path)
	if err != nil {
		return err
	}

	for _, f := range detect.Probe(lookFor(cfg)) {
		fmt.Printf("interface %s\n", f)
	}
	k, detail, failed := detect.Open(lookFor(cfg))
	if failed == nil {
		fmt.Printf("in use: %s\n", detail)
		if k.Features().OneSpace {
			reportMergeable()
		}
		failed = errors.Join(suits(k, cfg), k.Close())
	}
	if os.Geteuid() != 0 {
		failed = errors.Join(failed, errNotRoot)
	}
	say("cgroups below "+cgroup.DefaultRoot, exists(cgroup.DefaultRoot))
	say("pressure stall information", exists(pressure.Node))
	say("pressure stall information of pods", podPressure())
	tells, err := memory.TellsDirty()
	if err == nil && !tells {
		err = errors.New("not there: incremental: softDirty offers nothing new, use faults")
	}
	say("soft-dirty bits", err)
	// Not by its lock: an engine that starts meanwhile would find it taken.
	_, err = control.Status(context.Background(), engine.RunDir)
	switch {
	case err == nil:
		err = errors.New("one runs")
	case errors.Is(err, control.ErrNoEngine):
		err = nil
	}
	say("free for an engine", err)
	return failed
}

// reportMergeable says who shares the merge space.
func reportMergeable() {
	all, err := process.All()
	var found []int
	for _, pid := range all {
		if mergeable, err := memory.Mergeable(pid); err == nil && mergeable {
			found = append(found, pid)
		}
	}
	if err == nil && len(found) > 0 {
		err = fmt.Errorf("processes %d share it", found)
	}
	say("merge space is nobody else's", err)
}

// podPressure returns an error where pressure: pod would do nothing.
func podPressure() error {
	if err := exists(filepath.Join(cgroup.DefaultRoot, "memory.pressure")); err != nil {
		return errors.New("not there: pressure: pod does nothing, use node; cgroup v2 has it")
	}
	return nil
}

func exists(path string) error {
	_, err := os.Stat(path)
	return err
}

// say says whether something is so.
func say(what string, err error) {
	if err != nil {
		fmt.Printf("%s: no: %v\n", what, err)
		return
	}
	fmt.Printf("%s: yes\n", what)
}
