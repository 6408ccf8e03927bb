package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
)

// A mode is how ksmd is set.
type mode struct {
	name  string
	slow  bool        // it takes many times as long as others
	knobs [][2]string // in the order in which they are written
}

// modes are the kernel's defaults, the fastest (more pages at a time are no faster), and
// the advisor that the kernel has.
var modes = []mode{
	{flatOut, false, [][2]string{{"advisor_mode", "none"}, {"pages_to_scan", "1000"}, {"sleep_millisecs", "0"}, {"smart_scan", "0"}}},
	{byAdvisor, true, [][2]string{{"sleep_millisecs", "20"}, {"smart_scan", "1"}, {"advisor_mode", "scan-time"}}},
	{byDefault, true, [][2]string{{"advisor_mode", "none"}, {"pages_to_scan", "100"}, {"sleep_millisecs", "20"}, {"smart_scan", "1"}}},
}

// ksmd is the thread of a kernel without partitions.
type ksmd struct{ clock int32 }

func findKsmd() (*ksmd, error) {
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		comm, err := os.ReadFile(name)
		if err != nil || strings.TrimSpace(string(comm)) != "ksmd" {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		return &ksmd{clockOf(pid)}, err
	}
	return nil, errors.New("there is no ksmd")
}

func (d *ksmd) start(m mode) error {
	for _, k := range m.knobs {
		if err := ksm.Write(k[0], "%s", k[1]); err != nil {
			return err
		}
	}
	return ksm.Write("run", "1")
}

// pause has ksmd wait, with what it has merged.
func (d *ksmd) pause() error { return ksm.Write("run", "0") }

// unmerge ends all merging, and forgets all pages.
func (d *ksmd) unmerge() error { return ksm.Write("run", "2") }

// poll is how often the counters are read.
const poll = 2 * time.Millisecond

// reach waits until a counter has come to a value, and reports whether it did in time.
func reach(ctx context.Context, counter func() (int, error), want int, limit time.Duration) (bool, error) {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	began := time.Now()
	for {
		got, err := counter()
		if err != nil || got >= want {
			return true, err
		}
		if time.Since(began) > limit {
			return false, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
}

func sharing() (int, error) { return ksm.Counter("pages_sharing") }
func scans() (int, error)   { return ksm.Counter("full_scans") }

// mergesAgain runs ksmd until it has merged again what was changed, and returns what that
// took. It counts pages as merged that have changed, until it comes to them.
func (d *ksmd) mergesAgain(ctx context.Context, m mode, want int) (t times, err error) {
	n, err := scans()
	if err != nil {
		return t, err
	}
	began, cpu := time.Now(), clock(d.clock)
	if err := d.start(m); err != nil {
		return t, err
	}
	const all = 2 // the first that ends may have begun in the middle
	reached, err := reach(ctx, scans, n+all, patience)
	if err == nil && reached {
		reached, err = reach(ctx, sharing, want, patience)
	}
	if err == nil && !reached {
		err = errors.New("it has not merged again what was changed")
	}
	return times{time.Since(began), clock(d.clock) - cpu}, err
}

// merges runs ksmd until it has merged all that it can, and returns what that took. Where
// there is nothing to merge it has to see all pages twice to know that. It is given up
// after the limit.
func (d *ksmd) merges(ctx context.Context, m mode, want int, limit time.Duration) (t times, over bool, err error) {
	counter := sharing
	if want == 0 {
		before, err := scans()
		if err != nil {
			return t, false, err
		}
		counter, want = scans, before+2
	}
	began, cpu := time.Now(), clock(d.clock)
	if err := d.start(m); err != nil {
		return t, false, err
	}
	reached, err := reach(ctx, counter, want, limit)
	t = times{time.Since(began), clock(d.clock) - cpu}
	if err != nil {
		return t, false, fmt.Errorf("%s: %w", m.name, err)
	}
	return t, !reached, nil
}
