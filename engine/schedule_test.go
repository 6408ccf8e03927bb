package engine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// pause is how long it is from one call to the kernel to the next.
func (b *bench) pause() time.Duration {
	b.Helper()
	synctest.Wait()
	b.took()
	began := time.Now()
	for range 1000 {
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(b.took()) > 0 {
			return time.Since(began)
		}
	}
	b.Fatal("nothing is asked of the kernel any more")
	return 0
}

func TestBackoff(t *testing.T) {
	with(t, func(b *bench) {
		b.configure(func(s *Settings) { s.StartDelays, s.MaxInterval = nil, 35*time.Minute })
		b.add(b.container("a", "own-1", 11))
		b.Start("a")
		// The first finds little, as do those after it.
		for i, want := range []time.Duration{10, 20, 35, 35} {
			if got := b.pause(); got != want*time.Minute {
				t.Errorf("pause %d is %v, want %d min", i, got, want)
			}
		}
		// One that saves much comes back.
		b.set(func(m *machine) { m.saved = 2 << 20 })
		for i, want := range []time.Duration{35, 10, 10} {
			if got := b.pause(); got != want*time.Minute {
				t.Errorf("then pause %d is %v, want %d min", i, got, want)
			}
		}
		// So does one that has a new container.
		b.set(func(m *machine) { m.saved = 0 })
		b.pause()
		b.add(b.container("b", "own-1", 12))
		b.Start("b")
		if got := b.pause(); got != 10*time.Minute {
			t.Errorf("after a start the pause is %v", got)
		}
	})
}

// The interval is not the same for all, so that they do not all come at once.
func TestJitter(t *testing.T) {
	log, _ := logtest.NewNullLogger()
	e := New(Options{Kernel: newMachine(), Settings: settings, Log: log})
	p := e.partition("own-1")
	seen := map[time.Duration]bool{}
	for range 100 {
		d := p.pause()
		if d < settings.Interval || d > settings.Interval*11/10 {
			t.Fatalf("pause is %v", d)
		}
		seen[d] = true
	}
	if len(seen) < 50 {
		t.Errorf("100 pauses are %d different ones", len(seen))
	}
}

func TestQuietProcessesArePassedOver(t *testing.T) {
	with(t, func(b *bench) {
		b.configure(func(s *Settings) { s.StartDelays = nil })
		b.add(b.container("a", "own-1", 11))
		b.machine.containers["/a"] = []int{11, 12}
		b.machine.quiet[11] = true
		b.Start("a")
		time.Sleep(10 * time.Minute)
		b.expect("add own-1", "merge own-1 11 1000-5000", "merge own-1 12 1000-5000")
		for range fullEvery - 1 {
			time.Sleep(10 * time.Minute)
			b.expect("merge own-1 12 1000-5000")
		}
		// Once in a while nobody is.
		time.Sleep(10 * time.Minute)
		b.expect("merge own-1 11 1000-5000", "merge own-1 12 1000-5000")
		// Nor when asked for.
		if err := b.Engine.Merge("own-1"); err != nil {
			t.Error(err)
		}
		b.expect("merge own-1 11 1000-5000", "merge own-1 12 1000-5000")
		if c := b.Status()[0].Containers[0]; c.Result.Offered != 2*0x4000 || c.Result.Processes != 2 {
			t.Errorf("result is %+v", c.Result)
		}
		// A container of which all are quiet is not even looked at closely.
		b.set(func(m *machine) { m.quiet[12] = true })
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		b.took()
		b.logged.Reset()
		b.failWith(func(call string) error {
			if call != "open" && call != "activity" {
				t.Errorf("asked for %s", call)
			}
			return nil
		})
		time.Sleep(10 * time.Minute)
		b.expect()
		b.expectLog()
		if c := b.Status()[0].Containers[0]; time.Since(c.Result.At) > 10*time.Minute || c.Result.Processes != 2 {
			t.Errorf("result is %+v", c.Result)
		}
		b.failWith(nil)
		if err := b.Engine.Merge("own-2"); !errors.Is(err, kernel.ErrNoPartition) {
			t.Errorf("merge of nothing: %v", err)
		}
	})
}

// By soft-dirty bits, only what was written to is offered, and each look begins anew.
func TestDirty(t *testing.T) {
	with(t, func(b *bench) {
		b.configure(func(s *Settings) { s.StartDelays, s.Dirty, s.Zero = nil, true, true })
		b.add(b.container("a", "own-1", 11))
		b.Start("a")
		time.Sleep(25 * time.Minute)
		synctest.Wait()
		o := b.options
		if len(o) != 2 || o[0].Dirty || !o[1].Dirty || !o[0].Zero || o[0].Exact {
			t.Errorf("options are %+v", o)
		}
		if !slices.Equal(b.cleared, []int{11, 11}) {
			t.Errorf("cleared were %d", b.cleared)
		}
	})
}

// Those that have saved most lately come forward when the machine is short of memory.
func TestPressure(t *testing.T) {
	with(t, func(b *bench) {
		b.configure(func(s *Settings) { s.Pressure, s.Budget.Workers = PressureNode, 1 })
		b.set(func(m *machine) { m.saved = 2 << 20 })
		b.add(b.container("a", "own-rich", 11))
		b.Start("a")
		time.Sleep(time.Minute)
		synctest.Wait()
		b.set(func(m *machine) { m.saved = 0 })
		b.add(b.container("b", "own-poor", 12))
		b.Start("b")
		time.Sleep(time.Minute)
		synctest.Wait()
		b.took()
		b.scarce[""]()
		b.expect("merge own-rich 11 1000-5000")
		b.scarce[""]() // again too soon
		b.expect()
		time.Sleep(relief)
		b.scarce[""]()
		synctest.Wait()
		if got := b.took(); len(got) != 1 {
			t.Errorf("calls are %v, want one", got)
		}
	})
}

func TestPressureOfAPod(t *testing.T) {
	with(t, func(b *bench) {
		b.configure(func(s *Settings) { s.Pressure, s.StartDelays = PressurePod, nil })
		b.add(b.container("a", "own-1", 11))
		b.add(b.container("b", "own-2", 12))
		b.Start("a")
		b.Start("b")
		synctest.Wait()
		b.took()
		b.scarce["/b"]()
		b.expect("merge own-2 12 1000-5000")
		b.scarce["/b"]()
		b.scarce[""]() // the machine's is of no interest
		b.expect()
	})
}

// Containers that run are watched from when that is wanted, and no longer.
func TestPressureChanges(t *testing.T) {
	with(t, func(b *bench) {
		b.configure(func(s *Settings) { s.Pressure, s.StartDelays = PressureNode, nil })
		b.add(b.container("a", "own-1", 11))
		b.Start("a")
		synctest.Wait()
		b.took()
		if b.scarce["/a"] != nil {
			t.Error("the pod is watched")
		}
		for range 2 {
			b.configure(func(s *Settings) { s.Pressure, s.StartDelays = PressurePod, nil })
			synctest.Wait()
		}
		b.scarce["/a"]()
		b.expect("merge own-1 11 1000-5000")
		b.configure(func(s *Settings) { s.Pressure, s.StartDelays = PressureOff, nil })
		time.Sleep(relief)
		b.scarce["/a"]()
		b.expect()
	})
}

// Where nobody tells of pressure, that is said once, and all else works.
func TestPressureIsNotTold(t *testing.T) {
	const pod = "merges do not come forward when the pod's memory is short: pressure: pod needs cgroup v2 with pressure stall information"
	with(t, func(b *bench) {
		b.failWith(func(call string) error {
			if call == "pressed" {
				return fmt.Errorf("memory.pressure: %w", fs.ErrNotExist)
			}
			return nil
		})
		b.configure(func(s *Settings) { s.Pressure, s.StartDelays = PressurePod, nil })
		for i, id := range []string{"a", "b", "c"} {
			b.add(b.container(id, "own-1", 11+i))
		}
		b.set(func(m *machine) { delete(m.containers, "/c") })
		b.Start("c") // has ended already, which is no reason
		synctest.Wait()
		b.expectLog()
		b.Start("a")
		b.Start("b")
		b.expectLog(pod)
		if err := b.Engine.Merge("own-1"); err != nil {
			t.Error(err)
		}
		b.expect("add own-1", "merge own-1 11 1000-5000", "merge own-1 12 1000-5000")
	})
}

// However often merges are asked for, and containers start, what is planned is bounded.
func TestPlannedIsBounded(t *testing.T) {
	with(t, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		b.add(b.container("b", "own-1", 12))
		goOn := make(chan struct{})
		b.failWith(func(call string) error {
			if strings.HasPrefix(call, "merge") {
				<-goOn
			}
			return nil
		})
		b.Start("a")
		synctest.Wait()
		for i := range 3000 {
			if err := b.Engine.Merge(""); err != nil {
				t.Fatal(err)
			}
			b.Stop("b")
			b.add(b.container("b", "own-1", 12))
			b.Start("b")
			time.Sleep(time.Millisecond * time.Duration(i%3))
		}
		b.Engine.mu.Lock()
		planned := len(b.Engine.partitions["own-1"].due)
		b.Engine.mu.Unlock()
		// One that is late, and those of both delays after each start in three seconds.
		if most := 1 + 2*int(3*time.Second/together+1); planned > most {
			t.Errorf("%d merges are planned, want at most %d", planned, most)
		}
		b.failWith(nil)
		close(goOn)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		b.Engine.mu.Lock()
		defer b.Engine.mu.Unlock()
		if planned := len(b.Engine.partitions["own-1"].due); planned > 0 {
			t.Errorf("%d merges are still planned", planned)
		}
	})
}

// A container that leaves is waited for no longer than its process takes to hear of it,
// also while its memory is looked for.
func TestStopEndsALook(t *testing.T) {
	with(t, func(b *bench) {
		b.set(func(m *machine) { m.endless = true })
		b.add(b.container("a", "own-1", 11))
		b.Start("a")
		time.Sleep(time.Minute)
		b.expect("add own-1")
		b.Stop("a")
		b.expect("remove own-1")
		b.expectLog()
	})
}

func TestBinding(t *testing.T) {
	on(t, kernel.Features{Bind: true}, func(b *bench) {
		if !b.OptsIn() {
			t.Error("needs a wrapper")
		}
		b.add(b.container("a", "own-1", 11))
		b.machine.dead[13] = false
		b.add(b.container("b", "own-1", 12))
		b.Start("a")
		time.Sleep(time.Second)
		b.expect("add own-1", "bind own-1 11", "merge own-1 11 1000-5000")
		b.Stop("a")
		b.expect("unbind own-1 11")
		// A process that somebody else has bound.
		b.set(func(m *machine) { m.bound[12] = "own-other" })
		b.Start("b")
		time.Sleep(time.Second)
		b.expect("bind own-1 12")
		b.expectLog("a: merged", "b: container is not merged")
		if c := b.Status()[0].Containers[0]; c.Reason != kernel.ErrBusy.Error() {
			t.Errorf("status is %+v", c)
		}
	})
}

// What an engine before has bound by another policy is let go where it was, also if others
// are merged there on.
func TestBoundByAnotherPolicy(t *testing.T) {
	for name, tc := range map[string]struct {
		optedIn bool
		asked   string // what is refused at first
	}{"bound": {false, "bind own-1 11"}, "merged": {true, "merge own-1 11 1000-5000"}} {
		t.Run(name, func(t *testing.T) {
			on(t, kernel.Features{Bind: true}, func(b *bench) {
				b.configure(func(s *Settings) { s.OptedIn, s.StartDelays = tc.optedIn, []time.Duration{0} })
				a, c := b.container("a", "own-1", 11), b.container("c", "own-2", 12)
				b.set(func(m *machine) {
					for _, name := range []string{"own-2", "own-3", "theirs"} {
						m.partitions[name] = true
					}
					m.bound[11], m.bound[12] = "own-2", "own-2"
				})
				b.failWith(func(call string) error {
					b.machine.mu.Lock()
					defer b.machine.mu.Unlock()
					if call == tc.asked && b.bound[11] == "own-2" {
						return kernel.ErrBusy
					}
					return nil
				})
				if err := b.Reconcile(nil, []Container{a, c}); err != nil {
					t.Fatal(err)
				}
				time.Sleep(2 * afterMove)
				synctest.Wait()
				calls := b.took()
				let := slices.Index(calls, "unbind own-2 11")
				if let < 0 || !slices.Contains(calls[let:], "merge own-1 11 1000-5000") ||
					slices.Contains(calls, "unbind own-2 12") || slices.Contains(calls, "unbind theirs 11") {
					t.Errorf("calls are %q", calls)
				}
				for _, c := range b.Status() {
					if c.Containers[0].Reason != "" {
						t.Errorf("%s: %s", c.Name, c.Containers[0].Reason)
					}
				}
			})
		})
	}
}

// One that is still being let go is tried again soon.
func TestBoundWhereAPartitionGoes(t *testing.T) {
	on(t, kernel.Features{Bind: true}, func(b *bench) {
		b.configure(func(s *Settings) { s.StartDelays = []time.Duration{0} })
		b.set(func(m *machine) { m.partitions["own-old"], m.bound[11] = true, "own-old" })
		goOn := make(chan struct{})
		b.failWith(func(call string) error {
			switch call {
			case "remove own-old":
				<-goOn
				b.set(func(m *machine) { delete(m.bound, 11) })
			case "unbind own-old 11":
				return kernel.ErrBusy
			}
			return nil
		})
		if err := b.Reconcile(nil, []Container{b.container("a", "own-1", 11)}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if calls := b.took(); slices.ContainsFunc(calls, func(c string) bool { return strings.HasPrefix(c, "merge") }) {
			t.Errorf("calls are %q", calls)
		}
		close(goOn)
		time.Sleep(afterMove)
		synctest.Wait()
		if calls := b.took(); !slices.Contains(calls, "merge own-1 11 1000-5000") {
			t.Errorf("calls are %q", calls)
		}
		b.expectLog("a: merged")
	})
}

// The engine opts nobody in if it is not to, and lets go those that the kernel has
// bound at their merge.
func TestOptedIn(t *testing.T) {
	on(t, kernel.Features{Bind: true}, func(b *bench) {
		s := b.config()
		s.OptedIn = true
		b.Configure(s)
		b.add(b.container("a", "own-1", 11))
		b.add(b.container("b", "own-1", 12))
		b.Start("a")
		time.Sleep(time.Second)
		b.expect("add own-1", "merge own-1 11 1000-5000")
		b.Stop("a")
		b.expect("unbind own-1 11")
	})
}

// A kernel that binds says whether a stranger was taken in.
func TestNumberIsUsedAgainWhereTheKernelBinds(t *testing.T) {
	for stranger, spoilt := range map[bool]bool{false: false, true: true} {
		t.Run(fmt.Sprintf("taken in %v", stranger), func(t *testing.T) {
			on(t, kernel.Features{Bind: true}, func(b *bench) {
				b.add(b.container("a", "own-1", 11))
				b.set(func(m *machine) { m.dead[11], m.foreign[11] = true, true })
				b.failWith(func(call string) error {
					if strings.HasPrefix(call, "merge") && !stranger {
						// What has the number then is bound to nothing.
						b.set(func(m *machine) { delete(m.bound, 11) })
					}
					return nil
				})
				b.Start("a")
				time.Sleep(time.Second)
				want := []string{"add own-1", "bind own-1 11", "merge own-1 11 1000-5000", "unbind own-1 11"}
				b.expect(want...)
				b.set(func(m *machine) { m.containers["/a"] = []int{12} })
				time.Sleep(2 * time.Second)
				synctest.Wait()
				if got := b.took(); slices.Contains(got, "remove own-1") != spoilt {
					t.Errorf("calls are %v", got)
				}
			})
		})
	}
}

// If the number went to another process of the container, there is nothing to mend.
func TestNumberIsUsedAgainInTheContainer(t *testing.T) {
	with(t, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		b.set(func(m *machine) { m.dead[11] = true })
		b.failWith(func(call string) error {
			if strings.HasPrefix(call, "merge") {
				b.set(func(m *machine) { m.again = map[int]bool{11: true} })
			}
			return nil
		})
		b.Start("a")
		time.Sleep(time.Second)
		b.expect("add own-1", "merge own-1 11 1000-5000")
	})
}

// What a process forks while its container leaves is bound, and merged, as it was: it is
// let go, too.
func TestChildrenLeave(t *testing.T) {
	on(t, kernel.Features{Bind: true}, func(b *bench) {
		a, c := b.container("a", "own-1", 11), b.container("c", "own-1", 12)
		for _, one := range []Container{a, c} {
			b.add(one)
			b.Start(one.ID)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		b.took()
		b.failWith(func(call string) error {
			if call == "unbind own-1 11" {
				b.set(func(m *machine) { m.containers["/a"], m.bound[13] = []int{11, 13}, "own-1" })
			}
			return nil
		})
		a.Partition = ""
		b.add(a)
		b.expect("unbind own-1 11", "unbind own-1 13")
	})
}

// A container that moves is not merged before its memory is out of where it was.
func TestMoveWaitsForTheOldPartition(t *testing.T) {
	with(t, func(b *bench) {
		a := b.container("a", "own-old", 11)
		b.add(a)
		b.Start("a")
		time.Sleep(time.Minute)
		synctest.Wait()
		b.took()
		b.failWith(func(call string) error {
			if strings.HasPrefix(call, "remove") {
				return errors.New("no memory")
			}
			return nil
		})
		a.Partition = "own-new"
		if err := b.Reconcile(nil, []Container{a}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if got := b.took(); slices.ContainsFunc(got, func(c string) bool { return strings.HasPrefix(c, "merge") }) {
			t.Errorf("calls are %v", got)
		}
		b.failWith(nil)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if got := b.took(); !slices.Contains(got, "merge own-new 11 1000-5000") {
			t.Errorf("calls are %v", got)
		}
	})
}

// That is so however often it moves meanwhile, and if it was told to have ended between.
func TestMovesWaitForAllOldPartitions(t *testing.T) {
	with(t, func(b *bench) {
		a, c := b.container("a", "own-1", 11), b.container("c", "own-1", 12)
		for _, one := range []Container{a, c} {
			b.add(one)
			b.Start(one.ID)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		b.took()
		// The first partition's worker comes to nothing else.
		goOn := make(chan struct{})
		b.failWith(func(call string) error {
			if strings.HasPrefix(call, "merge own-1 12") {
				<-goOn
			}
			return nil
		})
		if err := b.Engine.Merge("own-1"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for _, partition := range []string{"own-2", "own-3"} {
			a.Partition = partition
			if err := b.Reconcile(nil, []Container{a, c}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
		}
		b.Stop("a")
		a.Partition = "own-4"
		b.add(a)
		b.Start("a")
		time.Sleep(time.Minute)
		synctest.Wait()
		for _, call := range b.took() {
			if strings.HasPrefix(call, "merge") && strings.Contains(call, " 11 ") && !strings.HasPrefix(call, "merge own-1") {
				t.Errorf("%s, while it is merged in own-1", call)
			}
		}
		close(goOn)
		time.Sleep(time.Minute)
		synctest.Wait()
		calls := b.took()
		if left, merged := slices.Index(calls, "unmerge own-1 11"), slices.Index(calls, "merge own-4 11 1000-5000"); left < 0 || merged < left {
			t.Errorf("calls are %q", calls)
		}
		b.Engine.mu.Lock()
		defer b.Engine.mu.Unlock()
		if len(b.Engine.departed) > 0 {
			t.Errorf("still waited for are %v", b.Engine.departed)
		}
	})
}

// Where there is one merge space, a container that is to be merged in another way, and
// stays in its partition, is not waited for until it ends.
func TestChangesInOneSpace(t *testing.T) {
	on(t, oneSpace, func(b *bench) {
		a := b.container("a", "own-1", 11)
		b.add(a)
		b.Start("a")
		time.Sleep(time.Minute)
		synctest.Wait()
		b.took()
		a.Interval = time.Minute
		if err := b.Reconcile(nil, []Container{a}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if calls := b.took(); !slices.Contains(calls, "settle own-1") {
			t.Errorf("calls are %q", calls)
		}
	})
}

// Where a partition of another engine stays, what is merged in it may be another
// partition's next: that is unmerged first.
func TestUnmergedAfterRestart(t *testing.T) {
	wide := kernel.Features{WideRemoval: true, SharedCounters: true, PageByPage: true}
	t.Run("partitions are not listed", func(t *testing.T) {
		on(t, wide, func(b *bench) {
			b.failWith(func(call string) error {
				if call == "list" {
					return errors.New("no memory")
				}
				return nil
			})
			if err := b.Reconcile(nil, []Container{b.container("a", "own-1", 11)}); err == nil {
				t.Error("no error")
			}
			time.Sleep(time.Second)
			b.expect("add own-1", "unmerge own-1 11", "merge own-1 11 1000-5000")
		})
	})
	on(t, wide, func(b *bench) {
		b.machine.partitions["own-old"] = true
		a := b.container("a", "own-1", 11)
		if err := b.Reconcile(nil, []Container{a}); err != nil {
			t.Fatal(err)
		}
		b.failWith(func(call string) error {
			if call == "unmerge own-1 11" {
				return errors.New("no memory")
			}
			return nil
		})
		time.Sleep(time.Second)
		b.expect("add own-1", "unmerge own-1 11")
		b.failWith(nil)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if calls := b.took(); len(calls) < 2 || calls[0] != "unmerge own-1 11" || calls[1] != "merge own-1 11 1000-5000" ||
			slices.Contains(calls[1:], "unmerge own-1 11") {
			t.Errorf("calls are %v", calls)
		}
	})
}

// On a kernel whose removal of one partition unmerges others, none is removed while
// another is in use.
func TestWideRemoval(t *testing.T) {
	on(t, kernel.Features{WideRemoval: true, SharedCounters: true, PageByPage: true}, func(b *bench) {
		b.machine.partitions["own-orphan"] = true
		a, c := b.container("a", "own-1", 11), b.container("c", "own-2", 12)
		if err := b.Reconcile(nil, []Container{a, c}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		got := b.took()
		slices.Sort(got)
		if want := []string{
			"add own-1", "add own-2", "merge own-1 11 1000-5000", "merge own-2 12 1000-5000", "unmerge own-1 11", "unmerge own-2 12",
		}; !slices.Equal(got, want) {
			t.Errorf("calls are %v, want %v", got, want)
		}
		if o := b.options[0]; !o.Exact {
			t.Errorf("options are %+v", o)
		}
		b.Stop("a")
		b.expect("unmerge own-1 11")
		b.Stop("c")
		synctest.Wait()
		got = b.took()
		slices.Sort(got)
		if want := []string{"remove own-1", "remove own-2", "remove own-orphan"}; !slices.Equal(got, want) {
			t.Errorf("calls are %v, want %v", got, want)
		}
		for _, e := range b.logged.AllEntries() {
			if _, known := e.Data["saved_bytes"]; known {
				t.Errorf("savings are told by counters of the machine: %v", e.Data)
			}
		}
	})
}

// But not beside a partition of somebody else.
func TestWideRemovalBesideOthers(t *testing.T) {
	on(t, kernel.Features{WideRemoval: true}, func(b *bench) {
		b.machine.partitions["theirs"] = true
		b.add(b.container("a", "own-1", 11))
		b.Stop("a")
		b.expect("add own-1", "unmerge own-1 11")
		b.expectLog("partition stays until no other is in use: this kernel would unmerge all of them with it")
		b.set(func(m *machine) { delete(m.partitions, "theirs") })
		time.Sleep(maxRetry)
		b.expect("remove own-1")
	})
}

var oneSpace = kernel.Features{OneSpace: true, WideRemoval: true, SharedCounters: true}

func TestOneSpace(t *testing.T) {
	on(t, oneSpace, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		if err := b.Add(b.Context(), b.container("c", "own-2", 12)); !errors.Is(err, kernel.ErrKeptOut) {
			t.Errorf("kept out: %v", err)
		}
		b.set(func(m *machine) { m.mergeableAll, m.optedOut[12] = []int{11, 99}, true })
		b.Start("a")
		b.Start("c")
		b.took()
		time.Sleep(time.Second)
		synctest.Wait()
		calls := slices.DeleteFunc(b.took(), func(c string) bool { return c == "add own-2" })
		if want := []string{"merge own-1 11 1000-5000", "settle own-1"}; !slices.Equal(calls, want) {
			t.Errorf("calls are %v, want %v", calls, want)
		}
		b.expectLog("processes outside of containers are mergeable, and share the partition's merge space", "a: merged")
		for _, p := range b.Status() {
			if kept := p.Name == "own-2"; strings.Contains(p.Reason, kernel.ErrKeptOut.Error()) != kept {
				t.Errorf("status is %+v", p)
			}
		}

		// The merge space goes on when the last process has ended that was mergeable.
		b.Stop("a")
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if calls := b.took(); slices.Contains(calls, "remove own-1") {
			t.Errorf("calls are %v", calls)
		}
		b.set(func(m *machine) { delete(m.containers, "/a"); m.mergeableAll = nil })
		time.Sleep(maxRetry)
		synctest.Wait()
		if calls := b.took(); !slices.Contains(calls, "remove own-1") || slices.Contains(calls, "add own-2") {
			t.Errorf("calls are %v", calls)
		}
		b.expectLog("partition is not removed yet")
		// It is not for those whose memory was not opted in, as it was not theirs then.
		if err := b.Add(b.Context(), b.container("d", "own-3", 13)); err != nil {
			t.Error(err)
		}
	})
}

// A container that makes itself mergeable is merged with nobody: neither before nor
// in a merge.
func TestIntruder(t *testing.T) {
	on(t, oneSpace, func(b *bench) {
		b.failWith(func(call string) error {
			switch call {
			case "add own-2":
				return kernel.ErrKeptOut
			case "settle own-1":
				b.set(func(m *machine) { m.mergeableAll = append(m.mergeableAll, 12) })
			}
			return nil
		})
		b.add(b.container("a", "own-1", 11))
		b.Add(b.Context(), b.container("c", "own-2", 12))
		b.set(func(m *machine) { m.mergeableAll = []int{11} })
		b.Start("a")
		time.Sleep(time.Second)
		synctest.Wait()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		calls := slices.DeleteFunc(b.took(), func(c string) bool { return c == "add own-2" })
		want := []string{"add own-1", "merge own-1 11 1000-5000", "settle own-1", "remove own-1", "add own-1"}
		if !slices.Equal(calls, want) {
			t.Errorf("calls are %v, want %v", calls, want)
		}
		b.expectLog("a: container is not merged")
		time.Sleep(time.Hour)
		synctest.Wait()
		if calls := b.took(); slices.Contains(calls, "settle own-1") {
			t.Errorf("calls are %v", calls)
		}
	})
}

// Nor is it merged with a container that nobody knows here, as one of another runtime.
func TestStrangeContainer(t *testing.T) {
	on(t, oneSpace, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		b.set(func(m *machine) { m.mergeableAll, m.inContainers = []int{11, 99}, map[int]bool{99: true} })
		b.Start("a")
		time.Sleep(time.Minute)
		synctest.Wait()
		if calls := b.took(); slices.Contains(calls, "settle own-1") {
			t.Errorf("calls are %v", calls)
		}
		b.expectLog("a: container is not merged")
		// Status says so as long as it is so.
		if c := b.Status()[0].Containers[0]; c.Reason == "" {
			t.Error("status has no reason")
		}
		b.set(func(m *machine) { m.mergeableAll = []int{11} })
		time.Sleep(time.Hour)
		synctest.Wait()
		if calls := b.took(); !slices.Contains(calls, "settle own-1") {
			t.Errorf("calls are %v", calls)
		}
		if c := b.Status()[0].Containers[0]; c.Reason != "" {
			t.Errorf("still: %s", c.Reason)
		}
	})
}

// After a restart the partition has the merge space again that had it.
func TestMergeableFirst(t *testing.T) {
	on(t, oneSpace, func(b *bench) {
		a, c := b.container("a", "own-1", 11), b.container("c", "own-2", 12)
		b.set(func(m *machine) { m.optedOut[11] = true })
		b.failWith(func(call string) error {
			if call == "add own-1" && b.has("own-2") {
				return kernel.ErrKeptOut
			}
			return nil
		})
		if err := b.Reconcile(nil, []Container{a, c}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if calls := b.took(); len(calls) == 0 || calls[0] != "add own-2" {
			t.Errorf("calls are %v", calls)
		}
	})
}

func (b *bench) has(partition string) bool {
	b.machine.mu.Lock()
	defer b.machine.mu.Unlock()
	return b.machine.partitions[partition]
}

func TestLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	first, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := "lock " + dir + "/lock: another engine runs on this machine: stop it first"
	if _, err := Lock(dir); !errors.Is(err, ErrLocked) || err.Error() != want {
		t.Errorf("second: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(filepath.Join(dir, "file")); err == nil {
		t.Error("locked below a file")
	}
}
