package plugin

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/optin"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

func init() {
	if program := os.Getenv(sealed); program != "" {
		panic(seal(program))
	}
}

// sealed is an environment variable with which the test binary puts itself under
// a seccomp filter, and becomes the program in it.
const sealed = "SELECTIVE_KSM_TEST_SEALED"

// The product gets as far as executing a command with no other system calls than
// those that a container's policy is checked for, and those of any program.
func TestWrapperCalls(t *testing.T) {
	program := "../build/bin/selective-ksm"
	if _, err := os.Stat(program); err != nil {
		missing.Skip(t, "not built: %v", err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), sealed+"="+program)
	var said strings.Builder
	cmd.Stderr = &said
	err = cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != optin.ExitNotFound || said.String() != "selective-ksm: /nowhere: no such file or directory\n" {
		t.Errorf("ended with %v, and said %q", err, said.String())
	}
}

// callNumbers are those of wrapperCalls, and of what any program needs.
var callNumbers = map[string]uint32{
	"clone": unix.SYS_CLONE, "close": unix.SYS_CLOSE, "fcntl": unix.SYS_FCNTL, "futex": unix.SYS_FUTEX, "getpid": unix.SYS_GETPID,
	"gettid": unix.SYS_GETTID, "madvise": unix.SYS_MADVISE, "mmap": unix.SYS_MMAP, "munmap": unix.SYS_MUNMAP,
	"nanosleep": unix.SYS_NANOSLEEP, "openat": unix.SYS_OPENAT, "prctl": unix.SYS_PRCTL, "read": unix.SYS_READ,
	"rt_sigaction": unix.SYS_RT_SIGACTION, "rt_sigprocmask": unix.SYS_RT_SIGPROCMASK, "rt_sigreturn": unix.SYS_RT_SIGRETURN,
	"sched_getaffinity": unix.SYS_SCHED_GETAFFINITY, "sched_yield": unix.SYS_SCHED_YIELD, "sigaltstack": unix.SYS_SIGALTSTACK,
	"tgkill": unix.SYS_TGKILL,

	"arch_prctl": unix.SYS_ARCH_PRCTL, "execve": unix.SYS_EXECVE, "exit_group": unix.SYS_EXIT_GROUP, "write": unix.SYS_WRITE,
}

// seal refuses all other system calls to this thread, and becomes the wrapper.
func seal(program string) error {
	goruntime.LockOSThread()
	filter := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}} // the number
	for _, nr := range callNumbers {
		filter = append(filter,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: nr, Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	}
	filter = append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)})
	program, err := filepath.Abs(program)
	if err != nil {
		return err
	}
	argv := append([]string{program}, optin.Wrap("", []string{"/nowhere"})[1:]...)
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	code := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&code)), 0, 0); err != nil {
		return err
	}
	return unix.Exec(program, argv, nil)
}
