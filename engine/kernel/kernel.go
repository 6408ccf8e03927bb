// Package kernel is what the engine needs of a kernel that merges memory by
// partition. Three packages implement it: sysfs and syscall for a kernel with
// Selective KSM, mainline for one without. Package detect finds out which of them
// the running kernel takes.
package kernel

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
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
	Shared uint64 `json:"shared_pages"`
	// Sharing is the number of page table entries that share them beyond the
	// first: the pages that are saved.
	Sharing uint64 `json:"saved_pages"`
	// Unshared is the number of pages that were offered and found no equal.
	Unshared uint64 `json:"unmerged_pages"`
	// Scanned is the number of pages looked at since the partition was added.
	Scanned uint64 `json:"scanned_pages"`
}

// Features are what a caller must know of a kernel to use it well. The zero value
// is that of a kernel with this project's series, without binding.
type Features struct {
	// Bind says that Bind and Unbind work. Where they do not, a process takes part
	// only if it made its memory mergeable itself.
	Bind bool
	// PageByPage says that a merge takes a call for each page, and looks for one
	// beyond its range when that has none. So a range must hold nothing that is not
	// to be merged.
	PageByPage bool
	// SharedCounters says that counters are the machine's, not the partition's.
	SharedCounters bool
	// WideRemoval says that RemovePartition unmerges the partitions of others, too.
	WideRemoval bool
	// OneSpace says that all mergeable memory of the machine merges with each other
	// once Settle is called, whoever made it mergeable. Then there is at most one
	// partition at a time.
	OneSpace bool
}

// Kernel merges and unmerges the memory of processes inside of partitions. Its
// methods may be called concurrently. Process ids are of the caller's pid
// namespace. An error that has no name below is the system's own.
type Kernel interface {
	// Features are those of this kernel. They never change.
	Features() Features
	// Recover puts back what an engine that was killed has left in the kernel, other
	// than partitions. The one engine of the machine calls it before anything else.
	Recover(ctx context.Context) error
	// AddPartition makes an empty partition. It returns ErrPartitionExists where
	// there is one of that name, which can be used all the same, and ErrKeptOut
	// where there may be no other beside those that are there.
	AddPartition(name string) error
	// RemovePartition unmerges all pages of a partition, then removes it. It
	// blocks while it unmerges. It returns ErrNoPartition where there is none, and
	// ErrGoing where somebody else is removing it.
	RemovePartition(name string) error
	// Partitions lists the partitions of the machine, those of others included.
	Partitions() ([]string, error)
	// Bind makes a process mergeable, and binds it to the partition with all that it
	// forks from then on: no other partition can take it. That it is bound here
	// already is no error. Others are ErrNoPartition, ErrNoProcess, ErrBusy where it
	// is bound elsewhere, and ErrNotSupported.
	Bind(partition string, pid int) error
	// Unbind unmerges a process and lets it go; its children stay bound. It returns
	// ErrNotMember where the process is not of this partition, ErrNoPartition,
	// ErrNoProcess, or ErrNotSupported.
	Unbind(partition string, pid int) error
	// Merge offers a range of a process's memory to the partition, and is done when
	// it returns unless the kernel is one that needs Settle. It cannot be cancelled
	// within a page, nor on most kernels within the range, so that callers keep
	// ranges short; ctx is heeded before it starts. Errors are ErrNoPartition,
	// ErrNoProcess, and ErrBusy where the process is bound to another partition.
	Merge(ctx context.Context, partition string, pid int, r Range) error
	// Settle returns when all that was offered to the partition is merged, but for
	// pages that the kernel found busy, as when memory is compacted: they are merged
	// by the next. It tells the CPU time that threads of the kernel took for it, beside
	// the caller's. Errors are ErrNoPartition and those of ctx.
	Settle(ctx context.Context, partition string) (time.Duration, error)
	// Unmerge gives a process back copies of its own of those of its pages that
	// are merged in the partition; pages merged in another are left alone, unless
	// the kernel is one with WideRemoval. It returns ErrNoPartition or ErrNoProcess.
	Unmerge(ctx context.Context, partition string, pid int) error
	// Counters reads a partition's counters. It returns ErrNoPartition.
	Counters(partition string) (Counters, error)
	// Close lets go what the caller holds of the kernel. Partitions stay, unless the
	// kernel is one where they end with their last user.
	Close() error
}

var (
	// ErrNotSupported is matched by an [UnsupportedError].
	ErrNotSupported = errors.New("not supported by this kernel")
	// ErrNoPartition says that there is no partition of that name.
	ErrNoPartition = errors.New("no such partition")
	// ErrGoing says that somebody else is removing the partition.
	ErrGoing = errors.New("partition is being removed")
	// ErrPartitionExists says that there is a partition of that name.
	ErrPartitionExists = errors.New("partition exists")
	// ErrKeptOut says that the kernel cannot keep this partition apart from what is
	// merged already.
	ErrKeptOut = errors.New("partition is kept out")
	// ErrNoProcess says that the process is gone, or has no memory any more.
	ErrNoProcess = errors.New("no such process")
	// ErrNotMember says that the process is not of this partition.
	ErrNotMember = errors.New("process is not of this partition")
	// ErrBusy says that the process is bound to another partition.
	ErrBusy = errors.New("process is bound to another partition")
)

// UnsupportedError says what a kernel lacks. It matches [ErrNotSupported].
type UnsupportedError struct {
	// Feature is what is wanted, such as "selective KSM".
	Feature string
	// Looked are the paths that were looked at.
	Looked []string
	// Missing is what was not there.
	Missing string
	// Fix is what to do.
	Fix string
}

func (e *UnsupportedError) Error() string {
	text := fmt.Sprintf("%s is %v: no %s", e.Feature, ErrNotSupported, e.Missing)
	if len(e.Looked) > 0 {
		text += " in " + strings.Join(e.Looked, " or ")
	}
	return text + ": " + e.Fix
}

// Is reports whether target is [ErrNotSupported].
func (e *UnsupportedError) Is(target error) bool { return target == ErrNotSupported }
