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

// Watch calls scarce each time that memory becomes scarce, at most once in two
// seconds, until ctx ends, whose error it returns then. Other errors are that the
// kernel has no such file or refuses it: it matches [os.ErrNotExist] on a kernel
// without pressure stall information, and when the cgroup is gone.
func Watch(ctx context.Context, path string, scarce func()) error {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := file.WriteString(trigger); err != nil {
		return fmt.Errorf("watching memory pressure: %w", err)
	}
	// Go's poller does not wait for priority events, but for an epoll that does.
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("watching memory pressure: %w", err)
	}
	if err := unix.SetNonblock(epoll, true); err != nil {
		unix.Close(epoll)
		return fmt.Errorf("watching memory pressure: %w", err)
	}
	events := os.NewFile(uintptr(epoll), "epoll")
	defer events.Close()
	fd := int(file.Fd())
	if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLPRI, Fd: int32(fd)}); err != nil {
		return fmt.Errorf("watching memory pressure: %w", err)
	}
	conn, err := events.SyscallConn()
	if err != nil {
		return fmt.Errorf("watching memory pressure: %w", err)
	}
	defer context.AfterFunc(ctx, func() { events.SetReadDeadline(time.Unix(1, 0)) })()
	for {
		var (
			event [1]unix.EpollEvent
			n     int
			fail  error
		)
		err := conn.Read(func(fd uintptr) bool {
			n, fail = unix.EpollWait(int(fd), event[:], 0)
			return n > 0 || fail != nil && !errors.Is(fail, unix.EINTR)
		})
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Join(err, fail) != nil:
			return fmt.Errorf("watching memory pressure: %w", errors.Join(err, fail))
		case event[0].Events&unix.EPOLLERR != 0:
			return &os.PathError{Op: "poll", Path: path, Err: os.ErrNotExist}
		}
		scarce()
	}
}
