// Package kerneltest tests that a kernel does what package kernel says, whichever
// interface it is asked through: by the physical pages of processes, not by its
// counters.
package kerneltest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// held is how many pages a process of the suite holds.
const held = 1024

// bench is a test with the kernel that it is about.
type bench struct {
	*testing.T
	kernel.Kernel
}

// Suite tests a kernel, which open opens for each test with no partition in it.
func Suite(t *testing.T, open func(t *testing.T) kernel.Kernel) {
	for name, test := range map[string]func(b *bench){
		"partitions": testPartitions,
		"merge":      testMerge,
		"border":     testBorder,
		"unmerge":    testUnmerge,
		"removal":    testRemoval,
		"bind":       testBind,
		"opted out":  testOptedOut,
		"errors":     testErrors,
		"cancelled":  testCancelled,
		"at once":    testAtOnce,
		"close":      testClose,
	} {
		t.Run(name, func(t *testing.T) {
			k := open(t)
			t.Cleanup(func() {
				if err := k.Close(); err != nil {
					t.Error(err)
				}
			})
			test(&bench{t, k})
		})
	}
}

// partition is a partition for the time of a test.
func (b *bench) partition(name string) string {
	b.Helper()
	if err := b.AddPartition(name); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		// After Close a partition of system calls is gone, or going.
		err := b.RemovePartition(name)
		if err != nil && !errors.Is(err, kernel.ErrNoPartition) && !errors.Is(err, kernel.ErrGoing) {
			b.Error(err)
		}
	})
	return name
}

// merge merges all that processes hold.
func (b *bench) merge(partition string, processes ...*Process) {
	b.Helper()
	for _, p := range processes {
		if err := b.Merge(b.Context(), partition, p.PID, p.Held); err != nil {
			b.Fatal(err)
		}
	}
	settles := 1
	if b.Features().OneSpace {
		// The second is for pages that were busy in the first, as when memory is compacted.
		settles = 2
	}
	for range settles {
		if _, err := b.Settle(b.Context(), partition); err != nil {
			b.Fatal(err)
		}
	}
}

func (b *bench) wantShared(what string, p, q *Process, want int) {
	b.Helper()
	if got := Shared(b, p, q); got != want {
		b.Errorf("%s: %d pages are shared, want %d", what, got, want)
	}
}

func (b *bench) wantErr(what string, got, want error) {
	b.Helper()
	if !errors.Is(got, want) {
		b.Errorf("%s: got error %v, want %v", what, got, want)
	}
}

func testPartitions(b *bench) {
	b.partition("sksm-test-1")
	b.wantErr("add twice", b.AddPartition("sksm-test-1"), kernel.ErrPartitionExists)
	names := []string{"sksm-test-1"}
	err := b.AddPartition("sksm-test-2")
	if b.Features().OneSpace {
		b.wantErr("add another", err, kernel.ErrKeptOut)
	} else if b.wantErr("add another", err, nil); err == nil {
		names = append(names, "sksm-test-2")
	}
	got, err := b.Partitions()
	if slices.Sort(got); err != nil || !slices.Equal(got, names) {
		b.Errorf("partitions are %q, %v; want %q", got, err, names)
	}
	for _, name := range names {
		b.wantErr("remove", b.RemovePartition(name), nil)
		b.wantErr("remove twice", b.RemovePartition(name), kernel.ErrNoPartition)
	}
	if got, err := b.Partitions(); err != nil || len(got) != 0 {
		b.Errorf("partitions are %q, %v; want none", got, err)
	}
	b.partition("sksm-test-1")
}

func testMerge(b *bench) {
	part := b.partition("sksm-test-1")
	p, q := StartMergeable(b, held), StartMergeable(b, held)
	b.merge(part, p, q)
	b.wantShared("merged", p, q, held)
	c, err := b.Counters(part)
	if err != nil || c.Sharing < held || c.Shared < held || c.Scanned < 2*held {
		b.Errorf("counters are %+v, %v", c, err)
	}
	if !b.Features().SharedCounters && c.Shared+c.Sharing != 2*held {
		b.Errorf("counters are %+v, of %d pages merged", c, 2*held)
	}
	p.Do(b, "check")
	p.Do(b, "write")
	b.wantShared("written", p, q, 0)
	q.Do(b, "check")
	b.merge(part, p, q)
	b.wantShared("merged again", p, q, held)
	p.Do(b, "change")
	b.merge(part, p, q)
	b.wantShared("different", p, q, 0)
	p.Do(b, "check")
	q.Do(b, "check")
}

func testBorder(b *bench) {
	if b.Features().OneSpace {
		// It is kept by there being no second partition.
		part := b.partition("sksm-test-1")
		p, q, out := StartMergeable(b, held), StartMergeable(b, held), Start(b, held)
		b.merge(part, p, q)
		b.wantShared("inside", p, q, held)
		b.wantShared("not mergeable", p, out, 0)
		return
	}
	one, two := b.partition("sksm-test-1"), b.partition("sksm-test-2")
	p1, q1 := StartMergeable(b, held), StartMergeable(b, held)
	p2, q2 := StartMergeable(b, held), StartMergeable(b, held)
	b.merge(one, p1, q1)
	b.merge(two, p2, q2)
	b.merge(one, q1, p1)
	b.wantShared("inside", p1, q1, held)
	b.wantShared("inside", p2, q2, held)
	for _, p := range []*Process{p1, q1} {
		b.wantShared("across", p, p2, 0)
		b.wantShared("across", p, q2, 0)
	}
}

func testUnmerge(b *bench) {
	part := b.partition("sksm-test-1")
	p, q, r := StartMergeable(b, held), StartMergeable(b, held), StartMergeable(b, held)
	b.merge(part, p, q, r)
	b.wantErr("unmerge", b.Unmerge(b.Context(), part, p.PID), nil)
	b.wantShared("unmerged", p, q, 0)
	if !b.Features().WideRemoval {
		b.wantShared("others", q, r, held)
	}
	for _, p := range []*Process{p, q, r} {
		p.Do(b, "check")
	}
}

func testRemoval(b *bench) {
	part := b.partition("sksm-test-1")
	p, q := StartMergeable(b, held), StartMergeable(b, held)
	b.merge(part, p, q)
	b.wantErr("remove", b.RemovePartition(part), nil)
	b.wantShared("removed", p, q, 0)
	b.partition(part)
	b.merge(part, p, q)
	b.wantShared("merged in one of the same name", p, q, held)
	p.Do(b, "check")
}

func testBind(b *bench) {
	one := b.partition("sksm-test-1")
	p, q := Start(b, held), Start(b, held)
	if !b.Features().Bind {
		b.wantErr("bind", b.Bind(one, p.PID), kernel.ErrNotSupported)
		b.wantErr("unbind", b.Unbind(one, p.PID), kernel.ErrNotSupported)
		return
	}
	two := b.partition("sksm-test-2")
	for _, p := range []*Process{p, q} {
		b.wantErr("bind", b.Bind(one, p.PID), nil)
		b.wantErr("bind again", b.Bind(one, p.PID), nil)
		b.wantErr("bind elsewhere", b.Bind(two, p.PID), kernel.ErrBusy)
	}
	b.merge(one, p, q)
	b.wantShared("bound", p, q, held)

	child := p.Spawn(b)
	b.wantErr("merge a child elsewhere", b.Merge(b.Context(), two, child.PID, child.Held), kernel.ErrBusy)
	b.merge(one, child)
	b.wantShared("child", child, q, held)

	b.wantErr("unbind elsewhere", b.Unbind(two, p.PID), kernel.ErrNotMember)
	b.wantErr("unbind", b.Unbind(one, p.PID), nil)
	b.wantShared("unbound", p, q, 0)
	b.wantShared("child of the unbound", child, q, held)
	b.wantErr("unbind again", b.Unbind(one, p.PID), kernel.ErrNotMember)
	b.wantErr("bind elsewhere then", b.Bind(two, p.PID), nil)
	for _, name := range []string{one, two} {
		b.wantErr("remove", b.RemovePartition(name), nil)
	}
	b.wantErr("bind to nothing", b.Bind(one, p.PID), kernel.ErrNoPartition)
	b.wantErr("unbind from nothing", b.Unbind(one, p.PID), kernel.ErrNoPartition)
	p.Do(b, "check")
}

func testOptedOut(b *bench) {
	part := b.partition("sksm-test-1")
	p, q := Start(b, held), Start(b, held)
	b.merge(part, p, q)
	b.wantShared("not mergeable", p, q, 0)
}

func testErrors(b *bench) {
	ctx := b.Context()
	part := b.partition("sksm-test-1")
	p := StartMergeable(b, held)
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		b.Fatal(err)
	}
	const thread = 2 // kthreadd, which has no memory
	pids := map[string]int{"gone": gone.Process.Pid, "thread": thread}
	if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", thread)); err != nil || string(comm) != "kthreadd\n" {
		delete(pids, "thread")
	}
	for name, pid := range pids {
		b.wantErr("merge "+name, b.Merge(ctx, part, pid, p.Held), kernel.ErrNoProcess)
		b.wantErr("unmerge "+name, b.Unmerge(ctx, part, pid), kernel.ErrNoProcess)
		if b.Features().Bind {
			b.wantErr("bind "+name, b.Bind(part, pid), kernel.ErrNoProcess)
		}
	}
	const none = "sksm-test-none"
	_, counters := b.Counters(none)
	for name, err := range map[string]error{
		"remove": b.RemovePartition(none), "merge": b.Merge(ctx, none, p.PID, p.Held),
		"unmerge": b.Unmerge(ctx, none, p.PID), "counters": counters,
	} {
		b.wantErr(name+" in nothing", err, kernel.ErrNoPartition)
	}

	f := b.Features()
	if f.OneSpace || f.WideRemoval {
		return // and nothing ties a process to its partition
	}
	two := b.partition("sksm-test-2")
	b.merge(part, p)
	b.wantErr("merge in a second partition", b.Merge(ctx, two, p.PID, p.Held), kernel.ErrBusy)
}

func testCancelled(b *bench) {
	part := b.partition("sksm-test-1")
	p := StartMergeable(b, held)
	ctx, cancel := context.WithCancel(b.Context())
	cancel()
	b.wantErr("merge", b.Merge(ctx, part, p.PID, p.Held), context.Canceled)
	b.wantErr("unmerge", b.Unmerge(ctx, part, p.PID), context.Canceled)
	_, err := b.Settle(ctx, part)
	b.wantErr("settle", err, context.Canceled)
}

// testAtOnce has many callers ask for much at the same time. All that may come of it
// is what a partition that goes can cause.
func testAtOnce(b *bench) {
	const callers, rounds = 4, 5
	allowed := []error{
		kernel.ErrNoPartition, kernel.ErrPartitionExists, kernel.ErrGoing, kernel.ErrKeptOut, kernel.ErrBusy,
		fs.ErrNotExist, // of a file whose directory comes again meanwhile
	}
	p := StartMergeable(b, held)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			name := fmt.Sprintf("sksm-test-%d", i/2) // two have the same
			for range rounds {
				_, counters := b.Counters(name)
				for _, err := range []error{
					b.AddPartition(name), b.Merge(b.Context(), name, p.PID, p.Held), counters,
					b.Unmerge(b.Context(), name, p.PID), b.RemovePartition(name),
				} {
					if err != nil && !slices.ContainsFunc(allowed, func(a error) bool { return errors.Is(err, a) }) {
						b.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	for i := range callers / 2 {
		b.RemovePartition(fmt.Sprintf("sksm-test-%d", i))
	}
	if names, err := b.Partitions(); err != nil || len(names) != 0 {
		b.Errorf("partitions are %q, %v; want none", names, err)
	}
	p.Do(b, "check")
}

// testClose tests that nothing stays open.
func testClose(b *bench) {
	before := descriptors(b)
	for range 3 {
		b.partition("sksm-test-1")
		b.wantErr("remove", b.RemovePartition("sksm-test-1"), nil)
	}
	b.partition("sksm-test-1")
	b.wantErr("add twice", b.AddPartition("sksm-test-1"), kernel.ErrPartitionExists)
	b.wantErr("close", b.Close(), nil)
	if after := descriptors(b); after != before {
		b.Errorf("%d descriptors are open, %d were before", after, before)
	}
}

func descriptors(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
