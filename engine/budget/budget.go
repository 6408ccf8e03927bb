// Package budget keeps what merging costs within a share of a CPU, in total and for
// each partition, and gives partitions their turns.
//
// A merge is done by the thread that asks for it, so that the thread's CPU time is
// what the merge cost. Work is done in short turns: as many at a time as there are
// workers, each on a thread that does nothing else meanwhile, in the order in which
// they were asked for. A partition asks for one turn after the other, and so the
// partitions take turns, however much each has to do.
package budget

import (
	"context"
	"math"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Limits are how much may be spent.
type Limits struct {
	// Total and Partition are the shares of one CPU that all partitions together, and
	// each, may take in any time of length Window: 0.05 is 5 %, and 0 is no limit. A
	// turn is begun while there is something left, so that the last one may go beyond
	// by its own length. What it went beyond is taken from the time after it.
	Total     float64 `json:"total"`
	Partition float64 `json:"partition"`
	// Window is how long it takes until what was spent is there again.
	Window time.Duration `json:"window_ns"`
	// Workers is how many turns there are at a time, 1 if it is 0.
	Workers int `json:"workers"`
}

// Budget is what is left to spend. Its methods may be called concurrently.
type Budget struct {
	cpu func() time.Duration // of the calling thread

	mu         sync.Mutex // protects what follows
	limits     Limits
	total      window
	partitions map[string]*window
	running    int
	waiting    []*turn     // in the order in which they came
	timer      *time.Timer // grants when time gives the budget back
}

// turn is one that is waited for.
type turn struct {
	partition string
	granted   chan struct{} // closed when it has come
}

// New makes a budget of which nothing is spent.
func New(l Limits) *Budget {
	return &Budget{cpu: threadCPU, limits: l, partitions: map[string]*window{}}
}

// SetLimits changes the limits. What was spent stays spent.
func (b *Budget) SetLimits(l Limits) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.limits = l
	b.grant()
}

// Do waits for a turn for the partition, does the work, and counts what it cost:
// the CPU time of the thread, and what the work says that other threads spent for it.
// It returns the work's error, or that of ctx if that ended before.
func (b *Budget) Do(ctx context.Context, partition string, work func() (elsewhere time.Duration, err error)) error {
	if err := b.wait(ctx, partition); err != nil {
		return err
	}
	var spent time.Duration
	defer func() { b.done(partition, spent) }()

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := b.cpu()
	elsewhere, err := work()
	spent = b.cpu() - before + elsewhere
	return err
}

// Usage is what was spent so far, ever, and how many turns are waited for and under way.
type Usage struct {
	CPU              time.Duration
	Waiting, Running int
}

// Usage is that of a partition, or with the empty name that of all, also those that are
// forgotten. How many turns run is told of all together only.
func (b *Budget) Usage(partition string) Usage {
	b.mu.Lock()
	defer b.mu.Unlock()
	if partition == "" {
		return Usage{CPU: b.total.ever, Waiting: len(b.waiting), Running: b.running}
	}
	var u Usage
	if w := b.partitions[partition]; w != nil {
		u.CPU = w.ever
	}
	for _, t := range b.waiting {
		if t.partition == partition {
			u.Waiting++
		}
	}
	return u
}

// Forget gives up what is known of a partition that is gone.
func (b *Budget) Forget(partition string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.partitions, partition)
}

// wait waits for a turn.
func (b *Budget) wait(ctx context.Context, partition string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	t := &turn{partition: partition, granted: make(chan struct{})}
	b.mu.Lock()
	b.waiting = append(b.waiting, t)
	b.grant()
	b.mu.Unlock()
	select {
	case <-t.granted:
		return nil
	case <-ctx.Done():
		return b.giveUp(ctx, t)
	}
}

// giveUp takes a turn back, whether it has come meanwhile or not.
func (b *Budget) giveUp(ctx context.Context, t *turn) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-t.granted:
		b.running--
	default:
		b.waiting = slices.DeleteFunc(b.waiting, func(w *turn) bool { return w == t })
	}
	b.grant()
	return ctx.Err()
}

// done ends a turn.
func (b *Budget) done(partition string, spent time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.running--
	now := time.Now()
	b.total.spend(now, spent, b.limits.Window, b.limits.total())
	b.of(partition).spend(now, spent, b.limits.Window, b.limits.partition())
	b.grant()
}

// grant gives turns to those who waited longest, as long as there is something left
// for them, and sees to it that it is called again when there will be. It comes with each
// turn, and there may be as many who wait as there are partitions. b.mu is held.
func (b *Budget) grant() {
	now := time.Now()
	again := time.Duration(math.MaxInt64)
	if wait := b.total.until(now, b.limits.Window, b.limits.total()); wait > 0 && len(b.waiting) > 0 {
		again = wait
	} else {
		for i := 0; i < len(b.waiting) && b.running < max(1, b.limits.Workers); {
			t := b.waiting[i]
			if wait := b.of(t.partition).until(now, b.limits.Window, b.limits.partition()); wait > 0 {
				again = min(again, wait)
				i++
				continue
			}
			b.waiting = slices.Delete(b.waiting, i, i+1)
			b.running++
			close(t.granted)
		}
	}
	if b.timer != nil {
		b.timer.Stop()
		b.timer = nil
	}
	if again < math.MaxInt64 {
		b.timer = time.AfterFunc(again, func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.grant()
		})
	}
}

// of returns a partition's window. b.mu is held.
func (b *Budget) of(partition string) *window {
	w := b.partitions[partition]
	if w == nil {
		w = &window{}
		b.partitions[partition] = w
	}
	return w
}

func (l Limits) total() time.Duration     { return l.share(l.Total) }
func (l Limits) partition() time.Duration { return l.share(l.Partition) }

func (l Limits) share(of float64) time.Duration {
	if of == 0 || l.Window == 0 {
		return math.MaxInt64
	}
	return time.Duration(of * float64(l.Window))
}

// window is what was spent in the last time of one length.
type window struct {
	spends []spend       // oldest first
	ever   time.Duration // that and all before
}

// spend is CPU time that was spent up to a time.
type spend struct {
	at  time.Time
	cpu time.Duration
}

// grains is how many spends a window holds at most: what was spent close together
// counts as spent at the end.
const grains = 64

// end is when a spend counts no longer: after one window, or as many as it takes to
// come to that much within the limit.
func (s spend) end(length, limit time.Duration) time.Time {
	return s.at.Add(max(length, time.Duration(float64(length)*float64(s.cpu)/float64(limit))))
}

func (w *window) spend(now time.Time, cpu, length, limit time.Duration) {
	w.ever += cpu
	w.spends = slices.DeleteFunc(w.spends, func(s spend) bool { return !now.Before(s.end(length, limit)) })
	if last := len(w.spends) - 1; last >= 0 && !now.After(w.spends[last].at) {
		w.spends[last].cpu += cpu
		return
	}
	w.spends = append(w.spends, spend{at: now.Add(length / grains), cpu: cpu})
}

// spent is what counts now.
func (w *window) spent(now time.Time, length, limit time.Duration) (sum time.Duration) {
	for _, s := range w.spends {
		if now.Before(s.end(length, limit)) {
			sum += s.cpu
		}
	}
	return sum
}

// until is how long it takes until less than limit counts.
func (w *window) until(now time.Time, length, limit time.Duration) time.Duration {
	if w.spent(now, length, limit) < limit {
		return 0
	}
	var ends []time.Time
	for _, s := range w.spends {
		ends = append(ends, s.end(length, limit))
	}
	slices.SortFunc(ends, time.Time.Compare)
	at := now
	for _, end := range ends {
		if w.spent(at, length, limit) < limit {
			break
		}
		if end.After(at) {
			at = end
		}
	}
	return at.Sub(now)
}

// threadCPU is the CPU time of the calling thread (clock_gettime(2)).
func threadCPU() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0 // it cannot fail for one's own thread
	}
	return time.Duration(ts.Nano())
}
