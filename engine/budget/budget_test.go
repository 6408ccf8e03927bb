package budget

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// burn is work that takes CPU time of somebody else's, and as much of the clock.
func burn(d time.Duration) func() (time.Duration, error) {
	return func() (time.Duration, error) {
		time.Sleep(d)
		return d, nil
	}
}

// idleThread takes no time for itself, as the clock of a test stands still.
func idleThread(l Limits) *Budget {
	b := New(l)
	b.cpu = func() time.Duration { return 0 }
	return b
}

func do(t *testing.T, b *Budget, partition string, d time.Duration) {
	t.Helper()
	if err := b.Do(t.Context(), partition, burn(d)); err != nil {
		t.Error(err)
	}
}

// In no time as long as the window more is spent than the share of it, and the
// length of one turn for each worker.
func TestShare(t *testing.T) {
	for _, limits := range []Limits{
		{Total: 0.05, Partition: 0.05, Window: time.Minute, Workers: 1},
		{Total: 0.2, Partition: 0.05, Window: time.Minute, Workers: 4},
		{Total: 0.1, Partition: 0.1, Window: 10 * time.Second, Workers: 2},
	} {
		t.Run(fmt.Sprintf("%+v", limits), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const length = 50 * time.Millisecond
				b := idleThread(limits)
				type turn struct {
					partition string
					end       time.Time
				}
				var (
					mu    sync.Mutex
					turns []turn
					wg    sync.WaitGroup
				)
				ctx, cancel := context.WithTimeout(t.Context(), 5*limits.Window)
				defer cancel()
				for i := range 8 {
					partition := fmt.Sprint(i % 6)
					wg.Go(func() {
						for b.Do(ctx, partition, burn(length)) == nil {
							mu.Lock()
							turns = append(turns, turn{partition, time.Now()})
							mu.Unlock()
						}
					})
				}
				wg.Wait()
				over := length * time.Duration(limits.Workers)
				for i := range turns {
					sum, one := time.Duration(0), map[string]time.Duration{}
					for _, u := range turns[i:] {
						if u.end.Sub(turns[i].end) >= limits.Window {
							break
						}
						sum += length
						one[u.partition] += length
					}
					if most := limits.total() + over; sum > most {
						t.Fatalf("%v spent in %v, want %v at most", sum, limits.Window, most)
					}
					for p, sum := range one {
						if most := limits.partition() + over; sum > most {
							t.Fatalf("partition %s: %v spent in %v, want %v at most", p, sum, limits.Window, most)
						}
					}
				}
				// And the budget is used: nearly all of five windows.
				spent := time.Duration(len(turns)) * length
				if least := min(limits.total(), 6*limits.partition()) * 9 / 2; spent < least {
					t.Errorf("%v spent in 5 windows, want %v at least", spent, least)
				}
				if n := len(b.waiting); n != 0 || b.running != 0 {
					t.Errorf("%d turns wait and %d run", n, b.running)
				}
			})
		})
	}
}

// One that waits for another's turn to end has its own in time, though that turn took
// the last of the budget and nobody asks for another.
func TestWaitsForWorkerThenForBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := idleThread(Limits{Total: 0.1, Partition: 0.1, Window: time.Minute, Workers: 1})
		began := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() { do(t, b, "a", 6*time.Second) })
		synctest.Wait()
		wg.Go(func() {
			do(t, b, "b", time.Second)
			if waited := time.Since(began); waited < time.Minute || waited > 70*time.Second {
				t.Errorf("b was done after %v", waited)
			}
		})
		wg.Wait()
	})
}

// A partition with much to do takes turns with one that has little.
func TestFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := idleThread(Limits{Total: 1, Partition: 1, Window: time.Hour, Workers: 1})
		var mu sync.Mutex
		var order []string
		var wg sync.WaitGroup
		for partition, turns := range map[string]int{"large": 100, "small": 3} {
			wg.Go(func() {
				for range turns {
					do(t, b, partition, time.Second)
					mu.Lock()
					order = append(order, partition)
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		last := 0
		for i, p := range order {
			if p == "small" {
				last = i
			}
		}
		if last > 6 {
			t.Errorf("the small partition's third turn was the %dth", last+1)
		}
	})
}

// One that has spent its own does not keep others.
func TestPartitionsDoNotWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := idleThread(Limits{Total: 1, Partition: 0.01, Window: time.Minute, Workers: 1})
		do(t, b, "a", time.Second) // as much as its share of 100 s
		var wg sync.WaitGroup
		began := time.Now()
		wg.Go(func() {
			do(t, b, "a", 0)
			if waited := time.Since(began); waited < 100*time.Second || waited > 101*time.Second {
				t.Errorf("a waited for %v", waited)
			}
		})
		synctest.Wait()
		do(t, b, "b", 0)
		if waited := time.Since(began); waited != 0 {
			t.Errorf("b waited for %v", waited)
		}
		wg.Wait()
		b.Forget("a")
		if len(b.partitions) != 1 || b.timer != nil {
			t.Errorf("left are %v, %v", b.partitions, b.timer)
		}
	})
}

func TestCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := idleThread(Limits{Total: 1, Partition: 1, Window: time.Minute, Workers: 1})
		release := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			b.Do(t.Context(), "a", func() (time.Duration, error) { <-release; return 0, nil })
		})
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		wg.Go(func() {
			if err := b.Do(ctx, "b", burn(0)); !errors.Is(err, context.Canceled) {
				t.Errorf("waiting: %v", err)
			}
		})
		synctest.Wait()
		cancel()
		synctest.Wait()
		if len(b.waiting) != 0 {
			t.Errorf("%d turns still wait", len(b.waiting))
		}
		close(release)
		wg.Wait()
		if err := b.Do(ctx, "b", burn(0)); !errors.Is(err, context.Canceled) {
			t.Errorf("before: %v", err)
		}
		failed := errors.New("failed")
		if err := b.Do(t.Context(), "b", func() (time.Duration, error) { return 0, failed }); err != failed {
			t.Errorf("the work's error became %v", err)
		}
		do(t, b, "b", 0)
	})
}

// More workers are let in at once when there may be more.
func TestSetLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limits := Limits{Total: 1, Partition: 1, Window: time.Minute, Workers: 1}
		b := idleThread(limits)
		release := make(chan struct{})
		var wg sync.WaitGroup
		var mu sync.Mutex
		var in []string
		for _, p := range []string{"a", "b", "c"} {
			wg.Go(func() {
				b.Do(t.Context(), p, func() (time.Duration, error) {
					mu.Lock()
					in = append(in, p)
					mu.Unlock()
					<-release
					return 0, nil
				})
			})
			synctest.Wait()
		}
		if !slices.Equal(in, []string{"a"}) {
			t.Errorf("%v are in", in)
		}
		limits.Workers = 3
		b.SetLimits(limits)
		synctest.Wait()
		if slices.Sort(in); !slices.Equal(in, []string{"a", "b", "c"}) {
			t.Errorf("%v are in", in)
		}
		close(release)
		wg.Wait()
	})
}

// What is counted is the thread's own time, and of none that runs beside it.
func TestThreadTime(t *testing.T) {
	b := New(Limits{Total: 100, Partition: 100, Window: time.Hour, Workers: 1})
	var over atomic.Bool
	var beside sync.WaitGroup
	beside.Go(func() {
		for !over.Load() {
		}
	})
	var own time.Duration
	err := b.Do(t.Context(), "a", func() (time.Duration, error) {
		began := threadCPU()
		for own < 20*time.Millisecond {
			runtime.Gosched()
			own = threadCPU() - began
		}
		return 5 * time.Millisecond, nil
	})
	over.Store(true)
	beside.Wait()
	if spent := b.total.spent(time.Now(), time.Hour, math.MaxInt64); err != nil || spent < own+5*time.Millisecond || spent > own+15*time.Millisecond {
		t.Errorf("%v counted for %v of its own and 5ms elsewhere, %v", spent, own, err)
	}
}

// What was spent and is waited for is told, and what was spent counts on for all when a
// partition is forgotten.
func TestUsage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := idleThread(Limits{})
		for _, partition := range []string{"a", "b", "b"} {
			go do(t, b, partition, time.Second)
			synctest.Wait()
		}
		for partition, want := range map[string]Usage{"": {0, 2, 1}, "a": {}, "b": {Waiting: 2}, "c": {}} {
			if got := b.Usage(partition); got != want {
				t.Errorf("of %q is %+v, want %+v", partition, got, want)
			}
		}
		time.Sleep(5 * time.Second)
		b.Forget("a")
		for partition, want := range map[string]Usage{"": {CPU: 3 * time.Second}, "a": {}, "b": {CPU: 2 * time.Second}} {
			if got := b.Usage(partition); got != want {
				t.Errorf("in the end %q is %+v, want %+v", partition, got, want)
			}
		}
	})
}
