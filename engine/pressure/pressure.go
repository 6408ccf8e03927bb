// Package pressure waits for memory to become scarce, by the kernel's pressure
// stall information (Documentation/accounting/psi.rst in its source).
package pressure

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Node is the file of the whole machine. That of a cgroup is memory.pressure in its
// directory, on cgroup v2.
const Node = "/proc/pressure/memory"

// trigger is that any task waited for memory for 200 ms out of 2 s, in microseconds.
// Other windows than multiples of 2 s need CAP_SYS_RESOURCE. The kernel takes the last
// byte of a write for its end, whatever it is.
const trigger = "some 200000 2000000\x00"

// Watch calls scarce each time that memory has become scarce, at most once in two
// seconds, until ctx ends, whose error it returns then. It takes no time while nothing
// happens. Other errors are that the kernel has no such file or refuses it: it matches
// [os.ErrNotExist] on a kernel without pressure stall information, and when the cgroup is
// gone.
func Watch(ctx context.Context, path string, scarce func()) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(trigger)); err != nil {
		return fmt.Errorf("watching memory pressure: %w", &os.PathError{Op: "write", Path: path, Err: err})
	}
	events, err := priority(fd)
	if err != nil {
		return fmt.Errorf("watching memory pressure: %w", err)
	}
	defer events.Close()
	conn, err := events.SyscallConn()
	if err != nil {
		return fmt.Errorf("watching memory pressure: %w", err)
	}
	defer context.AfterFunc(ctx, func() { events.SetReadDeadline(time.Unix(1, 0)) })()
	var ended error
	waited := false
	err = conn.Read(func(epoll uintptr) bool {
		if !waited { // it is called once before it has been
			waited = true
			return false
		}
		// That the poller has woken is the event: the kernel tells it once, and has told
		// the poller. What is left to ask for is an error.
		var left [1]unix.EpollEvent
		n, err := unix.EpollWait(int(epoll), left[:], 0)
		switch {
		case err != nil && !errors.Is(err, unix.EINTR):
			ended = fmt.Errorf("watching memory pressure: %w", err)
		case n > 0 && left[0].Events&unix.EPOLLERR != 0:
			ended = &os.PathError{Op: "poll", Path: path, Err: os.ErrNotExist}
		default:
			scarce()
		}
		return ended != nil
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case ended != nil:
		return ended
	default:
		return fmt.Errorf("watching memory pressure: %w", err)
	}
}

// priority returns an epoll instance that can be read when a descriptor has a priority
// event, which Go's poller does not know by itself.
func priority(fd int) (*os.File, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	err = os.NewSyscallError("epoll_ctl", unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLPRI}))
	if err == nil {
		err = os.NewSyscallError("fcntl", unix.SetNonblock(epoll, true))
	}
	if err != nil {
		unix.Close(epoll)
		return nil, err
	}
	return os.NewFile(uintptr(epoll), "epoll"), nil
}
