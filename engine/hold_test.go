package engine

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	logtest "github.com/sirupsen/logrus/hooks/test"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// What is unmerged stays so, whoever joins and however short memory is, until somebody
// asks for a merge.
func TestHold(t *testing.T) {
	with(t, func(b *bench) {
		b.configure(func(s *Settings) { s.Pressure = PressureNode })
		b.add(b.container("a", "own-1", 11))
		b.add(b.container("b", "own-2", 21))
		b.Start("a")
		b.Start("b")
		time.Sleep(20 * time.Second)
		synctest.Wait()
		b.took()

		if err := b.Engine.Unmerge("own-3"); !errors.Is(err, kernel.ErrNoPartition) {
			t.Errorf("unmerging what is not there: %v", err)
		}
		if err := b.Engine.Unmerge("own-1"); err != nil {
			t.Fatal(err)
		}
		b.expect("unmerge own-1 11")
		b.add(b.container("c", "own-1", 12))
		b.Start("c")
		b.scarce[""]()
		time.Sleep(9 * time.Minute)
		for _, call := range b.took() {
			if strings.Contains(call, "own-1") {
				t.Errorf("%s while it is held", call)
			}
		}
		for _, p := range b.Status() {
			want, next := HoldNot, false
			if p.Name == "own-1" {
				want, next = HoldUnmerged, true
			}
			if p.Hold != want || p.Next.IsZero() != next || (p.Containers[0].Cause == CauseHeld) != next {
				t.Errorf("%s has %+v", p.Name, p)
			}
		}

		b.set(func(m *machine) { m.quiet[11], m.quiet[12] = true, true })
		if err := b.Engine.Merge(""); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		calls := b.took()
		for _, want := range []string{"merge own-1 11 1000-5000", "merge own-1 12 1000-5000"} {
			if !slices.Contains(calls, want) {
				t.Errorf("no %s in %q", want, calls)
			}
		}
		if p := b.Status()[0]; p.Hold != HoldNot || p.Containers[0].Reason != "" || p.Next.IsZero() {
			t.Errorf("afterwards %+v", p)
		}
	})
}

// A merge that is under way ends, and the children that its processes have forked
// meanwhile are unmerged, too. What fails is done again.
func TestHoldEndsMerge(t *testing.T) {
	with(t, func(b *bench) {
		merging, goOn := make(chan struct{}), make(chan struct{})
		b.failWith(func(call string) error {
			if strings.HasPrefix(call, "merge own-1 11 1000") {
				close(merging)
				<-goOn
			}
			return nil
		})
		b.set(func(m *machine) { m.ranges = append(m.ranges, kernel.Range{Start: 0x9000, End: 0xa000}) })
		b.add(b.container("a", "own-1", 11))
		b.Start("a")
		<-merging
		if err := b.Engine.Unmerge(""); err != nil {
			t.Fatal(err)
		}
		if p := b.Status()[0]; p.Hold != HoldUnmerging {
			t.Errorf("while it merges the hold is %q", p.Hold)
		}
		failed := false
		b.failWith(func(call string) error {
			if call != "unmerge own-1 11" {
				return nil
			}
			b.set(func(m *machine) { m.containers["/a"] = []int{11, 12} })
			if !failed {
				failed = true
				return unix.ENOMEM
			}
			return nil
		})
		close(goOn)
		synctest.Wait()
		if p := b.Status()[0]; p.Hold != HoldUnmerging || p.Retry != minRetry || p.Work.Errors["ENOMEM"] != 1 {
			t.Errorf("after a failure %+v", p)
		}
		time.Sleep(time.Minute)
		b.expect("add own-1", "merge own-1 11 1000-5000", "unmerge own-1 11", "unmerge own-1 11", "unmerge own-1 12")
		if p := b.Status()[0]; p.Hold != HoldUnmerged || p.Retry != 0 || p.Work.Merges.Count != 0 {
			t.Errorf("in the end %+v", p)
		}
	})
}

// One that the kernel keeps out has nothing to unmerge, and nobody who has asked for a merge
// meanwhile is told that there will be none.
func TestHoldSettles(t *testing.T) {
	on(t, oneSpace, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		if err := b.Add(b.Context(), b.container("c", "own-2", 12)); !errors.Is(err, kernel.ErrKeptOut) {
			t.Fatal(err)
		}
		b.failWith(func(call string) error {
			if call == "unmerge own-1 11" {
				if err := b.Engine.Merge("own-1"); err != nil {
					t.Error(err)
				}
			}
			return nil
		})
		b.Start("a")
		synctest.Wait()
		b.logged.Reset()
		if err := b.Engine.Unmerge(""); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for _, p := range b.Status() {
			if want := map[string]Hold{"own-1": HoldNot, "own-2": HoldUnmerged}[p.Name]; p.Hold != want {
				t.Errorf("%s is held: %q, want %q", p.Name, p.Hold, want)
			}
		}
		for _, line := range b.messages() {
			if strings.Contains(line, "is not merged until") {
				t.Errorf("said %q", line)
			}
		}
	})
}

// Who asks for it leaves no partition of ours, and others' as they are.
func TestRemoveAll(t *testing.T) {
	for name, tc := range map[string]struct {
		features kernel.Features
		want     []string // calls
		failed   bool
	}{
		"series": {kernel.Features{}, []string{"remove own-1"}, false},
		"wide":   {kernel.Features{WideRemoval: true}, []string{"unmerge own-1 11"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log, _ := logtest.NewNullLogger()
				m := newMachine()
				m.features, m.partitions["other"] = tc.features, true
				m.containers["/a"] = []int{11}
				e := New(Options{Kernel: m, Owned: func(name string) bool { return strings.HasPrefix(name, "own-") }, Settings: settings, Log: log})
				e.host = fakeHost{m}
				ctx, cancel := context.WithCancel(t.Context())
				stopped := make(chan struct{})
				go func() {
					defer close(stopped)
					e.Run(ctx)
				}()
				if err := e.Add(ctx, Container{ID: "a", CgroupsPath: "/a", Partition: "own-1"}); err != nil {
					t.Fatal(err)
				}
				e.Start("a")
				synctest.Wait()
				cancel()
				<-stopped
				m.took()
				if err := e.RemoveAll(t.Context()); (err != nil) != tc.failed {
					t.Error(err)
				}
				if got := m.took(); !slices.Equal(got, tc.want) {
					t.Errorf("asked for %q, want %q", got, tc.want)
				}
				if !m.partitions["other"] {
					t.Error("another's partition is gone")
				}
			})
		})
	}
}
