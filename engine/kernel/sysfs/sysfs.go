// Package sysfs drives Selective KSM through the files of the kernel's sysfs
// interface: that of "[RFC PATCH 0/6] Selective KSM: Synchronous and Partitioned
// Merging" (linux-mm, 21 March 2025), as this project's kernel series completes
// it.
package sysfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// chunk is the most that one write asks the kernel to merge, in bytes, so that a
// cancelled merge ends within milliseconds: a write itself cannot be cancelled.
const chunk = 16 << 20

// maxName is the longest partition name in bytes: control/remove_partition reads
// no more.
const maxName = 31

// roots are where the RFC puts its files: the first in its code, the second in
// its cover letter.
var roots = []string{"/sys/kernel/mm/ksm", "/sys/kernel/mm/ksm/ksm"}

// required are the words of control/features without which we cannot work: they
// name what the RFC alone does otherwise, one page a write and counters of the
// whole machine.
var required = []string{"range_merge", "partition_counters"}

// FS is a kernel's Selective KSM interface. It holds no open file, and its
// methods may be called concurrently.
type FS struct {
	root string
}

var _ kernel.Kernel = (*FS)(nil)

// Open finds the interface of the running kernel. It returns an error that
// matches [kernel.ErrNotSupported] where the kernel has none, or one without the
// features that are needed; any other error means that it could not tell.
func Open() (*FS, error) { return open(roots) }

func open(roots []string) (*FS, error) {
	var looked []string
	for _, root := range roots {
		add := filepath.Join(root, "control/add_partition")
		if _, err := os.Stat(add); errors.Is(err, fs.ErrNotExist) {
			looked = append(looked, add)
			continue
		} else if err != nil {
			return nil, fmt.Errorf("looking for selective KSM: %w", err)
		}
		if err := checkFeatures(filepath.Join(root, "control/features")); err != nil {
			return nil, err
		}
		return &FS{root: root}, nil
	}
	return nil, &kernel.UnsupportedError{
		Looked:  looked,
		Missing: "interface",
		Fix:     "boot a kernel built with CONFIG_SELECTIVE_KSM=y",
	}
}

func checkFeatures(path string) error {
	const fix = "boot a kernel with this project's series"
	line, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &kernel.UnsupportedError{Looked: []string{path}, Missing: "list of features", Fix: fix}
	} else if err != nil {
		return fmt.Errorf("looking for features of selective KSM: %w", err)
	}
	words := strings.Fields(string(line))
	for _, word := range required {
		if !slices.Contains(words, word) {
			return &kernel.UnsupportedError{Looked: []string{path}, Missing: "feature " + word, Fix: fix}
		}
	}
	return nil
}

// Root is the base directory of the interface.
func (f *FS) Root() string { return f.root }

// AddPartition implements [kernel.Kernel].
func (f *FS) AddPartition(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	err := write(filepath.Join(f.root, "control/add_partition"), name)
	if errors.Is(err, unix.EEXIST) {
		err = kernel.ErrPartitionExists
	}
	return wrap(err, "adding partition %s", name)
}

// RemovePartition implements [kernel.Kernel].
func (f *FS) RemovePartition(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	err := write(filepath.Join(f.root, "control/remove_partition"), name)
	if errors.Is(err, unix.ENOENT) {
		err = kernel.ErrNoPartition
	}
	return wrap(err, "removing partition %s", name)
}

// Partitions implements [kernel.Kernel].
func (f *FS) Partitions() ([]string, error) {
	entries, err := os.ReadDir(f.root)
	if err != nil {
		return nil, fmt.Errorf("listing partitions: %w", err)
	}
	var names []string
	for _, e := range entries {
		if _, err := os.Stat(filepath.Join(f.root, e.Name(), "trigger_merge")); err == nil {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Merge implements [kernel.Kernel].
func (f *FS) Merge(ctx context.Context, partition string, pid int, r kernel.Range) error {
	if err := checkName(partition); err != nil {
		return err
	}
	for start := r.Start; start < r.End; start += chunk {
		if err := ctx.Err(); err != nil {
			return err
		}
		end := min(start+chunk, r.End)
		err := write(filepath.Join(f.root, partition, "trigger_merge"), fmt.Sprintf("%d %x %x", pid, start, end))
		if err != nil {
			return wrap(processError(err), "merging %x-%x of process %d in partition %s", start, end, pid, partition)
		}
	}
	return nil
}

// Unmerge implements [kernel.Kernel]. One write does the whole process, so that
// ctx is heeded only before it.
func (f *FS) Unmerge(ctx context.Context, partition string, pid int) error {
	if err := checkName(partition); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	err := write(filepath.Join(f.root, partition, "trigger_unmerge"), strconv.Itoa(pid))
	return wrap(processError(err), "unmerging process %d in partition %s", pid, partition)
}

// Counters implements [kernel.Kernel].
func (f *FS) Counters(partition string) (kernel.Counters, error) {
	if err := checkName(partition); err != nil {
		return kernel.Counters{}, err
	}
	var c kernel.Counters
	for file, into := range map[string]*uint64{
		"pages_shared":   &c.Shared,
		"pages_sharing":  &c.Sharing,
		"pages_unshared": &c.Unshared,
		"pages_scanned":  &c.Scanned,
	} {
		data, err := os.ReadFile(filepath.Join(f.root, partition, file))
		if err == nil {
			*into, err = strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
		}
		if err != nil {
			return kernel.Counters{}, wrap(partitionError(err), "reading %s of partition %s", file, partition)
		}
	}
	return c, nil
}

// partitionError and processError give the errors of a partition's files the
// names that they have in package kernel.
func partitionError(err error) error {
	// ENODEV is what kernfs answers when the directory went after the open.
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return kernel.ErrNoPartition
	}
	return err
}

func processError(err error) error {
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL):
		// EINVAL is for a process without memory, which one is while it exits: our
		// fields are well-formed.
		return kernel.ErrNoProcess
	case errors.Is(err, unix.EBUSY):
		return kernel.ErrBusy
	}
	return partitionError(err)
}

// checkName refuses a name that is no partition's: one that would leave the base
// directory, or that the kernel would cut or split.
func checkName(name string) error {
	bad := func(r rune) bool { return r == '/' || unicode.IsSpace(r) || unicode.IsControl(r) }
	if name == "" || len(name) > maxName || name == "." || name == ".." || name == "control" || strings.ContainsFunc(name, bad) {
		return fmt.Errorf("partition name %q: not 1 to %d bytes without space and slash", name, maxName)
	}
	return nil
}

// write makes the one write(2) that is a command to a sysfs file. It never
// creates or truncates, and does not repeat a write that was cut short, which
// would be another command.
func write(path, command string) error {
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	n, err := unix.Write(int(file.Fd()), []byte(command+"\n"))
	if err == nil && n != len(command)+1 {
		err = fmt.Errorf("short write: %d of %d bytes", n, len(command)+1)
	}
	if err != nil {
		return &fs.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}

// wrap adds what was being done to an error, if there is one.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf(format+": %w", append(args, err)...)
}
