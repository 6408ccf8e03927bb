package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/selective-ksm/selective-ksm/engine/budget"
	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest"
	"github.com/selective-ksm/selective-ksm/engine/kernel/mainline"
	"github.com/selective-ksm/selective-ksm/engine/kernel/syscall"
	"github.com/selective-ksm/selective-ksm/engine/kernel/sysfs"
	"github.com/selective-ksm/selective-ksm/test/e2e/border"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

// The tests of this file need root and a kernel with KSM: they go by physical
// pages. Each runs by every interface that the kernel has. With SELECTIVE_KSM_VM=1
// they fail where they could not run.

// held is how many pages a holder holds.
const held = 2048

func TestMain(m *testing.M) { kerneltest.Main(m) }

// each runs a test by every interface that the kernel has.
func each(t *testing.T, test func(t *testing.T, k kernel.Kernel)) {
	if os.Getuid() != 0 {
		missing.Skip(t, "not root")
	}
	kernels := map[string]kernel.Kernel{}
	if fs, err := sysfs.Open(); err == nil {
		kernels["sysfs"], kernels["literal RFC"] = fs, fs.Literal()
		if k, err := syscall.Open(fs, nil); err == nil {
			kernels["syscall"] = k
		}
	}
	if k, err := mainline.Open(mainline.Options{First: true}); err == nil {
		kerneltest.HaveMachine(t)
		kernels["mainline"] = k
	}
	if len(kernels) == 0 {
		missing.Skip(t, "this kernel has no KSM")
	}
	for name, k := range kernels {
		t.Run(name, func(t *testing.T) { test(t, k) })
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	}
}

// holder is a process that holds memory, in a cgroup of its own.
type holder struct {
	*kerneltest.Process
	Container
}

func startHolder(t *testing.T, k kernel.Kernel, id, partition string) *holder {
	t.Helper()
	dir := newCgroup(t, "sksm-test-"+id)
	h := &holder{Container: Container{ID: id, Name: id, Pod: partition, CgroupsPath: "/sksm-test-" + id, Partition: partition}}
	if h.Process = kerneltest.Start(t, held); !k.Features().Bind {
		h.Do(t, "mergeable")
	}
	enter(t, dir, h.PID)
	return h
}

// newCgroup makes a cgroup for the time of a test.
func newCgroup(t testing.TB, name string) string {
	t.Helper()
	root := cgroup.DefaultRoot
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err != nil {
		root = filepath.Join(root, "pids") // of cgroup v1
	}
	dir := filepath.Join(root, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		until(t, "cgroup "+name+" is empty", func() bool { return !cgroup.Populated(dir) })
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func enter(t testing.TB, dir string, pid int) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Appendln(nil, pid), 0); err != nil {
		t.Fatal(err)
	}
}

// shared is how many of the pages that a and b hold are the same physical page.
func shared(t *testing.T, a, b *holder) int {
	t.Helper()
	return kerneltest.Shared(t, a.Process, b.Process)
}

// apart fails the test if any two processes share any page of their memory.
func apart(t *testing.T, as, bs []*holder) {
	t.Helper()
	var processes []border.Process
	for tenant, holders := range map[string][]*holder{"a": as, "b": bs} {
		for _, h := range holders {
			processes = append(processes, border.Process{Tenant: tenant, Name: h.ID, PID: h.PID})
		}
	}
	crossings, err := border.Crossings(processes...)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range crossings {
		t.Error(c)
	}
}

// lines is a hook that passes on what is logged.
type lines chan *logrus.Entry

func (lines) Levels() []logrus.Level { return logrus.AllLevels }

func (l lines) Fire(e *logrus.Entry) error {
	l <- e
	return nil
}

// run runs an engine until the test ends or stop is called.
func run(t *testing.T, k kernel.Kernel) (e *Engine, log lines, stop func()) {
	t.Helper()
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	log = make(lines, 1000)
	logger.AddHook(log)
	e = New(Options{
		Kernel: k, Owned: func(name string) bool { return strings.HasPrefix(name, "sksm-test-") },
		Settings: Settings{StartDelays: []time.Duration{0}, Interval: time.Hour, Budget: budget.Limits{Workers: 2}},
		Log:      logger,
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		e.Run(ctx)
	}()
	stop = func() {
		cancel()
		<-ended
	}
	t.Cleanup(stop)
	return e, log, stop
}

// add makes holders members that run.
func add(t *testing.T, e *Engine, holders ...*holder) {
	t.Helper()
	for _, h := range holders {
		if err := e.Add(t.Context(), h.Container); err != nil {
			t.Fatal(err)
		}
		e.Start(h.ID)
	}
}

// waitMerged waits until containers have what they hold merged.
func (l lines) waitMerged(t *testing.T, holders ...*holder) {
	t.Helper()
	want := map[string]bool{}
	for _, h := range holders {
		want[h.ID] = true
	}
	deadline := time.After(2 * time.Minute)
	for len(want) > 0 {
		select {
		case e := <-l:
			switch {
			case e.Message == "container is not merged":
				t.Errorf("logged %q %v", e.Message, e.Data)
			case e.Message == "merged" && e.Data["merged_bytes"].(uint64) >= uint64(held*os.Getpagesize()):
				delete(want, e.Data["container_id"].(string))
			}
		case <-deadline:
			t.Fatalf("not merged: %v", want)
		}
	}
}

// mergeAll merges a partition until all is shared that is held. KSM leaves a page that it
// finds busy, as when memory is compacted, for its next scan, and a kernel that needs
// Settle tells of none: it is asked again.
func (l lines) mergeAll(t *testing.T, e *Engine, what string, shared func() int, holders ...*holder) {
	t.Helper()
	for range 10 {
		if err := e.Merge(holders[0].Partition); err != nil {
			t.Fatal(err)
		}
		l.waitMerged(t, holders...)
		if !e.features.OneSpace || shared() == held {
			break
		}
	}
	if n := shared(); n != held {
		t.Errorf("%s: %d pages are shared, want %d", what, n, held)
	}
}

// until polls, for what the kernel tells nobody.
func until(t testing.TB, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(2 * time.Minute)
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("still not: %s", what)
		}
	}
}

func exists(t *testing.T, k kernel.Kernel, partition string) bool {
	t.Helper()
	names, err := k.Partitions()
	if err != nil {
		t.Fatal(err)
	}
	return slices.Contains(names, partition)
}

func TestVMPartitions(t *testing.T) {
	each(t, func(t *testing.T, k kernel.Kernel) {
		e, log, _ := run(t, k)
		a1, a2 := startHolder(t, k, "a1", "sksm-test-a"), startHolder(t, k, "a2", "sksm-test-a")
		as := []*holder{a1, a2}
		add(t, e, as...)
		var bs []*holder
		if k.Features().OneSpace {
			// The second partition is kept out, and its containers' memory is not opted in.
			dir := newCgroup(t, "sksm-test-b1")
			b := &holder{kerneltest.Start(t, held), Container{ID: "b1", CgroupsPath: "/sksm-test-b1", Partition: "sksm-test-b"}}
			enter(t, dir, b.PID)
			if err := e.Add(t.Context(), b.Container); !errors.Is(err, kernel.ErrKeptOut) {
				t.Errorf("second partition: %v", err)
			}
			bs = append(bs, b)
		} else {
			bs = append(bs, startHolder(t, k, "b1", "sksm-test-b"), startHolder(t, k, "b2", "sksm-test-b"))
			add(t, e, bs...)
			log.waitMerged(t, bs...)
		}
		log.mergeAll(t, e, "a1 and a2", func() int { return shared(t, a1, a2) }, a1, a2)
		apart(t, as, bs)
		all := slices.Concat(as, bs)
		for _, h := range all {
			h.Do(t, "check")
		}

		// Writing parts what was merged, for the writer alone.
		a1.Do(t, "write")
		if n := shared(t, a1, a2); n != 0 && !k.Features().OneSpace { // where ksmd may see it at once
			t.Errorf("a1 has written to all of its pages, and shares %d", n)
		}
		a2.Do(t, "check")

		// A container that leaves is unmerged; those that stay are not.
		if len(bs) == 2 {
			e.Stop("b1")
			until(t, "b1 is unmerged", func() bool { return shared(t, bs[0], bs[1]) == 0 })
			if !exists(t, k, "sksm-test-b") {
				t.Error("a partition with a member is gone")
			}
		}
		for _, h := range all {
			e.Stop(h.ID)
		}
		if k.Features().OneSpace {
			// Its processes stay mergeable until they end.
			for _, h := range as {
				h.Kill()
			}
			all = bs
		}
		until(t, "partitions are removed", func() bool { return !exists(t, k, "sksm-test-a") && !exists(t, k, "sksm-test-b") })
		for i, h := range all {
			h.Do(t, "check")
			for _, other := range all[:i] {
				if n := shared(t, h, other); n != 0 {
					t.Errorf("%s and %s still share %d pages", h.ID, other.ID, n)
				}
			}
		}
	})
}

// An engine takes over what one before it left.
func TestVMRestart(t *testing.T) {
	each(t, func(t *testing.T, k kernel.Kernel) {
		e, log, stop := run(t, k)
		a1, a2 := startHolder(t, k, "a1", "sksm-test-a"), startHolder(t, k, "a2", "sksm-test-a")
		add(t, e, a1, a2)
		log.mergeAll(t, e, "a1 and a2", func() int { return shared(t, a1, a2) }, a1, a2)
		stop()
		if n := shared(t, a1, a2); n != held {
			t.Errorf("after the engine's end %d pages are merged, want %d", n, held)
		}
		one := k.Features().OneSpace
		if !one {
			for _, name := range []string{"sksm-test-orphan", "theirs"} {
				if err := k.AddPartition(name); err != nil {
					t.Fatal(err)
				}
			}
			defer k.RemovePartition("theirs")
		}

		e, log, _ = run(t, k)
		if err := e.Reconcile(nil, []Container{a1.Container, a2.Container}); err != nil {
			t.Fatal(err)
		}
		log.waitMerged(t, a1, a2)
		wide := k.Features().WideRemoval
		if !wide {
			until(t, "orphan is removed", func() bool { return !exists(t, k, "sksm-test-orphan") })
		}
		if n := shared(t, a1, a2); n != held {
			t.Errorf("after an orphan's removal %d pages are merged, want %d", n, held)
		}
		if !one && !exists(t, k, "theirs") {
			t.Error("a partition of others was removed")
		}
		if wide && !one {
			// Nothing is removed beside a partition of others.
			k.RemovePartition("theirs")
		}
		if one {
			a1.Kill()
			a2.Kill()
		}
		if err := e.Reconcile(nil, nil); err != nil {
			t.Fatal(err)
		}
		until(t, "partitions are removed", func() bool { return !exists(t, k, "sksm-test-a") && !exists(t, k, "sksm-test-orphan") })
		if !one {
			if n := shared(t, a1, a2); n != 0 {
				t.Errorf("%d pages are still merged", n)
			}
		}
	})
}

// Processes that come later, by fork or from outside, are the container's, too, and
// one that no event tells of ends it.
func TestVMProcesses(t *testing.T) {
	each(t, func(t *testing.T, k kernel.Kernel) {
		e, log, _ := run(t, k)
		h := startHolder(t, k, "a1", "sksm-test-a")
		child := h.Spawn(t)
		add(t, e, h)
		log.mergeAll(t, e, "a child", func() int { return kerneltest.Shared(t, h.Process, child) }, h)
		session := kerneltest.Start(t, held)
		if !k.Features().Bind {
			session.Do(t, "mergeable")
		}
		enter(t, cgroupOf(t, h.CgroupsPath), session.PID)
		until(t, "a session is merged", func() bool {
			// Its lines are not told from those of merges before it came.
			if err := e.Merge(""); err != nil {
				t.Fatal(err)
			}
			return kerneltest.Shared(t, h.Process, session) == held
		})
		if err := session.Close(); err != nil {
			t.Error(err)
		}
		h.Kill()
		until(t, "partition is removed", func() bool { return !exists(t, k, "sksm-test-a") })
	})
}

func cgroupOf(t *testing.T, path string) string {
	t.Helper()
	dir, err := cgroup.Find(cgroup.DefaultRoot, path)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}
