package engine

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"slices"
	"time"
)

const (
	// swept is how often containers that were never started are looked at.
	swept = 5 * time.Second
	// unborn is how long a container may be created that has no cgroup yet.
	unborn = 10 * time.Minute
	// relief is the least time between two times that merges are brought forward.
	relief = 30 * time.Second
	// watchAgain is the pause after a watch has failed.
	watchAgain = 10 * time.Second
)

// watch starts to watch a container that runs, if the engine does. e.mu is held.
func (e *Engine) watch(m *member) {
	e.during(m, e.watchMember)
	e.watchPressure(m)
}

// watchPressure starts to watch the pod of a container that runs, if that is wanted and
// not done yet. e.mu is held.
func (e *Engine) watchPressure(m *member) {
	if e.settings.Pressure == PressurePod && !m.watched && e.ctx != nil {
		m.watched = true
		e.during(m, e.watchPod)
	}
}

// during runs a function until it returns, and ends it with the engine, or when the
// container leaves. e.mu is held.
func (e *Engine) during(m *member, do func(ctx context.Context, m *member)) {
	ctx := e.ctx
	if ctx == nil {
		return
	}
	e.workers.Go(func() {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(m.ctx, cancel)()
		do(ctx, m)
	})
}

// watchMember takes a container out when it has no process any more: the runtime does
// not tell when a shim is killed, for one.
func (e *Engine) watchMember(ctx context.Context, m *member) {
	for {
		err := e.host.waitEmpty(ctx, m.CgroupsPath)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			e.gone(m)
			return
		}
		e.mu.Lock()
		m.reason = reason{CauseError, "its processes cannot be watched: " + err.Error()}
		e.mu.Unlock()
		m.log.WithError(err).Debug("processes of the container cannot be watched: trying again")
		select {
		case <-time.After(watchAgain):
		case <-ctx.Done():
			return
		}
	}
}

// gone takes out a container that is seen to have ended.
func (e *Engine) gone(m *member) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.members[m.ID] == m {
		m.log.Debug("container is gone")
		e.stop(m.ID)
	}
}

// sweep looks at containers that were created and not started, while there are any: those
// whose cgroup has come and gone will not be.
func (e *Engine) sweep(ctx context.Context) {
	var due <-chan time.Time
	for {
		select {
		case <-due:
			due = nil
		case <-e.created:
			if due == nil {
				due = time.After(swept)
			}
			continue
		case <-e.beat:
			continue
		case <-ctx.Done():
			return
		}
		e.mu.Lock()
		waiting := slices.Collect(maps.Values(e.waiting))
		e.mu.Unlock()
		for _, m := range waiting {
			err := e.host.exists(m.CgroupsPath)
			switch {
			case err == nil:
				m.cgroup = true
			case errors.Is(err, fs.ErrNotExist) && (m.cgroup || time.Since(m.added) > unborn):
				e.gone(m)
			}
		}
		if len(waiting) > 0 {
			due = time.After(swept)
		}
	}
}

// Alive returns nil when the engine runs and has not got stuck, or the error of ctx if it
// has not shown that until then. Workers that wait for the kernel, or for their turn, are
// not stuck.
func (e *Engine) Alive(ctx context.Context) error {
	select {
	case e.beat <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	// The sweep takes it too, but not before it has something to do.
	e.mu.Lock()
	defer e.mu.Unlock()
	return nil
}

// notForNode is logged with the reason.
const notForNode = "merges do not come forward when memory is short"

// watchNode brings merges forward when the machine is short of memory.
func (e *Engine) watchNode(ctx context.Context) {
	err := e.host.pressed(ctx, "", func() {
		if e.config().Pressure == PressureNode {
			e.relieve()
		}
	})
	if ctx.Err() != nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.unwatched = err
	if e.settings.Pressure == PressureNode {
		e.log.WithError(err).Warn(notForNode)
	}
}

// watchPod does that when a container's pod is.
func (e *Engine) watchPod(ctx context.Context, m *member) {
	err := e.host.pressed(ctx, m.CgroupsPath, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		if p := m.partition; e.settings.Pressure == PressurePod && time.Since(p.relieved) >= relief {
			p.relieved = time.Now()
			p.bringForward()
		}
	})
	if ctx.Err() != nil || e.host.exists(m.CgroupsPath) != nil {
		// The container has ended.
		return
	}
	const msg = "merges do not come forward when the pod's memory is short"
	if !errors.Is(err, fs.ErrNotExist) {
		m.log.WithError(err).Warn(msg)
		return
	}
	e.untold.Do(func() {
		e.log.WithError(err).Warn(msg + ": pressure: pod needs cgroup v2 with pressure stall information")
	})
}

// relieve brings those partitions forward that are likely to save most, as many as
// can be merged at a time.
func (e *Engine) relieve() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if time.Since(e.relieved) < relief {
		return
	}
	e.relieved = time.Now()
	var best []*partition
	for _, p := range e.partitions {
		if p.expected > 0 {
			best = append(best, p)
		}
	}
	slices.SortFunc(best, func(a, b *partition) int {
		switch {
		case a.expected > b.expected:
			return -1
		case a.expected < b.expected:
			return 1
		}
		return 0
	})
	for _, p := range best[:min(len(best), e.settings.Budget.Workers)] {
		p.bringForward()
	}
}
