package engine

import (
	"context"
	"errors"
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
	members map[string]*member
	leaving []*member   // were members and may have processes left
	due     []time.Time // when to merge, besides the interval
	last    time.Time   // when the last merge ended, or the first member started
	refused error       // the kernel's answer to the last request for the partition

	// The worker's own.
	exists bool
	spoilt bool // a stranger's page may be in it: it must go
	retry  time.Duration
}

// poke lets the worker look again. Engine.mu is held.
func (p *partition) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
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
		if err := p.engine.kernel.RemovePartition(p.name); err != nil && !errors.Is(err, kernel.ErrNoPartition) {
			return p.failed("partition is not removed yet", err), false
		}
		p.exists, p.spoilt, leaving = false, false, nil
		if p.forget() {
			return 0, true
		}
	}
	for _, m := range leaving {
		p.unmerge(ctx, m)
	}
	if !p.exists {
		err := p.engine.kernel.AddPartition(p.name)
		if errors.Is(err, kernel.ErrPartitionExists) {
			// An engine before this one left it.
			err = nil
		}
		p.answer(err)
		if err != nil {
			return p.failed("partition is not added yet", err), false
		}
		p.exists = true
	}
	p.retry = 0
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

// forget gives up a partition that is removed, unless it is wanted again.
func (p *partition) forget() bool {
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	if len(p.members) > 0 {
		return false
	}
	delete(p.engine.partitions, p.name)
	return true
}

// answer passes on what the kernel said to a request for the partition.
func (p *partition) answer(err error) {
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	p.refused = err
	select {
	case <-p.tried:
	default:
		close(p.tried)
	}
}

// failed logs the first of a row of failures and returns how long to wait.
func (p *partition) failed(msg string, err error) time.Duration {
	if p.retry == 0 {
		p.log.WithError(err).Warn(msg)
	}
	return p.backoff()
}

func (p *partition) backoff() time.Duration {
	p.retry = min(max(2*p.retry, minRetry), maxRetry)
	return p.retry
}

// untilDue is how long it is until the next merge.
func (p *partition) untilDue() time.Duration {
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	if len(p.running()) == 0 {
		return never
	}
	wait := time.Until(p.last.Add(p.engine.interval))
	for _, due := range p.due {
		wait = min(wait, time.Until(due))
	}
	return max(wait, 0)
}

// again makes a merge due at once.
func (p *partition) again() {
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	p.due = append(p.due, time.Now())
}

// running are the members that run, in the order of their start. e.mu is held.
func (p *partition) running() []*member {
	running := slices.DeleteFunc(slices.Collect(maps.Values(p.members)), func(m *member) bool { return m.started.IsZero() })
	slices.SortFunc(running, func(a, b *member) int {
		if order := a.started.Compare(b.started); order != 0 {
			return order
		}
		return strings.Compare(a.ID, b.ID)
	})
	return running
}
