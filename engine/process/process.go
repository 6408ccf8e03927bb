// Package process holds on to the processes of a container by pidfd, so that a
// number that is used again is never taken for them.
package process

import (
	"errors"
	"fmt"
	"slices"

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
