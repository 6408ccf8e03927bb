package process

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestOpen(t *testing.T) {
	child := exec.Command("sleep", "infinity")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer child.Wait()
	defer child.Process.Kill()
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}

	root := t.TempDir()
	dir := filepath.Join(root, "memory", "ctr")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	procs := fmt.Sprintf("%d\n%d\n", child.Process.Pid, gone.Process.Pid)
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(procs), 0o644); err != nil {
		t.Fatal(err)
	}

	processes, err := Open(root, "/ctr")
	if err != nil {
		t.Fatal(err)
	}
	if len(processes) != 1 || processes[0].Pid() != child.Process.Pid {
		t.Fatalf("opened %d processes, want the one that lives", len(processes))
	}
	p := processes[0]
	defer p.Close()
	if !p.Alive() {
		t.Error("a living process is not alive")
	}
	child.Process.Kill()
	child.Wait()
	if p.Alive() {
		t.Error("a process that exited is alive")
	}

	if _, err := Open(root, "/other"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no cgroup: %v", err)
	}
}

func TestWaitEmpty(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "memory", "ctr")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	list := func(children ...*exec.Cmd) {
		t.Helper()
		var procs []byte
		for _, c := range children {
			procs = fmt.Appendln(procs, c.Process.Pid)
		}
		// At once, as the kernel's.
		if err := os.WriteFile(filepath.Join(root, "new"), procs, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(root, "new"), filepath.Join(dir, "cgroup.procs")); err != nil {
			t.Fatal(err)
		}
	}
	start := func() *exec.Cmd {
		t.Helper()
		c := exec.Command("sleep", "infinity")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Process.Kill(); c.Wait() })
		return c
	}
	wait := func(ctx context.Context) <-chan error {
		ended := make(chan error, 1)
		go func() { ended <- WaitEmpty(ctx, root, "/ctr") }()
		return ended
	}
	a, b := start(), start()
	list(a, b)
	ctx, cancel := context.WithCancel(t.Context())
	ended := wait(ctx)
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}

	ended = wait(t.Context())
	list(b)
	a.Process.Kill()
	a.Wait()
	select {
	case err := <-ended:
		t.Fatalf("not empty, and over: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	list()
	b.Process.Kill()
	b.Wait()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := WaitEmpty(t.Context(), root, "/other"); err != nil {
		t.Errorf("no cgroup: %v", err)
	}
}

func TestMember(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "memory", "ctr")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("7\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for pid, want := range map[int]bool{7: true, 8: false} {
		if got, err := Member(root, "/ctr", pid); err != nil || got != want {
			t.Errorf("%d: got %v, %v", pid, got, err)
		}
	}
	if got, err := Member(root, "/other", 7); err != nil || got {
		t.Errorf("no cgroup: got %v, %v", got, err)
	}
	all, err := All()
	if err != nil || !slices.Contains(all, os.Getpid()) {
		t.Errorf("all processes are %d, without this one, %v", len(all), err)
	}
}
