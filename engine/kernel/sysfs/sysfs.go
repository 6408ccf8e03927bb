// Package sysfs drives Selective KSM through the files of the kernel's sysfs
// interface: that of "[RFC PATCH 0/6] Selective KSM: Synchronous and Partitioned
// Merging" (linux-mm, 21 March 2025), alone or as this project's kernel series
// completes it.
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
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// maxName is the longest partition name in bytes: control/remove_partition reads
// no more.
const maxName = 31

// roots are where the RFC puts its files: the first in its code, the second in
// its cover letter.
var roots = []string{"/sys/kernel/mm/ksm", "/sys/kernel/mm/ksm/ksm"}

// Words of control/features. A kernel of the RFC alone does not have the file.
const (
	rangeMerge        = "range_merge"
	partitionCounters = "partition_counters"
	addProcess        = "add_process"
	syscalls          = "syscalls"
)

// FS is a kernel's Selective KSM interface. It holds no open file, and its
// methods may be called concurrently.
type FS struct {
	root  string
	words []string
	// literal is the RFC, as it was posted.
	literal bool
}

var _ kernel.Kernel = (*FS)(nil)

// Open finds the interface of the running kernel. It returns an error that
// matches [kernel.ErrNotSupported] where the kernel has none; any other error
// means that it could not tell.
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
		f := &FS{root: root}
		line, err := os.ReadFile(filepath.Join(root, "control/features"))
		if errors.Is(err, fs.ErrNotExist) {
			f.literal = true
		} else if err != nil {
			return nil, fmt.Errorf("looking for features of selective KSM: %w", err)
		}
		f.words = strings.Fields(string(line))
		return f, nil
	}
	return nil, &kernel.UnsupportedError{
		Feature: "selective KSM",
		Looked:  looked,
		Missing: "interface",
		Fix:     "boot a kernel built with CONFIG_SELECTIVE_KSM=y",
	}
}

// Literal is the interface as that of a kernel that has the RFC and no more.
func (f *FS) Literal() *FS { return &FS{root: f.root, literal: true} }

// Root is the base directory of the interface.
func (f *FS) Root() string { return f.root }

// Words are those of control/features. There are none on a kernel that has the RFC
// and no more.
func (f *FS) Words() []string { return slices.Clone(f.words) }

// Syscalls are the numbers of ksm_open and ksm_merge, if the kernel names them.
func (f *FS) Syscalls() (open, merge uintptr, ok bool) {
	for _, word := range f.words {
		numbers, found := strings.CutPrefix(word, syscalls+"=")
		if !found {
			continue
		}
		first, second, _ := strings.Cut(numbers, ",")
		o, err1 := strconv.ParseUint(first, 10, 16)
		m, err2 := strconv.ParseUint(second, 10, 16)
		return uintptr(o), uintptr(m), err1 == nil && err2 == nil
	}
	return 0, 0, false
}

// Features implements [kernel.Kernel].
func (f *FS) Features() kernel.Features {
	return kernel.Features{
		Bind:           slices.Contains(f.words, addProcess),
		PageByPage:     !slices.Contains(f.words, rangeMerge),
		SharedCounters: !slices.Contains(f.words, partitionCounters),
		WideRemoval:    f.literal,
	}
}

// Recover implements [kernel.Kernel]: nothing is left.
func (*FS) Recover(context.Context) error { return nil }

// AddPartition implements [kernel.Kernel].
func (f *FS) AddPartition(name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	// The RFC makes a second one of the same name, and half of it only.
	if f.literal {
		if _, err := os.Stat(filepath.Join(f.root, name)); err == nil {
			return wrap(kernel.ErrPartitionExists, "adding partition %s", name)
		}
	}
	err := write(filepath.Join(f.root, "control/add_partition"), name)
	if errors.Is(err, unix.EEXIST) {
		err = kernel.ErrPartitionExists
	}
	return wrap(err, "adding partition %s", name)
}

// RemovePartition implements [kernel.Kernel].
func (f *FS) RemovePartition(name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	path := filepath.Join(f.root, "control/remove_partition")
	err := write(path, name)
	switch {
	case errors.Is(err, unix.ENOENT) && exists(path):
		err = kernel.ErrNoPartition
	case errors.Is(err, unix.EBUSY):
		err = kernel.ErrGoing
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
		if exists(filepath.Join(f.root, e.Name(), "trigger_merge")) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Bind implements [kernel.Kernel].
func (f *FS) Bind(partition string, pid int) error {
	if !f.Features().Bind {
		return &kernel.UnsupportedError{Feature: "binding a process", Missing: "feature " + addProcess, Fix: "boot a kernel with this project's series"}
	}
	return f.command(fmt.Sprintf("binding process %d", pid), partition, addProcess, strconv.Itoa(pid))
}

// Unbind implements [kernel.Kernel].
func (f *FS) Unbind(partition string, pid int) error {
	if !f.Features().Bind {
		return &kernel.UnsupportedError{Feature: "letting a process go", Missing: "feature " + addProcess, Fix: "boot a kernel with this project's series"}
	}
	const file = "remove_process"
	what := fmt.Sprintf("letting process %d go", pid)
	err := f.command(what, partition, file, strconv.Itoa(pid))
	// One errno is for both: that there is no such partition, and that the process
	// is not of it.
	if errors.Is(err, kernel.ErrNoPartition) && exists(filepath.Join(f.root, partition, file)) {
		err = wrap(kernel.ErrNotMember, "%s: partition %s", what, partition)
	}
	return err
}

// Merge implements [kernel.Kernel].
func (f *FS) Merge(ctx context.Context, partition string, pid int, r kernel.Range) error {
	step := r.Len()
	if f.Features().PageByPage {
		step = uint64(os.Getpagesize())
	}
	for start := r.Start; start < r.End; start += step {
		if err := ctx.Err(); err != nil {
			return err
		}
		end := min(start+step, r.End)
		err := f.command(fmt.Sprintf("merging %x-%x of process %d", start, end, pid), partition,
			"trigger_merge", fmt.Sprintf("%d %x %x", pid, start, end))
		if err != nil {
			return err
		}
	}
	return nil
}

// Settle implements [kernel.Kernel]: there is nothing left to do.
func (f *FS) Settle(ctx context.Context, partition string) (time.Duration, error) {
	return 0, ctx.Err()
}

// Unmerge implements [kernel.Kernel]. One write does the whole process, so that
// ctx is heeded only before it.
func (f *FS) Unmerge(ctx context.Context, partition string, pid int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return f.command(fmt.Sprintf("unmerging process %d", pid), partition, "trigger_unmerge", strconv.Itoa(pid))
}

// Counters implements [kernel.Kernel].
func (f *FS) Counters(partition string) (kernel.Counters, error) {
	if err := CheckName(partition); err != nil {
		return kernel.Counters{}, err
	}
	var c kernel.Counters
	for _, counter := range []struct {
		file string
		into *uint64
	}{
		{"pages_shared", &c.Shared}, {"pages_sharing", &c.Sharing}, {"pages_unshared", &c.Unshared}, {"pages_scanned", &c.Scanned},
	} {
		data, err := os.ReadFile(filepath.Join(f.root, partition, counter.file))
		if err == nil {
			*counter.into, err = strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
		}
		if err != nil {
			return kernel.Counters{}, wrap(f.partitionError(partition, err), "reading %s of partition %s", counter.file, partition)
		}
	}
	return c, nil
}

// Close implements [kernel.Kernel]. Partitions stay.
func (f *FS) Close() error { return nil }

// command writes to a file of a partition, and gives the errors the names that
// they have in package kernel.
func (f *FS) command(what, partition, file, command string) error {
	if err := CheckName(partition); err != nil {
		return err
	}
	err := write(filepath.Join(f.root, partition, file), command)
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL):
		// EINVAL is for a process without memory, which one is while it exits: our
		// fields are well-formed.
		err = kernel.ErrNoProcess
	case errors.Is(err, unix.EBUSY):
		err = kernel.ErrBusy
	default:
		err = f.partitionError(partition, err)
	}
	return wrap(err, "%s: partition %s", what, partition)
}

// partitionError tells a partition that is gone from a file that it lacks.
func (f *FS) partitionError(partition string, err error) error {
	switch {
	case errors.Is(err, unix.ENODEV):
		// What kernfs answers when the directory went after the open.
		return kernel.ErrNoPartition
	case errors.Is(err, unix.ENOENT):
		// A write's ENOENT is the kernel's word for a partition that is going. To the
		// open it may be another kernel's directory, that has no such file.
		var path *fs.PathError
		if errors.As(err, &path) && path.Op == "open" && exists(filepath.Join(f.root, partition)) {
			return err
		}
		return kernel.ErrNoPartition
	}
	return err
}

// CheckName refuses a name that is no partition's: one that would leave the base
// directory, or that a kernel would refuse, cut or split.
func CheckName(name string) error {
	bad := func(r rune) bool { return r == '/' || unicode.IsSpace(r) || unicode.IsControl(r) }
	if name == "" || len(name) > maxName || strings.HasPrefix(name, ".") || name == "control" || strings.ContainsFunc(name, bad) {
		return fmt.Errorf("partition name %q: not 1 to %d bytes without space and slash", name, maxName)
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
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
