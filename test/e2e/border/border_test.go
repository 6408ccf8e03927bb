package border

import (
	"bufio"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/selective-ksm/selective-ksm/test/workload/memory"
	"golang.org/x/sys/unix"
)

// TestMain is also the child of forked: a process that waits.
func TestMain(m *testing.M) {
	if os.Getenv("BORDER_TEST_WAIT") != "" {
		os.Stdout.WriteString("up\n")
		bufio.NewReader(os.Stdin).ReadString('\n')
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// other starts a process that shares no anonymous page with this one.
func other(t *testing.T) Process {
	t.Helper()
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), "BORDER_TEST_WAIT=1")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := c.Wait(); err != nil {
			t.Error(err)
		}
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || strings.TrimSpace(line) != "up" {
		t.Fatalf("child said %q: %v", line, err)
	}
	return Process{Tenant: "other", Name: "child", PID: c.Process.Pid}
}

func needRoot(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root is shown the frames of a page table")
	}
}

func TestNoCrossing(t *testing.T) {
	needRoot(t)
	g := Watch()
	g.Add(Process{"one", "self", os.Getpid()}, other(t))
	g.Sweep()
	sweeps, found, err := g.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if sweeps < 2 || len(found) > 0 {
		t.Errorf("%d sweeps found %v", sweeps, found)
	}
}

// One process that is called two shares all its pages with itself.
func TestCrossingIsFound(t *testing.T) {
	needRoot(t)
	data, err := memory.Map(16, 16, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	found, err := Crossings(Process{"one", "self", os.Getpid()}, Process{"two", "self", os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	if len(found) < 16 {
		t.Errorf("found %d crossings", len(found))
	}
}

func TestSeeingNothingIsAnError(t *testing.T) {
	needRoot(t)
	c := exec.Command("/proc/self/exe", "-test.run=^$")
	if err := c.Run(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(c.Process.Pid, 0); err != unix.ESRCH {
		t.Skipf("pid %d was taken again: %v", c.Process.Pid, err)
	}
	g := Watch()
	g.Add(Process{"one", "self", os.Getpid()}, Process{"two", "gone", c.Process.Pid})
	g.Sweep()
	if _, _, err := g.Stop(); err == nil || !strings.Contains(err.Error(), "two/gone") {
		t.Errorf("Stop returned %v", err)
	}
}
