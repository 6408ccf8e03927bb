package engine

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// What there is, what has been done, and who is left out and why.
func TestReport(t *testing.T) {
	with(t, func(b *bench) {
		out := b.container("out", "", 31)
		out.Because = "the reason"
		b.add(out)
		b.add(b.container("a", "own-1", 11))
		b.Start("a")
		b.set(func(m *machine) { m.optedOut[12] = true })
		b.add(b.container("b", "own-1", 12))
		b.Start("b")
		b.failWith(func(call string) error {
			if strings.HasPrefix(call, "bind") || strings.HasPrefix(call, "merge own-1 11") {
				return unix.EIO
			}
			return nil
		})
		time.Sleep(2 * time.Second)
		b.failWith(nil)
		time.Sleep(20 * time.Second)
		synctest.Wait()

		r := b.Report()
		if len(r.Outside) != 1 || r.Outside[0].ID != "out" || r.Outside[0].Reason != "the reason" || r.Outside[0].Cause != CausePolicy {
			t.Errorf("outside are %+v", r.Outside)
		}
		p := r.Partitions[0]
		if p.Counters == nil || *p.Counters != (kernel.Counters{Shared: 1, Sharing: 3}) || r.Machine != nil {
			t.Errorf("counters are %+v, the machine's %+v", p.Counters, r.Machine)
		}
		if p.Work.Errors["EIO"] == 0 || r.Work.Errors["EIO"] != p.Work.Errors["EIO"] {
			t.Errorf("errors are %v and %v", p.Work.Errors, r.Work.Errors)
		}
		if n := p.Work.Merges.Count; n == 0 || p.Work.Merges.Within[len(Bounds)-1] != n || r.Work.Merges.Count != n {
			t.Errorf("merges are %+v and %+v", p.Work.Merges, r.Work.Merges)
		}
		if a, b := p.Containers[0], p.Containers[1]; a.Reason != "" || a.Cause != "" || b.Cause != CauseNotMergeable {
			t.Errorf("containers are %+v and %+v", a, b)
		}
		if p.Last.IsZero() || !p.Next.After(r.At) {
			t.Errorf("last merge %v, next %v", p.Last, p.Next)
		}

		// What was done for a partition that is gone counts on.
		before := r.Work.Merges.Count
		b.Stop("a")
		b.Stop("b")
		time.Sleep(time.Second)
		if r := b.Report(); len(r.Partitions) != 0 || r.Work.Merges.Count != before {
			t.Errorf("at the end %+v", r)
		}
	})
}

// Counters of the machine are nobody's own.
func TestReportSharedCounters(t *testing.T) {
	on(t, kernel.Features{SharedCounters: true}, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		if r := b.Report(); r.Machine == nil || r.Machine.Sharing != 3 || r.Partitions[0].Counters != nil {
			t.Errorf("got %+v", r)
		}
	})
}

// What the kernel has no room for fails not, and is not late: it is not to be merged.
func TestReportKeptOut(t *testing.T) {
	on(t, oneSpace, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		if err := b.Add(b.Context(), b.container("c", "own-2", 12)); !errors.Is(err, kernel.ErrKeptOut) {
			t.Fatal(err)
		}
		b.Start("a")
		b.Start("c")
		time.Sleep(time.Hour)
		for i, p := range b.Report().Partitions {
			if kept := i == 1; p.Retry != 0 || p.Next.IsZero() != kept || (p.Containers[0].Cause == CauseKeptOut) != kept {
				t.Errorf("%s has %+v", p.Name, p)
			}
		}
		// One that is refused for another reason does.
		b.failWith(func(call string) error {
			if call == "add own-2" {
				return unix.ENOMEM
			}
			return nil
		})
		time.Sleep(maxRetry)
		if p := b.Report().Partitions[1]; p.Retry == 0 || !p.Next.IsZero() {
			t.Errorf("%s has %+v", p.Name, p)
		}
	})
}

// What is told of a container only for people keeps it where it is.
func TestBecauseIsForPeople(t *testing.T) {
	with(t, func(b *bench) {
		c := b.container("a", "own-1", 11)
		b.add(c)
		b.Start("a")
		time.Sleep(20 * time.Second)
		synctest.Wait()
		b.took()
		c.Because = "another reason"
		if err := b.Reconcile(nil, []Container{c}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		b.expect()
		if got := b.Status()[0].Containers[0].Because; got != "another reason" {
			t.Errorf("because %q", got)
		}
	})
}

// An engine that has got stuck is not alive, and one that waits for the kernel is.
func TestAlive(t *testing.T) {
	with(t, func(b *bench) {
		asked := func() error {
			ctx, cancel := context.WithTimeout(b.T.Context(), 2*swept)
			defer cancel()
			return b.Alive(ctx)
		}
		goOn := make(chan struct{})
		var once sync.Once
		b.failWith(func(call string) error {
			if strings.HasPrefix(call, "merge") {
				once.Do(func() { <-goOn })
			}
			return nil
		})
		b.add(b.container("a", "own-1", 11))
		b.Start("a")
		time.Sleep(2 * time.Second)
		if err := asked(); err != nil {
			t.Errorf("while a merge hangs: %v", err)
		}
		close(goOn)

		// The sweep does not come back.
		stuck := make(chan struct{})
		b.failWith(func(call string) error {
			if call == "exists" {
				<-stuck
			}
			return nil
		})
		b.add(b.container("b", "own-1", 12))
		time.Sleep(2 * swept)
		if err := asked(); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("while the engine hangs: %v", err)
		}
		close(stuck)
		if err := asked(); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	})
}

// A failure that goes on is a line an hour.
func TestRepeatedFailure(t *testing.T) {
	with(t, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		b.failWith(func(call string) error {
			if strings.HasPrefix(call, "merge") {
				return unix.EIO
			}
			return nil
		})
		b.Start("a")
		time.Sleep(150 * time.Minute)
		synctest.Wait()
		lines := 0
		for _, entry := range b.logged.AllEntries() {
			if entry.Message == "container is not merged" {
				lines++
			}
		}
		if tried := b.Report().Work.Errors["EIO"]; lines != 3 || tried < 10 {
			t.Errorf("%d lines for %d failures", lines, tried)
		}
	})
}
