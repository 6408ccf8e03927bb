package audit

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/frame"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest/running"
	"github.com/selective-ksm/selective-ksm/engine/memory"
	"github.com/selective-ksm/selective-ksm/hooks/inventory"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

func TestMain(m *testing.M) { kerneltest.Main(m) }

const (
	held = 2048 // pages
	// merged is the partition that the kernel is told.
	merged = "sksm-test-audit"
)

// contain makes a cgroup such as a container has, for the time of a test.
func contain(t *testing.T, id string) (procs string) {
	t.Helper()
	dir := filepath.Join(cgroupRoot(t), "sksm-test-"+id)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// A process leaves its cgroup a moment after its end, which nothing tells.
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for end := time.After(time.Minute); cgroup.Populated(dir); {
			select {
			case <-tick.C:
			case <-end:
				t.Fatalf("%s is not empty", dir)
			}
		}
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "cgroup.procs")
}

func cgroupRoot(t *testing.T) string {
	t.Helper()
	root := cgroup.DefaultRoot
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err == nil {
		return root
	}
	return filepath.Join(root, "pids") // of cgroup v1
}

func enter(t *testing.T, procs string, pid int) {
	t.Helper()
	if err := os.WriteFile(procs, fmt.Appendln(nil, pid), 0); err != nil {
		t.Fatal(err)
	}
}

// started is a process in a container's cgroup.
type started struct {
	*kerneltest.Process
	id string
}

func start(t *testing.T, digit string) *started {
	t.Helper()
	id := strings.Repeat(digit, 64)
	procs := contain(t, id)
	p := kerneltest.Start(t, held)
	enter(t, procs, p.PID)
	return &started{Process: p, id: id}
}

// A violation is planted: the kernel is told to merge two containers that are said to be
// of different partitions. On a kernel without partitions it is ksmd that does it.
func TestPlanted(t *testing.T) {
	k := running.Open(t, merged)
	a, b, apart := start(t, "a"), start(t, "b"), start(t, "c")
	running.OptIn(t, k, merged, a.Process)
	running.OptIn(t, k, merged, b.Process)
	look := func(partition map[string]string) Report {
		t.Helper()
		all, err := inventory.Find(t.Context(), t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		ours := []string{a.id, b.id, apart.id}
		all.Containers = slices.DeleteFunc(all.Containers, func(c inventory.Container) bool { return !slices.Contains(ours, c.ID) })
		if len(all.Containers) != len(ours) {
			t.Fatalf("found %v", all.Containers)
		}
		r, err := Run(t.Context(), all, func(c inventory.Container) string { return partition[c.ID] })
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	each := map[string]string{a.id: "one", b.id: "two", apart.id: "three"}
	if r := look(each); len(r.Crossings)+len(r.Outside) > 0 || r.Partitions != 3 || r.Containers != 3 || r.Processes < 3 {
		t.Errorf("before anything is merged: %+v", r)
	}
	// KSM leaves pages that it finds busy for the next time.
	for try := 0; kerneltest.Shared(t, a.Process, b.Process) < held*9/10; try++ {
		if try == 10 {
			t.Fatalf("%d pages of %d are merged", kerneltest.Shared(t, a.Process, b.Process), held)
		}
		for _, p := range []*started{a, b} {
			if err := k.Merge(t.Context(), merged, p.PID, p.Held); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := k.Settle(t.Context(), merged); err != nil {
			t.Fatal(err)
		}
	}
	r := look(each)
	if len(r.Crossings) != 1 || len(r.Outside) > 0 || r.Pages < 2*held*9/10 {
		t.Fatalf("merged across partitions: %+v", r)
	}
	c := r.Crossings[0]
	t.Log(c)
	if c.A.ID != a.id || c.B.ID != b.id || c.A.PID != a.PID || c.B.PID != b.PID || c.A.Partition != "one" || c.B.Partition != "two" || c.Pages < held*9/10 {
		t.Errorf("%+v", c)
	}
	for _, s := range []Side{c.A, c.B} {
		if !strings.Contains(c.String(), s.ID) {
			t.Errorf("%q does not name %s", c, s.ID)
		}
	}
	if r := look(map[string]string{a.id: "one", b.id: "one", apart.id: "three"}); len(r.Crossings)+len(r.Outside) > 0 || r.Pages < 2*held*9/10 {
		t.Errorf("merged inside of a partition: %+v", r)
	}
	if r := look(map[string]string{a.id: "one"}); len(r.Crossings) != 1 || r.Crossings[0].B.Partition != "" {
		t.Errorf("merged with one in no partition: %+v", r)
	}
	if r := look(nil); len(r.Crossings)+len(r.Outside) > 0 {
		t.Errorf("merged outside of any partition: %+v", r)
	}
	// The other one leaves its container.
	enter(t, filepath.Join(cgroupRoot(t), "cgroup.procs"), b.PID)
	all := inventory.Inventory{Containers: []inventory.Container{{PID: a.PID}}}
	all.Containers[0].ID = a.id
	r, err := Run(t.Context(), all, func(inventory.Container) string { return "one" })
	if err != nil || len(r.Crossings) > 0 || len(r.Outside) != 1 || r.Outside[0].B.PID != b.PID || r.Outside[0].B.Program == "" {
		t.Errorf("merged with a process in no container: %+v, %v", r, err)
	}

	// What is written to is parted.
	a.Do(t, "change")
	all.Containers = append(all.Containers, inventory.Container{PID: b.PID})
	all.Containers[1].ID = b.id
	r, err = Run(t.Context(), all, func(c inventory.Container) string { return each[c.ID] })
	left := 0
	for _, c := range r.Crossings {
		left += c.Pages
	}
	// Of what the programs hold besides, ksmd may have merged some.
	if err != nil || left > c.Pages-held*9/10 {
		t.Errorf("parted again: %+v, %v", r, err)
	}
}

// What one process gives up and another one is given is no crossing: each suspicion is
// looked at again.
func TestMovedPage(t *testing.T) {
	if os.Getuid() != 0 {
		missing.Skip(t, "not root")
	}
	one, two := start(t, "a"), start(t, "b")
	flags, err := frame.OpenFlags()
	if err != nil {
		t.Fatal(err)
	}
	defer flags.Close()
	a := &audit{
		containers: []inventory.Container{{PID: one.PID}, {PID: two.PID}},
		partitions: []string{"one", "two"},
		flags:      flags,
		owners:     []owner{{one.PID, startOf(t, one.PID), 0}, {two.PID, startOf(t, two.PID), 1}},
		// As if both had been seen to have these frames.
		pages: []uint64{1000 << ownerBits, 1000<<ownerBits | 1, 1001<<ownerBits | 1, 1002 << ownerBits, 1002<<ownerBits | 1},
	}
	found, more := a.compare()
	s := found[pair{0, 1}]
	if len(found) != 1 || more || s == nil || s.pages != 2 {
		t.Fatalf("suspicions %v", found)
	}
	if c, confirmed, err := a.confirm(t.Context(), pair{0, 1}, s); confirmed || err != nil {
		t.Errorf("confirmed %v, %v", c, err)
	}
}

// forking is a context in which a container starts another process as soon as one of its
// processes is looked at.
type forking struct {
	context.Context
	fork func()
}

func (f forking) Err() error {
	f.fork()
	return f.Context.Err()
}

// What a container starts while it is looked at is not taken for a process of the machine,
// which would share pages with it that it must not.
func TestStartedMeanwhile(t *testing.T) {
	if os.Getuid() != 0 {
		missing.Skip(t, "not root")
	}
	flags, err := frame.OpenFlags()
	if err != nil {
		t.Fatal(err)
	}
	defer flags.Close()
	id := strings.Repeat("a", 64)
	procs := contain(t, id)
	enter(t, procs, kerneltest.Start(t, 1).PID)
	c := inventory.Container{}
	c.ID, c.CgroupsPath = id, "/sksm-test-"+id
	a := &audit{containers: []inventory.Container{c}, partitions: []string{"one"}, flags: flags}
	started := 0
	fork := sync.OnceFunc(func() {
		started = kerneltest.Start(t, 1).PID
		enter(t, procs, started)
	})
	if err := a.look(forking{t.Context(), fork}); err != nil {
		t.Fatal(err)
	}
	if started == 0 {
		t.Fatal("nothing was started")
	}
	for _, o := range a.owners {
		if o.pid == started && o.container == host {
			t.Errorf("process %d of the container is taken for one of the machine", started)
		}
	}
}

func startOf(t *testing.T, pid int) uint64 {
	t.Helper()
	activity, err := memory.ActivityOf(pid)
	if err != nil {
		t.Fatal(err)
	}
	return activity.Start
}
