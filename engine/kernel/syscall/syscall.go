// Package syscall drives Selective KSM through the system calls ksm_open and
// ksm_merge of "[RFC PATCH 0/6] Selective KSM: Synchronous and Partitioned
// Merging" (linux-mm, 21 March 2025), as this project's kernel series completes
// them. What has no system call is asked for through sysfs.
package syscall

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/kernel/sysfs"
)

// Numbers are those of the two system calls. Upstream has given the RFC's numbers
// to others since, so that they must come from the kernel that runs, or from
// whoever built it.
type Numbers struct {
	Open, Merge uintptr
}

// Kernel is a kernel's Selective KSM interface by system calls. A partition that
// it adds lives as long as it, or another, holds it open. Its methods may be called
// concurrently.
type Kernel struct {
	*sysfs.FS
	numbers Numbers

	mu   sync.Mutex
	open map[string]*os.File // the partitions' descriptors; protected by mu
}

var _ kernel.Kernel = (*Kernel)(nil)

// Open takes the interface of a kernel that has shown by its files that it has
// Selective KSM. Numbers that are not nil are taken instead of those that the
// kernel names. It returns an error that matches [kernel.ErrNotSupported] where
// there are no numbers, or where the kernel is that of the RFC alone: its system
// calls free a partition that is in use, and none of them unmerges.
func Open(fs *sysfs.FS, numbers *Numbers) (*Kernel, error) {
	unsupported := &kernel.UnsupportedError{
		Feature: "merging by system call",
		Looked:  []string{fs.Root() + "/control/features"},
		Fix:     "boot a kernel with this project's series, or use its files in sysfs",
	}
	if f := fs.Features(); f.SharedCounters || f.PageByPage || f.WideRemoval {
		unsupported.Missing = "features beyond the RFC"
		return nil, unsupported
	}
	if numbers == nil {
		open, merge, ok := fs.Syscalls()
		if !ok {
			unsupported.Missing = "numbers of ksm_open and ksm_merge"
			return nil, unsupported
		}
		numbers = &Numbers{Open: open, Merge: merge}
	}
	return &Kernel{FS: fs, numbers: *numbers, open: map[string]*os.File{}}, nil
}

// Recover implements [kernel.Kernel]: nothing is left.
func (*Kernel) Recover(context.Context) error { return nil }

// AddPartition implements [kernel.Kernel]. Where there is one of the name, it is
// held open from then on.
func (k *Kernel) AddPartition(name string) error {
	if err := sysfs.CheckName(name); err != nil {
		return err
	}
	file, err := k.ksmOpen(name, unix.O_CREAT|unix.O_EXCL)
	if errors.Is(err, unix.EEXIST) {
		if _, err := k.partition(name); err != nil {
			return err
		}
		err = kernel.ErrPartitionExists
	}
	if err != nil {
		return fmt.Errorf("adding partition %s: %w", name, err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if old := k.open[name]; old != nil {
		// Of one that somebody else removed.
		old.Close()
	}
	k.open[name] = file
	return nil
}

// RemovePartition implements [kernel.Kernel].
func (k *Kernel) RemovePartition(name string) error {
	// Closing would remove it, too, but without saying when it is done.
	err := k.FS.RemovePartition(name)
	if err == nil || errors.Is(err, kernel.ErrNoPartition) {
		k.forget(name)
	}
	return err
}

// Merge implements [kernel.Kernel].
func (k *Kernel) Merge(ctx context.Context, partition string, pid int, r kernel.Range) error {
	if err := sysfs.CheckName(partition); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	file, err := k.partition(partition)
	if err != nil {
		return err
	}
	err = k.ksmMerge(file, pid, r)
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL):
		err = kernel.ErrNoProcess // EINVAL is for one without memory, as while it exits
	case errors.Is(err, unix.EBUSY):
		err = kernel.ErrBusy
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EBADF), errors.Is(err, os.ErrClosed):
		k.forget(partition)
		err = kernel.ErrNoPartition
	}
	if err != nil {
		return fmt.Errorf("merging %x-%x of process %d in partition %s: %w", r.Start, r.End, pid, partition, err)
	}
	return nil
}

// Close implements [kernel.Kernel]. The kernel then unmerges and removes those
// partitions that no other holds and that were not made in sysfs.
func (k *Kernel) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	for name, file := range k.open {
		errs = append(errs, file.Close())
		delete(k.open, name)
	}
	return errors.Join(errs...)
}

// partition returns the descriptor of a partition that is there.
func (k *Kernel) partition(name string) (*os.File, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if file := k.open[name]; file != nil {
		return file, nil
	}
	file, err := k.ksmOpen(name, 0)
	if errors.Is(err, unix.ENOENT) {
		err = kernel.ErrNoPartition
	}
	if err != nil {
		return nil, fmt.Errorf("opening partition %s: %w", name, err)
	}
	k.open[name] = file
	return file, nil
}

// forget lets a partition's descriptor go.
func (k *Kernel) forget(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if file := k.open[name]; file != nil {
		file.Close()
		delete(k.open, name)
	}
}

func (k *Kernel) ksmOpen(name string, flags int) (*os.File, error) {
	path, err := unix.BytePtrFromString(name)
	if err != nil {
		return nil, err
	}
	for {
		fd, _, errno := unix.Syscall(k.numbers.Open, uintptr(unsafe.Pointer(path)), uintptr(flags|unix.O_CLOEXEC), 0)
		runtime.KeepAlive(path)
		switch errno {
		case 0:
			return os.NewFile(fd, name), nil
		case unix.EINTR:
			// A signal of Go's own, while a partition of the name was going.
		default:
			return nil, os.NewSyscallError("ksm_open", errno)
		}
	}
}

func (k *Kernel) ksmMerge(file *os.File, pid int, r kernel.Range) error {
	conn, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var errno unix.Errno
	// Control keeps the descriptor from being closed, and its number used again.
	if err := conn.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall6(k.numbers.Merge, fd, uintptr(pid), uintptr(r.Start), uintptr(r.Len()), 0, 0)
	}); err != nil {
		return err
	}
	if errno != 0 {
		return os.NewSyscallError("ksm_merge", errno)
	}
	return nil
}
