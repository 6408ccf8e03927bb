// Package mainline drives the KSM of an unpatched kernel, which has one merge
// space for the whole machine: there, at most one partition is merged at a time.
//
// Only a process itself can make its memory mergeable, and it stays so until the
// process ends. What is mergeable merges when ksmd scans it. So a merge here is to
// let ksmd run until it has seen all mergeable memory twice, which is what it takes
// for a page to be taken for settled and then merged
// (Documentation/admin-guide/mm/ksm.rst in the kernel's source), and to stop it
// then. Nobody else may have ksmd run for that: where somebody does, its settings
// are left as they are, and all here waits for ksmd at its own pace.
package mainline

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

const root = "/sys/kernel/mm/ksm"

const (
	// scans is how many times ksmd has to come to its end: once for the scan that
	// it stopped in when it last ran, and twice for whole ones.
	scans = 3
	// poll is how often it is asked, as it tells nobody.
	poll = 5 * time.Millisecond
	// patience is how long ksmd may look at no page before it is given up: there may
	// be nothing left that is mergeable.
	patience = 2 * time.Second
)

// Options say who may use the one merge space.
type Options struct {
	// Partition is the name of the only partition that is merged.
	Partition string
	// First lets the first partition that is added have the merge space, until it
	// is removed. Partition must be empty then.
	First bool
	// Dir is a directory of the engine's own, which keeps there what ksmd was set to
	// while it runs for it. Where it is empty, an engine that is killed then leaves the
	// next one to restore the kernel's defaults.
	Dir string
}

// Kernel is the KSM of an unpatched kernel. Its methods may be called
// concurrently.
type Kernel struct {
	root    string
	proc    string
	options Options

	mu     sync.Mutex
	holder string // the partition that has the merge space; protected by mu
	// driving is held by whoever runs ksmd.
	driving chan struct{}
	// What follows belongs to who holds driving.
	saved  []change // what is not restored yet
	ksmd   int      // its pid, 0 while it is not known
	driven bool     // when it was opened, by somebody else
}

var _ kernel.Kernel = (*Kernel)(nil)

// Open finds the KSM of the running kernel. It returns an error that matches
// [kernel.ErrNotSupported] where there is none, or one that it does not know; any
// other means that it could not tell.
func Open(o Options) (*Kernel, error) { return open(root, "/proc", o) }

func open(root, proc string, o Options) (*Kernel, error) {
	run := filepath.Join(root, "run")
	full := filepath.Join(root, "full_scans")
	for _, path := range []string{run, full} {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			return nil, &kernel.UnsupportedError{Feature: "KSM", Looked: []string{path}, Missing: "ksmd", Fix: "boot a kernel built with CONFIG_KSM=y"}
		} else if err != nil {
			return nil, fmt.Errorf("looking for KSM: %w", err)
		}
	}
	if _, err := os.Stat(filepath.Join(root, "smart_scan")); errors.Is(err, fs.ErrNotExist) {
		return nil, &kernel.UnsupportedError{
			Feature: "KSM of containers", Looked: []string{filepath.Join(root, "smart_scan")}, Missing: "sign of Linux 6.7",
			Fix: "boot Linux 6.7 or later, where a program stays mergeable over exec",
		}
	} else if err != nil {
		return nil, fmt.Errorf("looking for KSM: %w", err)
	}
	k := &Kernel{root: root, proc: proc, options: o, driving: make(chan struct{}, 1)}
	var err error
	if k.saved, err = k.left(); err != nil {
		return nil, fmt.Errorf("looking for KSM: %w", err)
	}
	state, err := k.read("run")
	if err != nil {
		return nil, fmt.Errorf("looking for KSM: %w", err)
	}
	k.driven = state == scan && len(k.saved) == 0
	return k, nil
}

// Features implements [kernel.Kernel].
func (k *Kernel) Features() kernel.Features {
	return kernel.Features{OneSpace: true, SharedCounters: true, WideRemoval: true}
}

// Recover implements [kernel.Kernel]: ksmd is set to what it was.
func (k *Kernel) Recover(ctx context.Context) error {
	if err := k.drive(ctx); err != nil {
		return err
	}
	k.done()
	return nil
}

// AddPartition implements [kernel.Kernel]: it gives a partition the merge space,
// or says who has it.
func (k *Kernel) AddPartition(name string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var reason string
	switch {
	case k.holder == name:
		return fmt.Errorf("adding partition %s: %w", name, kernel.ErrPartitionExists)
	case k.holder != "":
		reason = "which partition " + k.holder + " has"
	case k.options.First || k.options.Partition == name:
		k.holder = name
		return nil
	case k.options.Partition == "":
		reason = "which the configuration gives to none"
	default:
		reason = "which the configuration gives to partition " + k.options.Partition
	}
	return fmt.Errorf("adding partition %s: %w: an unpatched kernel has one merge space, %s", name, kernel.ErrKeptOut, reason)
}

// RemovePartition implements [kernel.Kernel]. It unmerges all that is merged on
// the machine, so that whoever has the merge space next finds it empty. Where
// somebody else has ksmd run, it cannot: then it returns ErrDriven as long as
// anything is merged.
func (k *Kernel) RemovePartition(name string) error {
	if !k.holds(name) {
		return fmt.Errorf("removing partition %s: %w", name, kernel.ErrNoPartition)
	}
	err := k.unmergeAll(context.Background())
	if errors.Is(err, ErrDriven) {
		if shared, countErr := k.number("pages_shared"); countErr == nil && shared == 0 {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("removing partition %s: %w", name, err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.holder = ""
	return nil
}

// Partitions implements [kernel.Kernel].
func (k *Kernel) Partitions() ([]string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.holder == "" {
		return nil, nil
	}
	return []string{k.holder}, nil
}

var errBind = &kernel.UnsupportedError{Feature: "binding a process", Missing: "way to it", Fix: "boot a kernel with this project's series"}

// Bind implements [kernel.Kernel].
func (k *Kernel) Bind(string, int) error { return errBind }

// Unbind implements [kernel.Kernel].
func (k *Kernel) Unbind(string, int) error { return errBind }

// Merge implements [kernel.Kernel]. That the process is mergeable is all that can
// be done for it; [Kernel.Settle] does the rest.
func (k *Kernel) Merge(ctx context.Context, partition string, pid int, r kernel.Range) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return k.check("merging", partition, pid)
}

// Unmerge implements [kernel.Kernel]. A kernel that cannot unmerge one process
// unmerges all that there are.
func (k *Kernel) Unmerge(ctx context.Context, partition string, pid int) error {
	if err := k.check("unmerging", partition, pid); err != nil {
		return err
	}
	if err := k.unmergeAll(ctx); err != nil {
		return fmt.Errorf("unmerging process %d in partition %s: %w", pid, partition, err)
	}
	return nil
}

// Counters implements [kernel.Kernel]. They are the machine's.
func (k *Kernel) Counters(partition string) (kernel.Counters, error) {
	if !k.holds(partition) {
		return kernel.Counters{}, fmt.Errorf("counters of partition %s: %w", partition, kernel.ErrNoPartition)
	}
	var c kernel.Counters
	for _, counter := range []struct {
		file string
		into *uint64
	}{
		{"pages_shared", &c.Shared}, {"pages_sharing", &c.Sharing}, {"pages_unshared", &c.Unshared}, {"pages_scanned", &c.Scanned},
	} {
		var err error
		if *counter.into, err = k.number(counter.file); err != nil {
			return kernel.Counters{}, err
		}
	}
	return c, nil
}

// Close implements [kernel.Kernel]. What is merged stays.
func (k *Kernel) Close() error { return nil }

// ErrDriven says that somebody else has ksmd run, whose it is then.
var ErrDriven = errors.New("somebody else has ksmd run, and its settings are left alone")

// Driven reports whether somebody else had ksmd run when the kernel was opened.
func (k *Kernel) Driven() bool { return k.driven }

// Settle implements [kernel.Kernel]. Where somebody else has ksmd run, it waits for
// it as it is set.
func (k *Kernel) Settle(ctx context.Context, partition string) (cpu time.Duration, err error) {
	if !k.holds(partition) {
		return 0, fmt.Errorf("merging partition %s: %w", partition, kernel.ErrNoPartition)
	}
	if err := k.drive(ctx); err != nil {
		return 0, err
	}
	defer k.done()
	defer func() {
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("merging partition %s: %w", partition, err)
		}
	}()
	run, err := k.read("run")
	if err != nil {
		return 0, err
	}
	if run == scan {
		return 0, k.wait(ctx)
	}
	before, began := k.cpu(), time.Now()
	defer func() {
		err = errors.Join(err, k.restore())
		if cpu = k.cpu() - before; cpu <= 0 {
			cpu = time.Since(began) // it is not known: no more than that
		}
	}()
	for _, s := range settings {
		if _, err := k.read(s.file); errors.Is(err, fs.ErrNotExist) {
			continue // newer than this kernel
		}
		if err := k.set(s.file, s.value); err != nil {
			return 0, err
		}
	}
	if err := k.set("run", scan); err != nil {
		return 0, err
	}
	return 0, k.wait(ctx)
}

// wait waits until ksmd has seen all twice, or has nothing to see.
func (k *Kernel) wait(ctx context.Context) error {
	began, err := k.number("full_scans")
	if err != nil {
		return err
	}
	var last uint64
	moved := time.Now()
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		done, err := k.number("full_scans")
		if err != nil {
			return err
		}
		if done >= began+scans {
			return nil
		}
		scanned, err := k.number("pages_scanned")
		if err != nil {
			return err
		}
		if now := time.Now(); scanned+done != last {
			last, moved = scanned+done, now
		} else if sleep, err := k.number("sleep_millisecs"); err != nil {
			return err
		} else if now.Sub(moved) > patience+time.Duration(sleep)*time.Millisecond {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// unmergeAll unmerges all that is merged on the machine.
func (k *Kernel) unmergeAll(ctx context.Context) error {
	if err := k.drive(ctx); err != nil {
		return err
	}
	defer k.done()
	run, err := k.read("run")
	if err != nil {
		return err
	}
	if run == scan {
		return ErrDriven
	}
	err = k.set("run", unmerge)
	return errors.Join(err, k.restore())
}

// drive waits for its turn at ksmd. What an earlier turn could not restore is
// restored first, since it would be taken for somebody else's.
func (k *Kernel) drive(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case k.driving <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := k.restore(); err != nil {
		k.done()
		return err
	}
	return nil
}

func (k *Kernel) done() { <-k.driving }

// check refuses a request for another partition than the one that is merged, or
// for a process that is gone.
func (k *Kernel) check(what, partition string, pid int) error {
	err := error(nil)
	if !k.holds(partition) {
		err = kernel.ErrNoPartition
	} else if k.gone(pid) {
		err = kernel.ErrNoProcess
	}
	if err != nil {
		return fmt.Errorf("%s process %d in partition %s: %w", what, pid, partition, err)
	}
	return nil
}

// gone reports whether a process is, or has no memory, as kernel threads have none
// and processes that exit.
func (k *Kernel) gone(pid int) bool {
	statm, err := os.ReadFile(filepath.Join(k.proc, strconv.Itoa(pid), "statm"))
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || strings.HasPrefix(string(statm), "0 ")
}

func (k *Kernel) holds(partition string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.holder != "" && k.holder == partition
}

// cpu is the CPU time that ksmd has taken so far. Where it is not known it is 0.
func (k *Kernel) cpu() time.Duration {
	if k.ksmd == 0 {
		k.ksmd = k.findKsmd()
	}
	line, err := os.ReadFile(filepath.Join(k.proc, strconv.Itoa(k.ksmd), "schedstat"))
	if err != nil {
		return 0
	}
	spent, _, _ := strings.Cut(string(line), " ")
	ns, err := strconv.ParseInt(spent, 10, 64)
	if err != nil {
		return 0
	}
	return time.Duration(ns)
}

// findKsmd looks for ksmd's pid, and returns 0 if it is not to be seen.
func (k *Kernel) findKsmd() int {
	entries, err := os.ReadDir(k.proc)
	if err != nil {
		return 0
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		comm, err := os.ReadFile(filepath.Join(k.proc, e.Name(), "comm"))
		// A program may take any name, but only kernel threads have no memory at all.
		if err == nil && string(comm) == "ksmd\n" && k.gone(pid) {
			return pid
		}
	}
	return 0
}

func (k *Kernel) number(file string) (uint64, error) {
	text, err := k.read(file)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("reading %s: %w", filepath.Join(k.root, file), err)
	}
	return n, nil
}

// read returns a setting. Of one that lists what it may be, it is the one in
// brackets.
func (k *Kernel) read(file string) (string, error) {
	data, err := os.ReadFile(filepath.Join(k.root, file))
	if err != nil {
		return "", err
	}
	text := strings.TrimSpace(string(data))
	if _, after, ok := strings.Cut(text, "["); ok {
		text, _, _ = strings.Cut(after, "]")
	}
	return text, nil
}

// write makes the one write(2) that sets a file in sysfs.
func (k *Kernel) write(file, value string) error {
	f, err := os.OpenFile(filepath.Join(k.root, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value + "\n")
	return errors.Join(err, f.Close())
}
