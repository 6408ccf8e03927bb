package vm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/test/vm"
)

// config is the configuration of a VM with the kernel that the environment
// names.
func config(t *testing.T) vm.Config {
	t.Helper()
	kernel := os.Getenv("SELECTIVE_KSM_KERNEL")
	if kernel == "" {
		t.Skip("no kernel for the VM: set SELECTIVE_KSM_KERNEL to a bzImage, as make test does")
	}
	init := filepath.Join(t.TempDir(), "vm")
	build := exec.Command("go", "build", "-o", init, "./cmd/vm")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build init: %v\n%s", err, out)
	}
	return vm.Config{Kernel: kernel, Init: init, Memory: "512M"}
}

func TestOutputAndStatus(t *testing.T) {
	cfg := config(t)
	var stdout, stderr bytes.Buffer
	cfg.Stdout, cfg.Stderr = &stdout, &stderr
	cfg.Env = []string{"GREETING=hello"}
	err := vm.Run(t.Context(), cfg, "sh", "-c", "echo $GREETING from $(pwd); echo oh >&2; exit 7")
	var exit *vm.ExitError
	if !errors.As(err, &exit) || exit.Code != 7 {
		t.Errorf("Run: %v, want exit status 7", err)
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := stdout.String(), "hello from "+dir+"\n"; got != want {
		t.Errorf("stdout is %q, want %q", got, want)
	}
	if got, want := stderr.String(), "oh\n"; got != want {
		t.Errorf("stderr is %q, want %q", got, want)
	}
}

func TestLargeOutput(t *testing.T) {
	cfg := config(t)
	var stdout bytes.Buffer
	cfg.Stdout = &stdout
	if err := vm.Run(t.Context(), cfg, "seq", "300000"); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(stdout.String()), "\n")
	if len(lines) != 300000 || lines[len(lines)-1] != "300000" {
		t.Errorf("got %d lines, the last %q", len(lines), lines[len(lines)-1])
	}
}

func TestSignal(t *testing.T) {
	err := vm.Run(t.Context(), config(t), "sh", "-c", "kill -9 $$")
	var exit *vm.ExitError
	if !errors.As(err, &exit) || exit.Code != 128+9 {
		t.Errorf("Run: %v, want exit status 137", err)
	}
}

func TestUnknownCommand(t *testing.T) {
	err := vm.Run(t.Context(), config(t), "no-such-command")
	if err == nil || !strings.Contains(err.Error(), "no-such-command") {
		t.Errorf("Run: %v, want an error with the command's name", err)
	}
}

// What a command leaves running must not keep the VM up.
func TestDaemonHoldsOutput(t *testing.T) {
	cfg := config(t)
	var stdout bytes.Buffer
	cfg.Stdout = &stdout
	if err := vm.Run(t.Context(), cfg, "sh", "-c", "sleep 1000 & echo done"); err != nil {
		t.Fatal(err)
	}
	if got := stdout.String(); got != "done\n" {
		t.Errorf("stdout is %q", got)
	}
}

func TestWritesVanishButReadWrite(t *testing.T) {
	cfg := config(t)
	kept, lost := t.TempDir(), t.TempDir()
	cfg.ReadWrite = []string{kept}
	err := vm.Run(t.Context(), cfg, "sh", "-ec", fmt.Sprintf("echo x >%s/file; echo x >%s/file; cat %[2]s/file", kept, lost))
	if err != nil {
		t.Fatal(err)
	}
	if content, err := os.ReadFile(filepath.Join(kept, "file")); err != nil || string(content) != "x\n" {
		t.Errorf("file in the read-write directory: %q, %v", content, err)
	}
	if _, err := os.Stat(filepath.Join(lost, "file")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("file in another directory reached the host: %v", err)
	}
}

// Container runtimes need all of this.
func TestGuestSystem(t *testing.T) {
	cfg := config(t)
	var out bytes.Buffer
	cfg.Stdout, cfg.Stderr = &out, &out
	err := vm.Run(t.Context(), cfg, "sh", "-exc", `
		for c in cpu cpuset io memory pids hugetlb; do
			grep -qw $c /sys/fs/cgroup/cgroup.subtree_control
		done
		cd $TMPDIR
		mkdir lower upper work root
		mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay root
		umount root
		mount --bind / root
		mkdir -p root/mnt
		unshare --mount sh -ec 'mount --make-rprivate /; mount --rbind / root; pivot_root root root/mnt'
		unshare --mount --pid --fork --net --uts --ipc --cgroup --user --map-root-user true
		test -c /dev/null -a -d /dev/pts -a -d /dev/shm -a -d /dev/mqueue
		grep -q 1 /sys/class/net/lo/carrier
	`)
	if err != nil {
		t.Errorf("%v\n%s", err, out.String())
	}
}

func TestCancel(t *testing.T) {
	cfg := config(t)
	marker := fmt.Sprintf("vmtest.marker=%d.%d", os.Getpid(), time.Now().UnixNano())
	cfg.KernelArgs = marker
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cfg.Stdout = writerFunc(func(p []byte) (int, error) {
		if pids := qemus(t, marker); len(pids) != 1 {
			t.Errorf("QEMUs while the command runs: %v, want one", pids)
		}
		cancel()
		return len(p), nil
	})
	err := vm.Run(ctx, cfg, "sh", "-c", "echo ready; exec sleep 1000")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Run: %v, want %v", err, context.Canceled)
	}
	if pids := qemus(t, marker); len(pids) != 0 {
		t.Errorf("QEMU outlives Run: %v", pids)
	}
}

func TestHangingCommand(t *testing.T) {
	cfg := config(t)
	cfg.Timeout = 2 * time.Second
	err := vm.Run(t.Context(), cfg, "sleep", "1234")
	var stuck *vm.GuestError
	if !errors.As(err, &stuck) {
		t.Fatalf("Run: %v, want a GuestError", err)
	}
	if stuck.Stage != vm.Running ||
		!strings.Contains(stuck.Processes, "sleep 1234") ||
		!strings.Contains(stuck.Processes, "hrtimer_nanosleep") ||
		!strings.Contains(stuck.Console, "Run /init") {
		t.Errorf("Run: %v\nwant stage %q, sleep and its stack, and the end of the console", err, vm.Running)
	}
}

func TestPanic(t *testing.T) {
	err := vm.Run(t.Context(), config(t), "sh", "-c", "echo c >/proc/sysrq-trigger")
	var died *vm.GuestError
	if !errors.As(err, &died) {
		t.Fatalf("Run: %v, want a GuestError", err)
	}
	if died.Stage != vm.Running || !strings.Contains(died.Console, "sysrq triggered crash") {
		t.Errorf("Run: %v\nwant stage %q and the panic", err, vm.Running)
	}
}

func TestKernelComplaint(t *testing.T) {
	err := vm.Run(t.Context(), config(t), "sh", "-c", "echo '<4>WARNING: at mm/ksm.c:1' >/dev/kmsg")
	var complaint *vm.KernelError
	if !errors.As(err, &complaint) || !strings.Contains(complaint.Log, "WARNING: at mm/ksm.c:1") {
		t.Errorf("Run: %v, want a KernelError with the warning", err)
	}
}

func TestMissingKernel(t *testing.T) {
	err := vm.Run(t.Context(), vm.Config{Kernel: filepath.Join(t.TempDir(), "bzImage")}, "true")
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "make kernel") {
		t.Errorf("Run: %v, want an error that names make kernel", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// qemus are the processes that have marker on their command line.
func qemus(t *testing.T, marker string) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, file := range files {
		if content, err := os.ReadFile(file); err == nil && bytes.Contains(content, []byte(marker)) {
			found = append(found, file)
		}
	}
	return found
}
