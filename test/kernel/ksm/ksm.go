// Package ksm speaks to a kernel with Selective KSM for its tests: one write(2)
// to a file, or one system call, and the error that came of it. It shares no
// code with the engine.
package ksm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Root is the directory of all files.
const Root = "/sys/kernel/mm/ksm"

// The numbers of the system calls, which [Features] must name as well. They
// mean something else to other kernels.
const (
	OpenNumber  = 467
	MergeNumber = 468
)

// Write writes to a file under [Root].
func Write(file, format string, args ...any) error {
	return WriteFile(filepath.Join(Root, file), fmt.Appendf(nil, format, args...))
}

// WriteFile writes data to a file that is there, with one write(2). Package os
// does not: it writes again what was not written, writes nothing at all if data
// is empty, and waits for ever on a file of sysfs or cgroupfs that says EAGAIN.
func WriteFile(path string, data []byte) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	n, err := unix.Write(fd, data)
	if err == nil && n != len(data) {
		err = io.ErrShortWrite
	}
	if err != nil {
		err = &os.PathError{Op: "write", Path: path, Err: err}
	}
	return errors.Join(err, unix.Close(fd))
}

// Counter reads a file under [Root] that holds a number.
func Counter(file string) (int, error) {
	data, err := os.ReadFile(filepath.Join(Root, file))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(data)))
}

// Features are the words of control/features.
func Features() ([]string, error) {
	data, err := os.ReadFile(filepath.Join(Root, "control/features"))
	return strings.Fields(string(data)), err
}

// Open is ksm_open. The descriptor is closed on exec if flags say so.
func Open(name string, flags int) (int, error) {
	p, err := unix.BytePtrFromString(name)
	if err != nil {
		return -1, err
	}
	fd, _, errno := unix.Syscall(OpenNumber, uintptr(unsafe.Pointer(p)), uintptr(flags), 0)
	if errno != 0 {
		return -1, fmt.Errorf("ksm_open %q: %w", name, errno)
	}
	return int(fd), nil
}

// Merge is ksm_merge of the size bytes from start on.
func Merge(fd, pid int, start, size uint64) error {
	_, _, errno := unix.Syscall6(MergeNumber, uintptr(fd), uintptr(pid), uintptr(start), uintptr(size), 0, 0)
	if errno != 0 {
		return fmt.Errorf("ksm_merge %d: %w", pid, errno)
	}
	return nil
}
