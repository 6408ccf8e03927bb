package border

import (
	"bufio"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/selective-ksm/selective-ksm/test/missing"
)

// start starts a process that waits, with little memory to look through.
func start(t *testing.T) (pid int) {
	t.Helper()
	if os.Getuid() != 0 {
		missing.Skip(t, "only root is shown the frames of a page table")
	}
	c := exec.Command("cat")
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
	// Until it answers, it may still be this process's fork.
	if _, err := in.Write([]byte("up\n")); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("child answered %q: %v", line, err)
	}
	return c.Process.Pid
}

func TestNoCrossing(t *testing.T) {
	g := Watch()
	g.Add(Process{"one", "a", start(t)}, Process{"two", "b", start(t)})
	g.Sweep()
	sweeps, found, err := g.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if sweeps < 2 || len(found) > 0 {
		t.Errorf("%d sweeps found %v", sweeps, found)
	}
}

// One process under two names shares all its pages with itself.
func TestCrossingIsFound(t *testing.T) {
	pid := start(t)
	g := Watch()
	g.Add(Process{"one", "a", pid}, Process{"two", "b", pid})
	g.Sweep()
	_, found, err := g.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if len(found) == 0 {
		t.Error("no crossing was found")
	}
}

// Processes of one tenant may share what they like.
func TestTenantSharesWithItself(t *testing.T) {
	pid := start(t)
	g := Watch()
	g.Add(Process{"one", "a", pid}, Process{"one", "b", pid})
	g.Sweep()
	_, found, err := g.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if len(found) > 0 {
		t.Errorf("found %v", found)
	}
}

// A guard that sees nothing must not report that all is well.
func TestSeeingNothingIsAnError(t *testing.T) {
	// All processes have numbers below it.
	data, err := os.ReadFile("/proc/sys/kernel/pid_max")
	if err != nil {
		t.Fatal(err)
	}
	nobody, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	g := Watch()
	g.Add(Process{"one", "a", start(t)}, Process{"two", "gone", nobody})
	g.Sweep()
	if _, _, err := g.Stop(); err == nil || !strings.Contains(err.Error(), "two/gone") {
		t.Errorf("Stop returned %v", err)
	}
}

// One that may end may do so unseen; another that has its number then is not taken for it.
func TestBrief(t *testing.T) {
	c := exec.Command("true")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ended := watch(Process{"two", "ended", c.Process.Pid}, true)
	if err := c.Wait(); err != nil {
		t.Fatal(err)
	}
	g := Watch()
	g.AddBrief(ended.Process)
	g.Sweep()
	if _, found, err := g.Stop(); err != nil || len(found) > 0 {
		t.Errorf("one that has ended: found %v, %v", found, err)
	}
	pid := start(t)
	ended.PID = pid
	if found, err := sweep([]*watched{watch(Process{"one", "a", pid}, false), ended}); err != nil || len(found) > 0 || ended.seen {
		t.Errorf("its number is used again: found %v, seen %t, %v", found, ended.seen, err)
	}
}
