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

// looked is how often the kernel is asked. It keeps what happened in between, for the
// one that asks first: so Go's poller, which does not know priority events, must not
// have the file.
const looked = 2 * time.Second

// Watch calls scarce each time that memory has become scarce, at most once in two
// seconds and up to two seconds late, until ctx ends, whose error it returns then.
// Other errors are that the kernel has no such file or refuses it: it matches
// [os.ErrNotExist] on a kernel without pressure stall information, and when the cgroup
// is gone.
func Watch(ctx context.Context, path string, scarce func()) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(trigger)); err != nil {
		return fmt.Errorf("watching memory pressure: %w", &os.PathError{Op: "write", Path: path, Err: err})
	}
	look := time.NewTicker(looked)
	defer look.Stop()
	for {
		select {
		case <-look.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}
		_, err := unix.Poll(poll, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			// What it would have told it tells the next time.
		case err != nil:
			return fmt.Errorf("watching memory pressure: %w", err)
		case poll[0].Revents&unix.POLLERR != 0:
			return &os.PathError{Op: "poll", Path: path, Err: os.ErrNotExist}
		case poll[0].Revents&unix.POLLPRI != 0:
			scarce()
		}
	}
}
