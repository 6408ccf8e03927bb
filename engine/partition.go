package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// After a failure a worker waits for minRetry, and twice as long each time, up to
// maxRetry.
const (
	minRetry = time.Second
	maxRetry = time.Minute
)

// never is longer than any wait.
const never = time.Duration(math.MaxInt64)

// partition is a partition that is there, or should be, or should not be any more.
type partition struct {
	engine *Engine
	name   string
	log    logrus.FieldLogger
	wake   chan struct{}
	// tried is closed when the kernel has answered to the first request for the
	// partition.
	tried chan struct{}

	// Protected by Engine.mu.
	members  map[string]*member
	leaving  []*member   // were members and may have processes left
	due      []time.Time // when to merge, besides next
	next     time.Time   // when to merge by the interval; zero before a member runs
	full     bool        // the next merge is asked for: it passes over nothing and nobody
	poor     int         // how many merges in a row saved little
	expected float64     // bytes that the next merge is likely to save
	relieved time.Time   // when it was last brought forward for its pod
	refused  error       // the kernel's answer to the last request for the partition
	hold     Hold
	last     time.Time     // when a merge last came to its end
	retry    time.Duration // how long it is until a failure is tried again
	did      Work          // but for its CPU, which the budget knows
	// interrupt ends a merge that is under way, which then begins anew if it is due.
	interrupt context.CancelFunc

	// The worker's own.
	exists bool
	spoilt bool // a stranger's page may be in it: it must go
	mixed  bool // its members may have been merged with all that is mergeable
	told   bool // that others share its merge space
	parked bool // it stays for now, as its removal would unmerge others
	said   told
	passes int
	merged uint64 // bytes that its members had merged after the last merge
}

// poke lets the worker look again. Engine.mu is held.
func (p *partition) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// bringForward makes a merge due at once, if there is anything to merge. Engine.mu is
// held.
func (p *partition) bringForward() {
	if p.hold != HoldNot || len(p.running(p.full)) == 0 {
		return
	}
	p.mergeAt(time.Now())
	p.poke()
}

// together is the time within which merges that are planned are one. So there are no
// more of them than there is time to plan for.
const together = 100 * time.Millisecond

// mergeAt plans a merge besides those by the interval. Engine.mu is held.
func (p *partition) mergeAt(t time.Time) {
	now := time.Now()
	if t.After(now) {
		// Not by the time of day, which may be set.
		began := p.engine.began
		t = began.Add((t.Sub(began) + together - 1).Truncate(together))
	}
	if !slices.ContainsFunc(p.due, func(other time.Time) bool {
		return other.Equal(t) || !other.After(now) && !t.After(now)
	}) {
		p.due = append(p.due, t)
	}
}

// pause is the time until the next merge by the interval. Engine.mu is held.
func (p *partition) pause() time.Duration {
	s := &p.engine.settings
	least := never
	for _, m := range p.members {
		if !m.OnDemand {
			least = min(least, cmp.Or(m.Interval, s.Interval))
		}
	}
	if least == never {
		least = s.Interval
	}
	d := least
	for range p.poor {
		if d *= 2; d >= s.MaxInterval {
			d = max(s.MaxInterval, least)
			break
		}
	}
	return d + p.engine.jitter(d)
}

// work is the partition's worker.
func (p *partition) work(ctx context.Context) {
	for ctx.Err() == nil {
		wait, done := p.step(ctx)
		if done {
			return
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-p.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// step brings the partition nearer to what it should be. It returns how long there
// is nothing else to do, or that the partition is done with.
func (p *partition) step(ctx context.Context) (wait time.Duration, done bool) {
	leaving, wanted := p.look()
	if p.spoilt || !wanted {
		if wait, removed := p.remove(ctx, leaving); !removed {
			return wait, false
		}
		if p.forget() {
			return 0, true
		}
		leaving = nil
	}
	if err := p.release(ctx, leaving); err != nil {
		return p.failed("processes that a container left are not unmerged yet", err), false
	}
	if !p.exists && p.engine.features.OneSpace && !p.mayHold() {
		p.answer(errTooLate)
		return p.backoff(), false
	}
	if !p.exists {
		err := p.engine.kernel.AddPartition(p.name)
		if errors.Is(err, kernel.ErrPartitionExists) {
			// An engine before this one left it.
			err = nil
		}
		p.answer(err)
		if errors.Is(err, kernel.ErrKeptOut) {
			return p.backoff(), false
		} else if err != nil {
			return p.failed("partition is not added yet", err), false
		}
		p.exists = true
	}
	if err := p.unmerge(ctx); err != nil {
		return p.failed("containers are not unmerged yet", err), false
	}
	p.recovered()
	if wait := p.untilDue(); wait > 0 {
		return wait, false
	}
	p.merge(ctx)
	if !p.exists || p.spoilt {
		p.again()
		return p.backoff(), false
	}
	return p.untilDue(), false
}

// look takes those who left, and tells whether any member stays.
func (p *partition) look() (leaving []*member, wanted bool) {
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	select {
	case <-p.wake: // for what is seen now
	default:
	}
	leaving, p.leaving = p.leaving, nil
	return leaving, len(p.members) > 0
}

// errStillMergeable is why a merge space is not given to another partition yet.
var errStillMergeable = errors.New("processes of its containers still run, and stay mergeable until they end")

// remove removes the partition, and returns how long to wait before it is tried
// again if it is not removed.
func (p *partition) remove(ctx context.Context, leaving []*member) (wait time.Duration, removed bool) {
	var err error
	if !p.spoilt {
		wide := p.engine.features.WideRemoval
		switch {
		case p.engine.features.OneSpace:
			err = p.stillMergeable(leaving)
		case wide && p.othersInUse():
			return p.park(ctx, leaving), false
		}
	}
	if err == nil {
		if err = p.engine.kernel.RemovePartition(p.name); errors.Is(err, kernel.ErrNoPartition) {
			err = nil
		}
	}
	if err != nil {
		p.putBack(leaving)
		return p.failed("partition is not removed yet", err), false
	}
	p.exists, p.spoilt, p.mixed, p.merged = false, false, false, 0
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	for _, m := range leaving {
		p.engine.parted(m)
	}
	for _, m := range p.members {
		clear(m.seen)
	}
	if p.engine.features.WideRemoval {
		for _, other := range p.engine.partitions {
			// It may have been unmerged too, or may have the merge space now.
			if other != p {
				other.bringForward()
				other.poke()
			}
		}
	}
	return 0, true
}

// park leaves a partition in place whose removal would unmerge others, and sees only
// to what its containers left.
func (p *partition) park(ctx context.Context, leaving []*member) time.Duration {
	if err := p.release(ctx, leaving); err != nil {
		return p.failed("processes that a container left are not unmerged yet", err)
	}
	if !p.parked {
		p.parked = true
		p.log.Info("partition stays until no other is in use: this kernel would unmerge all of them with it")
	}
	return maxRetry
}

// othersInUse reports whether there are other partitions than our own, or other
// containers. Where that is not known, it is assumed.
func (p *partition) othersInUse() bool {
	names, err := p.engine.kernel.Partitions()
	if err != nil {
		return true
	}
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	return len(p.engine.members) > 0 || slices.ContainsFunc(names, func(name string) bool { return !p.engine.owned(name) })
}

// stillMergeable returns an error while containers that left have processes that
// would merge with those of the next partition.
func (p *partition) stillMergeable(leaving []*member) error {
	for _, m := range leaving {
		switch still, err := p.engine.anyMergeable(m.CgroupsPath); {
		case err != nil:
			return err
		case still:
			return errStillMergeable
		}
	}
	return nil
}

// errTooLate is why a partition does not take the merge space that has become free.
var errTooLate = fmt.Errorf("%w: its containers were started while another partition had the merge space, and are not mergeable", kernel.ErrKeptOut)

// mayHold reports whether the partition has use for the merge space: whether a container
// of it can still be opted in, or has been.
func (p *partition) mayHold() bool {
	p.engine.mu.Lock()
	running, all := p.running(true), len(p.members)
	p.engine.mu.Unlock()
	if len(running) < all {
		return true
	}
	return slices.ContainsFunc(running, func(m *member) bool {
		mergeable, err := p.engine.anyMergeable(m.CgroupsPath)
		return err == nil && mergeable
	})
}

// putBack keeps those who left for the next look.
func (p *partition) putBack(leaving []*member) {
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	p.leaving = append(leaving, p.leaving...)
}

// forget gives up a partition that is removed, unless it is wanted again.
func (p *partition) forget() bool {
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	if len(p.members) > 0 {
		return false
	}
	// Those who were members for less than the removal took.
	for _, m := range p.leaving {
		p.engine.parted(m)
	}
	delete(p.engine.partitions, p.name)
	p.engine.budget.Forget(p.name)
	return true
}

// answer passes on what the kernel said to a request for the partition.
func (p *partition) answer(err error) {
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	p.refused = err
	if errors.Is(err, kernel.ErrKeptOut) {
		p.unmerged()
	}
	select {
	case <-p.tried:
	default:
		close(p.tried)
	}
}

// failed counts a failure, logs it if that was not done lately, and returns how long to
// wait.
func (p *partition) failed(msg string, err error) time.Duration {
	p.count(err)
	if p.said.again(msg) {
		p.log.WithError(err).Warn(msg)
	}
	return p.backoff()
}

func (p *partition) backoff() time.Duration {
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	p.retry = min(max(2*p.retry, minRetry), maxRetry)
	return p.retry
}

// recovered ends a row of failures.
func (p *partition) recovered() {
	p.parked = false
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	p.retry = 0
}

// untilDue is how long it is until the next merge.
func (p *partition) untilDue() time.Duration {
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	if p.hold != HoldNot || len(p.running(p.full)) == 0 {
		return never
	}
	wait := time.Until(p.next)
	for _, due := range p.due {
		wait = min(wait, time.Until(due))
	}
	return max(wait, 0)
}

// again makes a merge due at once.
func (p *partition) again() {
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	p.mergeAt(time.Now())
}

// running are the members that run, in the order of their start; those that are
// merged on demand only if that is what is wanted. e.mu is held.
func (p *partition) running(demanded bool) []*member {
	running := slices.DeleteFunc(slices.Collect(maps.Values(p.members)), func(m *member) bool {
		return m.started.IsZero() || m.OnDemand && !demanded
	})
	slices.SortFunc(running, func(a, b *member) int {
		if order := a.started.Compare(b.started); order != 0 {
			return order
		}
		return strings.Compare(a.ID, b.ID)
	})
	return running
}
