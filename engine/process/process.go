// Package process holds on to the processes of a container by pidfd, so that a
// number that is used again is never taken for them.
package process

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/cgroup"
)

// Process is a process that was a member of a cgroup when it was opened. The
// caller closes it. It is not for concurrent use.
type Process struct {
	pid int
	fd  int
}

// Open opens the processes of a cgroup and of those below it. Errors are those of
// [cgroup.Find] and [cgroup.Pids], or of pidfd_open(2) other than that a process
// is gone.
func Open(root, cgroupsPath string) ([]*Process, error) {
	dir, err := cgroup.Find(root, cgroupsPath)
	if err != nil {
		return nil, err
	}
	pids, err := cgroup.Pids(dir)
	if err != nil {
		return nil, err
	}
	var opened []*Process
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		} else if err != nil {
			closeAll(opened)
			return nil, fmt.Errorf("opening process %d: %w", pid, err)
		}
		opened = append(opened, &Process{pid: pid, fd: fd})
	}

	// Between the listing and the opening a number may have gone to another
	// process. One that is listed again, and whose pidfd lives after that, has
	// been this process all along.
	pids, err = cgroup.Pids(dir)
	if err != nil {
		closeAll(opened)
		return nil, err
	}
	return slices.DeleteFunc(opened, func(p *Process) bool {
		_, member := slices.BinarySearch(pids, p.pid)
		member = member && p.Alive()
		if !member {
			p.Close()
		}
		return !member
	}), nil
}

// WaitEmpty returns when a cgroup, and those below it, have no process any more or
// are gone. It waits for one process after the other, so that a container costs one
// descriptor, and no time while nothing happens. Errors are that of ctx, and those of
// [Open] other than that the cgroup is gone.
func WaitEmpty(ctx context.Context, root, cgroupsPath string) error {
	for {
		processes, err := Open(root, cgroupsPath)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		if len(processes) == 0 {
			dir, err := cgroup.Find(root, cgroupsPath)
			if err == nil && !cgroup.Populated(dir) || errors.Is(err, fs.ErrNotExist) {
				return nil
			} else if err != nil {
				return err
			}
			// They have all just exited, or are of a pid namespace beside ours.
			select {
			case <-time.After(unseen):
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		closeAll(processes[1:])
		if err := processes[0].wait(ctx); err != nil {
			return err
		}
	}
}

// unseen is how long a cgroup is left alone that has processes which cannot be seen.
const unseen = time.Second

// wait waits until the process has exited, and closes it.
func (p *Process) wait(ctx context.Context) error {
	// In this mode Go's poller waits for it, and no thread does.
	if err := unix.SetNonblock(p.fd, true); err != nil {
		p.Close()
		return fmt.Errorf("waiting for process %d: %w", p.pid, err)
	}
	file := os.NewFile(uintptr(p.fd), "pidfd")
	defer file.Close()
	conn, err := file.SyscallConn()
	if err != nil {
		return fmt.Errorf("waiting for process %d: %w", p.pid, err)
	}
	defer context.AfterFunc(ctx, func() { file.SetReadDeadline(time.Unix(1, 0)) })()
	if err := conn.Read(func(uintptr) bool { return !p.Alive() }); err != nil && ctx.Err() == nil {
		return fmt.Errorf("waiting for process %d: %w", p.pid, err)
	}
	return ctx.Err()
}

// List returns the numbers of the processes of a cgroup and of those below it. Errors
// are those of [cgroup.Find] and [cgroup.Pids].
func List(root, cgroupsPath string) ([]int, error) {
	dir, err := cgroup.Find(root, cgroupsPath)
	if err != nil {
		return nil, err
	}
	return cgroup.Pids(dir)
}

// Member reports whether a number is that of a process of a cgroup, or of one below
// it. Errors are those of [cgroup.Find] and [cgroup.Pids] other than that the cgroup
// is gone.
func Member(root, cgroupsPath string, pid int) (bool, error) {
	pids, err := List(root, cgroupsPath)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return slices.Contains(pids, pid), err
}

// All returns the numbers of all processes of the machine that the caller sees.
func All() ([]int, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Contained reports whether a process has another mount namespace than the machine's
// first, as those in containers do. Where that cannot be told, it is taken as
// contained.
func Contained(pid int) bool {
	const machine = "/proc/1/ns/mnt"
	var of [2]unix.Stat_t
	for i, path := range []string{machine, fmt.Sprintf("/proc/%d/ns/mnt", pid)} {
		if err := unix.Stat(path, &of[i]); err != nil {
			return true
		}
	}
	return of[0].Ino != of[1].Ino
}

// Gone reports whether an error is that a process, or a cgroup, is gone.
func Gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)
}

// UnlessGone returns an error unless it is that a process, or a cgroup, is gone.
func UnlessGone(err error) error {
	if Gone(err) {
		return nil
	}
	return err
}

// Pid is the number of the process. It means this process only as long as it is
// alive.
func (p *Process) Pid() int { return p.pid }

// Alive reports whether the process has not exited. Where that cannot be told, it
// is taken as exited.
func (p *Process) Alive() bool {
	// A pidfd is readable when its process has exited, reaped or not (pidfd_open(2)).
	fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return err == nil && n == 0
		}
	}
}

// Close lets the process go.
func (p *Process) Close() { unix.Close(p.fd) }

func closeAll(processes []*Process) {
	for _, p := range processes {
		p.Close()
	}
}
