// Package kernel is what the engine needs of a kernel that merges memory by
// partition. Package sysfs implements it.
package kernel

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Range is the part of a process's address space from Start up to End, in bytes.
type Range struct {
	Start, End uint64
}

// Len is the size of the range in bytes.
func (r Range) Len() uint64 { return r.End - r.Start }

// Counters are one partition's pages, as KSM counts them
// (Documentation/admin-guide/mm/ksm.rst in the kernel's source).
type Counters struct {
	// Shared is the number of physical pages that others are merged into.
	Shared uint64
	// Sharing is the number of page table entries that share them beyond the
	// first: the pages that are saved.
	Sharing uint64
	// Unshared is the number of pages that were offered and found no equal.
	Unshared uint64
	// Scanned is the number of pages looked at since the partition was added.
	Scanned uint64
}

// Kernel merges and unmerges the memory of processes inside of partitions. Its
// methods may be called concurrently. Process ids are of the caller's pid
// namespace.
type Kernel interface {
	// AddPartition makes an empty partition. It returns ErrPartitionExists where
	// there is one of that name.
	AddPartition(name string) error
	// RemovePartition unmerges all pages of a partition, then removes it. It
	// blocks while it unmerges. It returns ErrNoPartition where there is none.
	RemovePartition(name string) error
	// Partitions lists the partitions of the machine, those of others included.
	Partitions() ([]string, error)
	// Merge merges a range of a process's memory with what the partition holds,
	// and is done when it returns. When ctx ends it returns its error after the
	// chunk at hand. Other errors are ErrNoPartition, ErrNoProcess, and ErrBusy
	// where the process is bound to another partition.
	Merge(ctx context.Context, partition string, pid int, r Range) error
	// Unmerge gives a process back copies of its own of those of its pages that
	// are merged in the partition; pages merged in another are left alone. It
	// returns ErrNoPartition or ErrNoProcess.
	Unmerge(ctx context.Context, partition string, pid int) error
	// Counters reads a partition's counters. It returns ErrNoPartition.
	Counters(partition string) (Counters, error)
}

var (
	// ErrNotSupported is matched by an [UnsupportedError].
	ErrNotSupported = errors.New("selective KSM is not supported by this kernel")
	// ErrNoPartition says that there is no partition of that name.
	ErrNoPartition = errors.New("no such partition")
	// ErrPartitionExists says that there is a partition of that name.
	ErrPartitionExists = errors.New("partition exists")
	// ErrNoProcess says that the process is gone, or has no memory any more.
	ErrNoProcess = errors.New("no such process")
	// ErrBusy says that the process is bound to another partition.
	ErrBusy = errors.New("process is bound to another partition")
)

// UnsupportedError says what a kernel lacks. It matches [ErrNotSupported].
type UnsupportedError struct {
	// Looked are the paths that were looked at.
	Looked []string
	// Missing is what was not there.
	Missing string
	// Fix is what to do.
	Fix string
}

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("%v: no %s in %s: %s", ErrNotSupported, e.Missing, strings.Join(e.Looked, " or "), e.Fix)
}

// Is reports whether target is [ErrNotSupported].
func (e *UnsupportedError) Is(target error) bool { return target == ErrNotSupported }
