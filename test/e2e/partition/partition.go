// Package partition reads the kernel's partitions from sysfs, as a test sees
// them: it shares no code with the engine.
package partition

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

const root = "/sys/kernel/mm/ksm"

// idDigits is how much of an id a partition's name has room for.
const idDigits = 22

// OfPod returns the name of a pod's partition.
func OfPod(sandboxID string) string { return "sksm-pod-" + sandboxID[:idDigits] }

// OfContainer returns the name of the partition of a container of its own.
func OfContainer(id string) string { return "sksm-ctr-" + id[:idDigits] }

// Supported tells whether the running kernel has partitions.
func Supported() bool {
	_, err := os.Stat(filepath.Join(root, "control/add_partition"))
	return err == nil
}

// Binds tells whether the running kernel makes processes mergeable from outside.
func Binds() bool {
	features, err := os.ReadFile(filepath.Join(root, "control/features"))
	return err == nil && slices.Contains(strings.Fields(string(features)), "add_process")
}

// List returns the names of all partitions, in order.
func List() ([]string, error) {
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && e.Name() != "control" {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// WaitFor waits until exactly these partitions are there. It polls, as sysfs
// does not tell when a directory comes or goes.
func WaitFor(ctx context.Context, names ...string) error {
	slices.Sort(names)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		there, err := List()
		if err != nil {
			return err
		}
		if slices.Equal(there, names) {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("partitions are %q, should be %q: %w", there, names, context.Cause(ctx))
		}
	}
}

// Counter reads one of a partition's counters.
func Counter(name, counter string) (int, error) {
	data, err := os.ReadFile(filepath.Join(root, name, counter))
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return 0, fmt.Errorf("%s of partition %s: %w", counter, name, err)
	}
	return n, nil
}

// Unmerge asks the kernel to take a process's pages out of a partition.
func Unmerge(name string, pid int) error {
	return write(filepath.Join(name, "trigger_unmerge"), strconv.Itoa(pid))
}

// Add makes a partition.
func Add(name string) error { return write("control/add_partition", name) }

// Remove removes a partition.
func Remove(name string) error { return write("control/remove_partition", name) }

// Merge merges a process's memory between two addresses in a partition, and binds
// the process to it.
func Merge(name string, pid int, start, end uint64) error {
	return write(filepath.Join(name, "trigger_merge"), fmt.Sprintf("%d %x %x", pid, start, end))
}

func write(file, text string) error {
	f, err := os.OpenFile(filepath.Join(root, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(f, text)
	return errors.Join(err, f.Close())
}
