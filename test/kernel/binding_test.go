package kernel_test

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
	"github.com/selective-ksm/selective-ksm/test/pages"
)

// add binds a process that need not have opted in.
func (p *process) add(partition string) error {
	return ksm.Write(partition+"/add_process", "%d", p.Pid)
}

func (p *process) remove(partition string) error {
	return ksm.Write(partition+"/remove_process", "%d", p.Pid)
}

// A process that knows nothing of KSM merges from when it is added, in its
// partition only, and with it what it begets.
func TestAddProcess(t *testing.T) {
	wantFeature(t, addProcess)
	const n = 256
	a, b := partition(t, "a"), partition(t, "b")
	p, q := startUnmergeable(t), startUnmergeable(t)
	// Memory from before and from after it takes part alike.
	p.hold(n, n, 1)
	for _, r := range []*process{p, q} {
		if err := r.add(a); err != nil {
			t.Fatal(err)
		}
	}
	q.hold(n, n, 1)
	p.mergeAll(a)
	q.mergeAll(a)
	if got := counter(t, a+"/pages_sharing"); got != n {
		t.Errorf("%d pages merged, want %d", got, n)
	}
	p.wantBound(t, a, b)

	forked := p.fork()
	forked.wantBound(t, a, b)
	wantCounters(t, a, p, q, forked)
	actor, err := p.Vfork(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	vforked := own(t, actor)
	vforked.hold(n, n, 1)
	vforked.wantBound(t, a, b)
	vforked.mergeAll(a)
	if err := forked.Exec(t.Context()); err != nil {
		t.Fatal(err)
	}
	forked.hold(n, n, 1)
	forked.wantBound(t, a, b)
	forked.mergeAll(a)
	if merged, err := pages.Merged(vforked.pages(), forked.pages()); err != nil || merged != n {
		t.Errorf("%d pages merged of processes that were begotten, %v, want %d", merged, err, n)
	}
	wantCounters(t, a, p, q, forked, vforked)
	// Its own child's child, after exec: still.
	forked.fork().wantBound(t, a, b)

	for _, r := range []*process{p, q, forked, vforked} {
		r.ask("check")
	}
}

func TestRemoveProcess(t *testing.T) {
	wantFeature(t, addProcess)
	const n = 256
	a, b := partition(t, "a"), partition(t, "b")
	p := startUnmergeable(t)
	p.hold(n, n, 1)
	if err := p.add(a); err != nil {
		t.Fatal(err)
	}
	child := p.fork()
	q := holding(t, n, 1)
	q.mergeAll(a)
	p.mergeAll(a)
	child.mergeAll(a)
	if err := p.remove(a); err != nil {
		t.Fatal(err)
	}
	if mappings, _ := ksmPages(t, p); mappings != 0 {
		t.Errorf("%d ksm pages of a process that was removed", mappings)
	}
	wantCounters(t, a, q, child)
	child.wantBound(t, a, b)
	// The opt-in was the kernel's, and has gone with the binding.
	p.mergeAll(b)
	if mappings, _ := ksmPages(t, p); mappings != 0 {
		t.Errorf("%d pages merged of a process that is not opted in any more", mappings)
	}
	if got := counter(t, b+"/pages_scanned"); got != 0 {
		t.Errorf("%d pages looked at of a process that is not opted in any more", got)
	}
	wantErr(t, "add it elsewhere", p.add(b), nil)
	p.wantBound(t, b, a)
	p.mergeAll(b)
	if common := pages.Common(pages.ByFrame(p.pages()), pages.ByFrame(q.pages())); len(common) > 0 {
		t.Errorf("%d physical pages in two partitions", len(common))
	}

	// An opt-in of its own stays.
	if err := q.remove(a); err != nil {
		t.Fatal(err)
	}
	q.mergeAll(b)
	q.wantBound(t, b, a)
	if merged, err := pages.Merged(p.pages(), q.pages()); err != nil || merged != n {
		t.Errorf("%d pages merged of processes that changed the partition, %v, want %d", merged, err, n)
	}
	wantCounters(t, a, child)
	wantCounters(t, b, p, q)
	for _, r := range []*process{p, q, child} {
		r.ask("check")
	}
}

// One that does not want to merge any more does not, but is not free to go.
func TestOptOutOfBound(t *testing.T) {
	wantFeature(t, addProcess)
	const n = 256
	a, b := partition(t, "a"), partition(t, "b")
	for _, how := range []string{"added", "opted in"} {
		p, q := startUnmergeable(t), holding(t, n, 1)
		if how == "added" {
			if err := p.add(a); err != nil {
				t.Fatal(err)
			}
		} else {
			p.optIn(true)
		}
		p.hold(n, n, 1)
		p.mergeAll(a)
		q.mergeAll(a)
		p.optIn(false)
		if mappings, _ := ksmPages(t, p); mappings != 0 {
			t.Errorf("%s: %d ksm pages after opting out", how, mappings)
		}
		p.wantBound(t, a, b)
		p.mergeAll(a)
		if mappings, _ := ksmPages(t, p); mappings != 0 {
			t.Errorf("%s: %d pages merged after opting out", how, mappings)
		}
		wantCounters(t, a, p, q)
		p.ask("check")
		p.kill()
		q.kill()
	}
}

// forkedThatOptedOut returns two processes of a partition with the same memory, and a
// child of the first that has opted out. It may still get merged pages: what it shares
// over fork is merged where it is.
func forkedThatOptedOut(t *testing.T, partition string) (p, q, child *process) {
	t.Helper()
	wantFeature(t, addProcess)
	const n = 256
	p, q = holding(t, n, 1), holding(t, n, 1)
	if err := p.add(partition); err != nil {
		t.Fatal(err)
	}
	child = p.fork()
	child.optIn(false)
	q.mergeAll(partition)
	p.mergeAll(partition)
	if mappings, _ := ksmPages(t, child); mappings < n {
		t.Errorf("the child shares %d pages with its parent, want %d: this shows nothing", mappings, n)
	}
	return p, q, child
}

// The merged pages of one that has opted out are not forgotten when it is removed.
func TestRemoveForkedThatOptedOut(t *testing.T) {
	a, b := partition(t, "a"), partition(t, "b")
	p, q, child := forkedThatOptedOut(t, a)
	wantCounters(t, a, p, q, child)
	if err := child.remove(a); err != nil {
		t.Fatal(err)
	}
	if mappings, _ := ksmPages(t, child); mappings != 0 {
		t.Errorf("%d pages of the partition are in a process that has left", mappings)
	}
	if err := child.add(b); err != nil {
		t.Fatal(err)
	}
	child.mergeAll(b)
	wantCounters(t, a, p, q)
	wantCounters(t, b, child)
	wantApart(t, []*process{p, q}, []*process{child})
	for _, r := range []*process{p, q, child} {
		r.ask("check")
	}
}

// mremap does not take them along: they could get behind the walk that looks for
// all of a process that is to be removed.
func TestMoveOfForkedThatOptedOut(t *testing.T) {
	a := partition(t, "a")
	p, q, child := forkedThatOptedOut(t, a)
	child.move()
	if mappings, _ := ksmPages(t, child); mappings != 0 {
		t.Errorf("%d merged pages in memory that was moved", mappings)
	}
	wantCounters(t, a, p, q, child)
	for _, r := range []*process{p, q, child} {
		r.ask("check")
	}
}

// How often the races are run, if there is time.
const (
	raceRounds = 2000
	raceTime   = 40 * time.Second
)

// raceAgain calls f with the generator of a fixed seed that often, or until
// the test has failed.
func raceAgain(t *testing.T, f func(r *rand.Rand)) {
	t.Helper()
	const seed = 20261125
	r := rand.New(rand.NewPCG(seed, 0))
	n := 0
	for began := time.Now(); n < raceRounds && time.Since(began) < raceTime && !t.Failed(); n++ {
		f(r)
	}
	t.Logf("seed %d: %d times", seed, n)
}

// Whenever a process is added while it executes another program, the process
// that exists afterwards is bound.
func TestAddRacingExec(t *testing.T) {
	wantFeature(t, addProcess)
	a, b := partition(t, "a"), partition(t, "b")
	p := startUnmergeable(t)
	raceAgain(t, func(r *rand.Rand) {
		if err := race(r, func() error { return p.Exec(t.Context()) }, func() error { return p.add(a) }); err != nil {
			t.Fatal(err)
		}
		p.wantBound(t, a, b)
		if err := p.remove(a); err != nil {
			t.Fatal(err)
		}
	})
}

// Whenever a process is added while it forks, it is bound, and whatever it has
// begotten is, or maps no ksm page: it may have come before.
func TestAddRacingFork(t *testing.T) {
	wantFeature(t, addProcess)
	const n = 8
	a, b := partition(t, "a"), partition(t, "b")
	p := startUnmergeable(t)
	p.hold(n, 1, 1)
	var before int
	raceAgain(t, func(r *rand.Rand) {
		var child *process
		err := race(r, func() error {
			c, err := p.Fork(t.Context())
			if err == nil {
				child = &process{t: t, Actor: c, start: p.start, end: p.end}
			}
			return err
		}, func() error { return p.add(a) })
		if err != nil {
			t.Fatal(err)
		}
		p.wantBound(t, a, b)
		p.mergeAll(a)
		if err := child.merge(b, 0, n); err == nil {
			before++
			if common := pages.Common(pages.ByFrame(p.pages()), pages.ByFrame(child.pages())); len(common) > 0 {
				if flags, err := pages.FlagsOf(common[0].Frame); err != nil || flags[0].KSM() {
					t.Errorf("a ksm page is in a partition and in a process outside of it, %v", err)
				}
			}
		} else {
			child.wantBound(t, a, b)
		}
		child.ask("check")
		child.kill()
		if err := p.remove(a); err != nil {
			t.Fatal(err)
		}
	})
	p.ask("check")
	t.Logf("%d children were forked before the process was bound", before)
}

// race does two things at the same time, the second a little later.
func race(r *rand.Rand, first, second func() error) error {
	var wg sync.WaitGroup
	var err error
	wg.Go(func() { err = first() })
	// Less than a fork or exec takes, so that it falls anywhere in it.
	delay := time.Duration(r.IntN(3000)) * time.Microsecond
	for began := time.Now(); time.Since(began) < delay; {
	}
	secondErr := second()
	wg.Wait()
	if err == nil {
		err = secondErr
	}
	return err
}

// A process that dies while it is added leaves nothing that would keep the
// partition.
func TestAddRacingExit(t *testing.T) {
	wantFeature(t, addProcess)
	raceAgain(t, func(r *rand.Rand) {
		a := partition(t, "a")
		p := startUnmergeable(t)
		err := race(r, func() error { p.kill(); return nil }, func() error { return p.add(a) })
		if err != nil && !isAny(err, unix.ESRCH, unix.EINVAL) {
			t.Fatal(err)
		}
		if err := ksm.Write("control/remove_partition", "%s", a); err != nil {
			t.Fatalf("remove the partition of a process that died: %v", err)
		}
	})
}
