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
	// by its own length.
	Total, Partition float64
	// Window is how long it takes until what was spent is there again.
	Window time.Duration
	// Workers is how many turns there are at a time, 1 if it is 0.
	Workers int
}

// Budget is what is left to spend. Its methods may be called concurrently.
type Budget struct {
	cpu func() time.Duration // of the calling thread

	mu         sync.Mutex // protects what follows
	limits     Limits
	total      window
	partitions map[string]*window
	running    int
	waiting    []*turn // in the order in which they came
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

// Forget gives up what is known of a partition that is gone.
func (b *Budget) Forget(partition string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.partitions, partition)
}

// Spent is what was spent in the last window, in total.
func (b *Budget) Spent() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.total.expire(time.Now(), b.limits.Window)
	return b.total.sum
}

// wait waits for a turn.
func (b *Budget) wait(ctx context.Context, partition string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	t := &turn{partition: partition, granted: make(chan struct{})}
	b.mu.Lock()
	b.waiting = append(b.waiting, t)
	b.mu.Unlock()
	for {
		b.mu.Lock()
		b.grant()
		left := b.left(partition)
		b.mu.Unlock()
		// Others only see to it that turns go on when they end theirs, and not when
		// time alone gives the budget back.
		timer := time.NewTimer(left)
		select {
		case <-t.granted:
			timer.Stop()
			return nil
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return b.giveUp(ctx, t)
		}
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
	b.total.spend(now, spent, b.limits.Window)
	b.of(partition).spend(now, spent, b.limits.Window)
	b.grant()
}

// grant gives turns to those who waited longest, as long as there is something left
// for them. b.mu is held.
func (b *Budget) grant() {
	now := time.Now()
	b.total.expire(now, b.limits.Window)
	b.waiting = slices.DeleteFunc(b.waiting, func(t *turn) bool {
		if b.running >= max(1, b.limits.Workers) || b.total.sum >= b.limits.total() {
			return false
		}
		w := b.of(t.partition)
		if w.expire(now, b.limits.Window); w.sum >= b.limits.partition() {
			return false
		}
		b.running++
		close(t.granted)
		return true
	})
}

// idle is how long a turn is waited for that needs no more than another's end.
const idle = time.Hour

// left is how long it takes until there is something left for a partition. b.mu is
// held.
func (b *Budget) left(partition string) time.Duration {
	now := time.Now()
	wait := max(b.total.until(now, b.limits.Window, b.limits.total()),
		b.of(partition).until(now, b.limits.Window, b.limits.partition()))
	if wait <= 0 {
		return idle
	}
	return wait
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
	if of == 0 {
		return math.MaxInt64
	}
	return time.Duration(of * float64(l.Window))
}

// window is what was spent in the last time of one length.
type window struct {
	sum    time.Duration
	spends []spend // oldest first
}

// spend is CPU time that was spent up to a time.
type spend struct {
	at  time.Time
	cpu time.Duration
}

// grains is how many spends a window holds at most: what was spent close together
// counts as spent at the end.
const grains = 64

func (w *window) spend(now time.Time, cpu, length time.Duration) {
	w.expire(now, length)
	w.sum += cpu
	if last := len(w.spends) - 1; last >= 0 && !now.After(w.spends[last].at) {
		w.spends[last].cpu += cpu
		return
	}
	w.spends = append(w.spends, spend{at: now.Add(length / grains), cpu: cpu})
}

// expire forgets what was spent before the window.
func (w *window) expire(now time.Time, length time.Duration) {
	n := 0
	for n < len(w.spends) && now.Sub(w.spends[n].at) >= length {
		w.sum -= w.spends[n].cpu
		n++
	}
	w.spends = slices.Delete(w.spends, 0, n)
}

// until is how long it takes until less than limit is spent in the window.
func (w *window) until(now time.Time, length, limit time.Duration) time.Duration {
	w.expire(now, length)
	sum := w.sum
	for _, s := range w.spends {
		if sum < limit {
			break
		}
		if sum -= s.cpu; sum < limit {
			return s.at.Add(length).Sub(now)
		}
	}
	return 0
}

// threadCPU is the CPU time of the calling thread (clock_gettime(2)).
func threadCPU() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0 // it cannot fail for one's own thread
	}
	return time.Duration(ts.Nano())
}
