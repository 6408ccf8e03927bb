package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
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
