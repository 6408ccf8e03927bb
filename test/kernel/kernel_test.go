// Package kernel_test tests what the patches in kernel/ promise, on a kernel
// that has them: through the files in sysfs, and by the physical pages of
// processes. make test runs it in the VM.
package kernel_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/actor"
	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
	"github.com/selective-ksm/selective-ksm/test/pages"
)

func counter(t *testing.T, file string) int {
	t.Helper()
	n, err := ksm.Counter(file)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// partition adds a partition for the time of the test, which has to remove it
// itself if it wants it gone.
func partition(t *testing.T, name string) string {
	t.Helper()
	needsKernel(t)
	if err := ksm.Write("control/add_partition", "%s\n", name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ksm.Write("control/remove_partition", "%s\n", name); err != nil && !errors.Is(err, unix.ENOENT) {
			t.Errorf("remove partition %s: %v", name, err)
		}
	})
	return name
}

// wantCounters compares a partition's counters with the page tables of all its
// processes.
func wantCounters(t *testing.T, partition string, processes ...*process) {
	t.Helper()
	mappings, frames := ksmPages(t, processes...)
	shared, sharing := counter(t, partition+"/pages_shared"), counter(t, partition+"/pages_sharing")
	if shared != frames || shared+sharing != mappings {
		t.Errorf("partition %s: %d shared and %d sharing pages, but %d entries of page tables map %d ksm pages",
			partition, shared, sharing, mappings, frames)
	}
}

// wantFeature fails the test on a kernel that lacks a feature. One that has
// partitions has them all.
func wantFeature(t *testing.T, feature string) {
	t.Helper()
	needsKernel(t)
	features, err := ksm.Features()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(features, feature) {
		t.Fatalf("this kernel lacks the feature %s, it has %v", feature, features)
	}
}

const (
	addProcess = "add_process"
	syscalls   = "syscalls=467,468"
)

func wantErr(t *testing.T, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: got error %v, want %v", what, got, want)
	}
}

func TestNames(t *testing.T) {
	partition(t, "here")
	long := strings.Repeat("x", 31)
	for _, c := range []struct {
		name string
		want error
	}{
		{"here", unix.EEXIST},
		{"\n", unix.EINVAL},
		{".hidden", unix.EINVAL},
		{"a/b", unix.EINVAL},
		{"a b", unix.EINVAL},
		{"two\nlines", unix.EINVAL},
		{"nul\x00", unix.EINVAL},
		{"\xe4", unix.EINVAL},
		{"control", unix.EINVAL},
		{"pages_shared", unix.EINVAL},
		{"max_page_sharing", unix.EINVAL},
		{long + "x", unix.ENAMETOOLONG},
		{long, nil},
		{"A-z_0.9", nil},
	} {
		err := ksm.Write("control/add_partition", "%s", c.name)
		wantErr(t, fmt.Sprintf("add %q", c.name), err, c.want)
		if err == nil {
			wantErr(t, fmt.Sprintf("remove %q", c.name), ksm.Write("control/remove_partition", "%s\n", c.name), nil)
		}
	}
	wantErr(t, "remove what is not there", ksm.Write("control/remove_partition", "nobody\n"), unix.ENOENT)
	wantErr(t, "remove what cannot be", ksm.Write("control/remove_partition", "a/b\n"), unix.EINVAL)
}

func TestTriggerErrors(t *testing.T) {
	a := partition(t, "a")
	p := holding(t, 16, 1)
	dead := holding(t, 1, 1)
	dead.kill()
	for _, file := range []string{"trigger_merge", "trigger_unmerge"} {
		for _, c := range []struct {
			line string
			want error
		}{
			{"words are no numbers", unix.EINVAL},
			{fmt.Sprintf("%d 1000", p.Pid), unix.EINVAL},
			{fmt.Sprintf("%d 2000 1000", p.Pid), unix.EINVAL},
			{fmt.Sprintf("%d 1000 1000", p.Pid), unix.EINVAL},
			{fmt.Sprintf("%d 1000 2000 3000", p.Pid), unix.EINVAL},
			{fmt.Sprintf("%d 1000 2000x", p.Pid), unix.EINVAL},
			{fmt.Sprintf("%x 10%x", p.start, p.end), unix.EINVAL}, // the pid is not the first digits
			{fmt.Sprintf("%dabc def", p.Pid), unix.EINVAL},
			{fmt.Sprintf("%d 1000 2000", 1<<32+p.Pid), unix.EINVAL},
			{fmt.Sprintf("%d 10000000000001000 10000000000002000", p.Pid), unix.EINVAL},
			{fmt.Sprintf("%d ffff800000000000 ffff800000001000", p.Pid), unix.EINVAL},
			{fmt.Sprintf("%d 1000 2000", dead.Pid), unix.ESRCH},
			{"0 1000 2000", unix.ESRCH},
			{"-1 1000 2000", unix.ESRCH},
			{"2 1000 2000", unix.EINVAL}, // kthreadd has no memory
			{fmt.Sprintf("%d 1000 ffffffffffffffff\n", p.Pid), nil},
		} {
			wantErr(t, file+" "+c.line, ksm.Write(a+"/"+file, "%s", c.line), c.want)
		}
	}
	wantErr(t, "merge without a range", ksm.Write(a+"/trigger_merge", "%d", p.Pid), unix.EINVAL)
	wantErr(t, "unmerge without a range", ksm.Write(a+"/trigger_unmerge", "%d\n", p.Pid), nil)
	wantErr(t, "unmerge of no process", ksm.Write(a+"/trigger_unmerge", "%d\n", 1<<32+p.Pid), unix.EINVAL)
	for _, knob := range []string{"pages_to_scan", "sleep_millisecs"} {
		wantErr(t, knob, ksm.Write(a+"/"+knob, "many"), unix.EINVAL)
	}
	wantErr(t, "pages_to_scan", ksm.Write(a+"/pages_to_scan", "0"), unix.EINVAL)
}

// The same data in two partitions is one page in each, never one in both, and
// stays what was written.
func TestMergeInsidePartitionsOnly(t *testing.T) {
	const n = 4096
	a, b := partition(t, "a"), partition(t, "b")
	inA := []*process{holding(t, n, 1), holding(t, n, 1)}
	inB := []*process{holding(t, n, 1), holding(t, n, 1)}
	for i := range inA {
		inA[i].mergeAll(a)
		inB[i].mergeAll(b)
	}

	for _, pair := range [][]*process{inA, inB} {
		merged, err := pages.Merged(pair[0].pages(), pair[1].pages())
		if err != nil {
			t.Fatal(err)
		}
		if merged < n*95/100 {
			t.Errorf("%d of %d pages merged in one call", merged, n)
		}
	}
	for _, p := range inA {
		for _, q := range inB {
			if common := pages.Common(pages.ByFrame(p.pages()), pages.ByFrame(q.pages())); len(common) > 0 {
				t.Errorf("%d physical pages in two partitions", len(common))
			}
		}
	}
	wantCounters(t, a, inA...)
	wantCounters(t, b, inB...)
	wantErr(t, "merge a process of a into b", inA[0].merge(b, 0, n), unix.EBUSY)

	// What is written gets pages of its own, and the others keep theirs.
	inA[0].ask("write 0 %d 2", n/2)
	wantCounters(t, a, inA...)
	inA[0].mergeAll(a)
	wantCounters(t, a, inA...)
	inA[1].ask("write 0 %d 2", n/2)
	inA[1].mergeAll(a)
	wantCounters(t, a, inA...)
	if got := counter(t, a+"/pages_sharing"); got < n*95/100 {
		t.Errorf("%d of %d pages merged after both wrote the same", got, n)
	}
	for _, p := range append(inA, inB...) {
		p.ask("check")
	}

	if err := ksm.Write("control/remove_partition", "%s", a); err != nil {
		t.Fatal(err)
	}
	if mappings, _ := ksmPages(t, inA...); mappings != 0 {
		t.Errorf("%d entries of page tables map ksm pages of a removed partition", mappings)
	}
	wantCounters(t, b, inB...)
	wantErr(t, "merge a process whose partition was removed", inA[0].merge(b, 0, n), nil)
	for _, p := range append(inA, inB...) {
		p.ask("check")
	}
}

func TestRanges(t *testing.T) {
	const n = 1024
	a := partition(t, "a")
	p, q := holding(t, n, 1), holding(t, n, 1)
	p.mergeAll(a)
	if err := q.merge(a, 100, 200); err != nil {
		t.Fatal(err)
	}
	if got := counter(t, a+"/pages_sharing"); got != 200 {
		t.Errorf("%d pages merged of a range of 200", got)
	}
	if err := ksm.Write(a+"/trigger_unmerge", "%d %x %x\n", q.Pid, q.start, q.start+uint64(150*actor.PageSize)); err != nil {
		t.Fatal(err)
	}
	if got := counter(t, a+"/pages_sharing"); got != 150 {
		t.Errorf("%d pages still merged, want 150", got)
	}
	wantCounters(t, a, p, q)
	if err := ksm.Write(a+"/trigger_unmerge", "%d", q.Pid); err != nil {
		t.Fatal(err)
	}
	if mappings, _ := ksmPages(t, q); mappings != 0 {
		t.Errorf("%d ksm pages after unmerge", mappings)
	}
	wantCounters(t, a, p, q)
	p.ask("check")
	q.ask("check")
}

// A small batch and a full list of sharers change how, not what is merged.
func TestKnobs(t *testing.T) {
	const n = 512
	a := partition(t, "a")
	sharing := counter(t, "max_page_sharing")
	for _, w := range []string{a + "/pages_to_scan 1", a + "/sleep_millisecs 1", "max_page_sharing 2"} {
		file, value, _ := strings.Cut(w, " ")
		if err := ksm.Write(file, "%s", value); err != nil {
			t.Fatal(err)
		}
	}
	defer func() {
		if err := ksm.Write("max_page_sharing", "%d", sharing); err != nil {
			t.Error(err)
		}
	}()
	// All pages are one: of the ksm pages for it, each has two sharers.
	p := start(t)
	p.hold(n, 1, 1)
	p.mergeAll(a)
	if shared, got := counter(t, a+"/pages_shared"), counter(t, a+"/pages_sharing"); shared != n/2 || got != n/2 {
		t.Errorf("%d shared and %d sharing, want %d each", shared, got, n/2)
	}
	wantCounters(t, a, p)
	p.ask("check")
}

// A page is a candidate for as long as it is as it was, wherever its process
// has gone meanwhile.
func TestStaleCandidates(t *testing.T) {
	const n = 1024
	a := partition(t, "a")
	p := holding(t, n, 1)
	p.mergeAll(a)
	if got := counter(t, a+"/pages_unshared"); got != n {
		t.Fatalf("%d candidates, want %d", got, n)
	}

	p.ask("write 0 %d 2", n/2)
	q := holding(t, n, 1)
	q.mergeAll(a)
	if got := counter(t, a+"/pages_sharing"); got != n/2 {
		t.Errorf("%d pages merged, want the %d that did not change", got, n/2)
	}
	p.ask("unmap")
	p.hold(n, n, 3)
	q.kill()
	// Of the two processes' candidates none is left, and one that looks for
	// them finds none.
	r := holding(t, n, 1)
	r.mergeAll(a)
	p.mergeAll(a)
	wantCounters(t, a, p, r)
	if got := counter(t, a+"/pages_unshared"); got > 2*n {
		t.Errorf("%d candidates of %d pages", got, 2*n)
	}
	s := holding(t, n, 1)
	s.mergeAll(a)
	if got := counter(t, a+"/pages_sharing"); got != n {
		t.Errorf("%d pages merged, want %d", got, n)
	}
	p.kill()
	r.kill()
	s.kill()
	wantCounters(t, a)
	if got := counter(t, a+"/pages_unshared"); got != 0 {
		t.Errorf("%d candidates, and no process", got)
	}
}

func TestBinding(t *testing.T) {
	const n = 64
	a, b := partition(t, "a"), partition(t, "b")
	p := holding(t, n, 1)
	p.mergeAll(a)
	child, err := p.Vfork(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	own(t, child).wantBound(t, a, b)

	// A process that did not opt in is passed over, and not bound.
	q := startUnmergeable(t)
	q.hold(n, 1, 1)
	q.mergeAll(a)
	q.mergeAll(b)
	if mappings, _ := ksmPages(t, q); mappings != 0 {
		t.Errorf("%d pages merged of a process that did not opt in", mappings)
	}
}

// Merges in two partitions at once, while the memory is written and the
// partitions go away, lose no data.
func TestConcurrent(t *testing.T) {
	const n, rounds = 1024, 8
	var wg sync.WaitGroup
	for _, name := range []string{"a", "b"} {
		processes := []*process{holding(t, n, 1), holding(t, n, 1)}
		needsKernel(t)
		for i, p := range processes {
			wg.Go(func() {
				for round := range rounds {
					err := ksm.Write("control/add_partition", "%s", name)
					if err != nil && !errors.Is(err, unix.EEXIST) {
						t.Errorf("add: %v", err)
					}
					// The other one may remove it at any time.
					if err := p.merge(name, 0, n); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
						t.Errorf("merge: %v", err)
					}
					if round%4 == i {
						err := ksm.Write("control/remove_partition", "%s", name)
						if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EBUSY) {
							t.Errorf("remove: %v", err)
						}
					}
				}
			})
			wg.Go(func() {
				for round := range rounds * 4 {
					p.ask("write %d %d %d", round*16, n/4, round%3)
					p.ask("check")
				}
			})
		}
	}
	wg.Wait()
	for _, name := range []string{"a", "b"} {
		if err := ksm.Write("control/remove_partition", "%s", name); err != nil && !errors.Is(err, unix.ENOENT) {
			t.Error(err)
		}
	}
	if got := counter(t, "pages_shared"); got != 0 {
		t.Errorf("%d ksm pages and no partition", got)
	}
}
