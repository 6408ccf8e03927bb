package kerneltest

import (
	"fmt"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Reserved are the numbers of processes that the kernel gives out once only.
const Reserved = 300

// few is how many others there are for the time of a test with [FewNumbers].
const few = 200

// FewNumbers leaves the machine few numbers for processes, for the time of a test.
func FewNumbers(t testing.TB) {
	t.Helper()
	const path = "/proc/sys/kernel/pid_max"
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, fmt.Appendln(nil, Reserved+few), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(path, before, 0); err != nil {
			t.Error(err)
		}
	})
}

// Fork makes a child as fork(2) does, which does nothing, and ends with the thread that
// calls. The child runs no code of Go's runtime. The caller ignores SIGCHLD, so that
// the kernel reaps it.
func Fork() (pid int, err error) {
	for {
		pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if errno == unix.EAGAIN {
			continue // all numbers are in use until one that was killed is gone
		}
		if pid == 0 && errno == 0 {
			syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0, 0)
			for {
				syscall.RawSyscall(unix.SYS_PAUSE, 0, 0, 0)
			}
		}
		if errno != 0 {
			return 0, errno
		}
		return int(pid), nil
	}
}

// ForkAs forks until a child has a number, and ends the others. It returns how many
// there were, or -1 if the number is somebody else's.
func ForkAs(number int) (forks int, err error) {
	for forks = 1; forks <= 1000; forks++ {
		// The kernel gives out the next one that is free (CONFIG_CHECKPOINT_RESTORE).
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", fmt.Append(nil, number-1), 0); err != nil {
			return 0, err
		}
		pid, err := Fork()
		if err != nil || pid == number {
			return forks, err
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			return 0, err
		}
	}
	return -1, nil // a thread of the kernel has come and taken it
}
