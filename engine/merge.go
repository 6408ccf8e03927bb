package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/memory"
	"github.com/selective-ksm/selective-ksm/engine/process"
)

const (
	// settled is the time after a container's start from which its processes must be
	// opted in. Before, they may still be the runtime's init or the wrapper.
	settled = time.Second
	// chunk is the most that is asked of the kernel in one turn, in bytes: a merge under
	// way cannot be ended.
	chunk = 16 << 20
	// fullEvery is that each so many merges of a partition pass over nothing: what a
	// process writes to its pages does not always show.
	fullEvery = 6
	// little is how many bytes a merge must save, or the next one is put off.
	little = 1 << 20
	// afterMove is the pause while a container's memory is still in another partition.
	afterMove = time.Second
)

// errNotOptedIn is why processes that nobody made mergeable are left out.
var errNotOptedIn = errors.New("the kernel says that their memory is not mergeable: " +
	"they joined by exec, or the container was created while the plugin was away, or prctl(PR_SET_MEMORY_MERGE) is not allowed to it; " +
	"or, with optIn: ambient, the runtime was started without it")

// look is a process as it was when all that it offered had been merged.
type look struct {
	activity memory.Activity
	// offered and zero are what it has offered then, in bytes.
	offered, zero uint64
}

// pass is one merge of a member.
type pass struct {
	partition *partition
	member    *member
	settings  Settings
	full      bool

	merged  []handle // processes that were merged, now or before
	seen    map[int]look
	offered uint64 // bytes
	zero    uint64 // bytes
	took    time.Duration
	// failures is how many the member had before.
	failures int
	// unchanged is that the result is that of the last merge.
	unchanged bool
	// waits is that the container's memory is still in another partition.
	waits bool
}

// merge merges all members that run, and logs what came of it. It returns early
// when the partition turns out to be gone or spoilt.
func (p *partition) merge(ctx context.Context) {
	e := p.engine
	began := time.Now()
	e.mu.Lock()
	now := began
	due := len(p.due)
	p.due = slices.DeleteFunc(p.due, func(t time.Time) bool { return !t.After(now) })
	// What is due besides the interval is so because something has changed.
	demanded := p.full
	full := demanded || len(p.due) < due || p.passes%fullEvery == 0
	p.full = false
	if p.hold != HoldNot {
		e.mu.Unlock()
		return
	}
	ctx, p.interrupt = context.WithCancel(ctx)
	defer p.interrupt()
	members := p.running(demanded)
	var failures []int
	for _, m := range members {
		failures = append(failures, m.failures)
	}
	settings := e.settings
	e.mu.Unlock()
	p.passes++
	done := false
	defer func() {
		if demanded && !done {
			e.mu.Lock()
			p.full = true
			e.mu.Unlock()
		}
	}()

	if e.features.OneSpace && !p.alone(ctx) {
		p.putOff()
		return
	}
	var passes []*pass
	waiting := false
	defer func() {
		for _, m := range passes {
			for _, proc := range m.merged {
				proc.Close()
			}
		}
	}()
	for i, m := range members {
		one := &pass{partition: p, member: m, settings: settings, full: full, failures: failures[i], seen: map[int]look{}}
		passes = append(passes, one)
		one.run(ctx)
		if !p.exists || p.spoilt || ctx.Err() != nil {
			return
		}
		waiting = waiting || one.waits
	}
	offered := slices.ContainsFunc(passes, func(s *pass) bool { return len(s.merged) > 0 })
	if e.features.OneSpace && offered && !p.settle(ctx, members) {
		return
	}
	for _, one := range passes {
		one.member.seen = one.seen
	}
	done = !waiting
	p.plan(passes, began)
}

// settle has a kernel with one merge space merge what was offered, and reports whether
// it did. It ends when a container leaves, whose memory is mergeable still.
func (p *partition) settle(ctx context.Context, members []*member) bool {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, m := range members {
		defer context.AfterFunc(m.ctx, cancel)()
	}
	err := p.engine.budget.Do(ctx, p.name, func() (time.Duration, error) {
		p.mixed = true
		return p.engine.kernel.Settle(ctx, p.name)
	})
	switch {
	case err == nil:
		if !p.alone(ctx) {
			p.putOff()
			return false
		}
		return true
	case errors.Is(err, context.Canceled):
		p.again()
	case errors.Is(err, kernel.ErrNoPartition):
		p.vanished(err)
	default:
		p.count(err)
		p.putOff()
		for _, m := range members {
			p.engine.warn(m, "container is not merged", err)
		}
	}
	return false
}

// putOff leaves a merge for the next time.
func (p *partition) putOff() {
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	p.next = time.Now().Add(p.pause())
}

func (p *partition) vanished(err error) {
	p.exists = false
	if msg := "partition was removed by somebody else: adding it again"; p.said.again(msg) {
		p.log.WithError(err).Warn(msg)
	}
}

// run merges the processes of one container, until it leaves.
func (s *pass) run(ctx context.Context) {
	p, m := s.partition, s.member
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.ctx, cancel)()

	for _, left := range m.before {
		select {
		case <-left:
		default:
			// Nothing but us may tie a process to one partition.
			s.wait()
			return
		}
	}
	m.before = nil
	begin := time.Now()
	if !s.full && s.quiet() {
		s.took = time.Since(begin)
		return
	}
	processes, err := p.engine.host.open(m.CgroupsPath)
	if errors.Is(err, fs.ErrNotExist) {
		p.engine.gone(m)
		return
	} else if err != nil {
		p.count(err)
		p.engine.warn(m, "container is not merged: its processes were not found", err)
		return
	}
	if m.unmerge {
		for _, proc := range processes {
			err := s.ask(ctx, proc, func() error { return p.engine.kernel.Unmerge(ctx, p.name, proc.Pid()) })
			if err != nil && !gone(err) {
				closeAll(processes)
				s.failed(err)
				return
			}
		}
		m.unmerge = false
	}
	for _, proc := range processes {
		if ctx.Err() == nil && !p.spoilt && p.exists && s.process(ctx, proc) {
			s.merged = append(s.merged, proc)
		} else {
			proc.Close()
		}
	}
	s.took = time.Since(begin)
}

// wait has the container merged when its memory is out of another partition.
func (s *pass) wait() {
	s.waits = true
	s.partition.engine.mu.Lock()
	defer s.partition.engine.mu.Unlock()
	s.partition.mergeAt(time.Now().Add(afterMove))
}

func closeAll(processes []handle) {
	for _, proc := range processes {
		proc.Close()
	}
}

// quiet reports whether the container has the same processes as when it was last
// merged, and none of them has done anything since. Nothing is asked of the kernel then,
// and no process has to be held: one that has another's number has another start.
func (s *pass) quiet() bool {
	host, before := s.partition.engine.host, s.member.seen
	pids, err := host.list(s.member.CgroupsPath)
	if err != nil || len(pids) == 0 || len(pids) != len(before) {
		return false
	}
	for _, pid := range pids {
		was, known := before[pid]
		if !known {
			return false
		}
		if now, err := host.activity(pid); err != nil || now != was.activity {
			return false
		}
	}
	for pid, was := range before {
		s.keep(pid, was)
	}
	s.unchanged = true
	return true
}

// process merges what a process has to offer, and reports whether it was merged. That
// it exits meanwhile is no failure.
func (s *pass) process(ctx context.Context, proc handle) bool {
	e, pid := s.partition.engine, proc.Pid()
	now, err := e.host.activity(pid)
	if err != nil {
		s.failed(err)
		return false
	}
	before, again := s.member.seen[pid]
	if again && !s.full && before.activity == now && proc.Alive() {
		s.keep(pid, before)
		return true
	}

	if e.features.Bind && !s.settings.OptedIn {
		err := s.take(ctx, proc, func() error { return e.kernel.Bind(s.partition.name, pid) })
		if err != nil {
			s.failed(err)
			return false
		}
	}
	o := memory.Options{
		Secrets: s.member.Secrets,
		Zero:    s.settings.Zero,
		Dirty:   s.settings.Dirty && again && !s.full,
		Exact:   e.features.PageByPage,
	}
	var offer memory.Offer
	err = e.budget.Do(ctx, s.partition.name, func() (time.Duration, error) {
		var err error
		offer, err = e.host.find(ctx, pid, o)
		if err == nil && s.settings.Dirty {
			// What is written to from here on is for the next merge. What was written
			// since the look is for one that passes over nothing.
			err = e.host.clearDirty(pid, proc.Alive)
		}
		return 0, err
	})
	if err != nil {
		s.failed(err)
		return false
	}
	if !offer.Mergeable {
		if proc.Alive() && time.Since(s.member.started) >= settled {
			e.warn(s.member, "processes of the container are not merged", errNotOptedIn)
		}
		return false
	}
	for _, r := range chunks(offer.Ranges) {
		if err := s.take(ctx, proc, func() error { return e.kernel.Merge(ctx, s.partition.name, pid, r) }); err != nil {
			s.failed(err)
			return false
		}
	}
	s.keep(pid, look{activity: now, offered: offer.Bytes, zero: offer.Zero})
	return true
}

// keep takes a process as merged.
func (s *pass) keep(pid int, l look) {
	s.seen[pid] = l
	s.offered += l.offered
	s.zero += l.zero
}

// errExited says that a process has exited, or left its cgroup. It matches
// [kernel.ErrNoProcess].
var errExited = fmt.Errorf("it exited: %w", kernel.ErrNoProcess)

// ask asks the kernel for something about a process, by its number, which is the
// process's as long as it is alive. In a turn of the budget.
func (s *pass) ask(ctx context.Context, proc handle, call func() error) error {
	return s.partition.engine.budget.Do(ctx, s.partition.name, func() (time.Duration, error) {
		if member, err := s.partition.engine.host.member(s.member.CgroupsPath, proc.Pid()); err != nil {
			return 0, err
		} else if !member || !proc.Alive() {
			return 0, errExited
		}
		err := call()
		if !proc.Alive() {
			s.partition.repair(ctx, s.member, proc.Pid())
			return 0, errExited
		}
		return 0, err
	})
}

// take asks the kernel for what binds a process to the partition. An engine before this
// one may have bound it to another of ours, by a policy that it was given: it is let go
// there first.
func (s *pass) take(ctx context.Context, proc handle, call func() error) error {
	return s.ask(ctx, proc, func() error {
		err := call()
		if errors.Is(err, kernel.ErrBusy) && s.partition.engine.letGo(s.partition, proc.Pid()) {
			err = call()
		}
		return err
	})
}

// letGo unbinds a process from those partitions of ours in which no member claims it, so
// that their workers ask for nothing about it, other than one. It reports whether there
// are any.
func (e *Engine) letGo(but *partition, pid int) bool {
	if !e.features.Bind {
		return false
	}
	// If they cannot be listed, the process stays where it is.
	names, _ := e.kernel.Partitions()
	tried := false
	for _, name := range names {
		if name != but.name && e.owned(name) && !e.claimed(name, pid) {
			// If it is not there, or is let go already, all is well.
			_ = e.kernel.Unbind(name, pid)
			tried = true
		}
	}
	return tried
}

// claimed reports whether a process is of a member of a partition, or may be.
func (e *Engine) claimed(name string, pid int) bool {
	e.mu.Lock()
	var paths []string
	if p := e.partitions[name]; p != nil {
		for _, m := range p.members {
			paths = append(paths, m.CgroupsPath)
		}
	}
	e.mu.Unlock()
	return slices.ContainsFunc(paths, func(path string) bool {
		member, err := e.host.member(path, pid)
		return member || err != nil
	})
}

// removing reports whether there is a partition that is to be removed, with all that is
// bound to it.
func (e *Engine) removing() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, p := range e.partitions {
		if len(p.members) == 0 {
			return true
		}
	}
	return false
}

// failed takes note of why a process was not merged, or not to its end.
func (s *pass) failed(err error) {
	switch {
	case errors.Is(err, context.Canceled), gone(err):
	case errors.Is(err, kernel.ErrNoPartition):
		s.partition.vanished(err)
	case errors.Is(err, kernel.ErrBusy) && s.partition.engine.removing():
		s.wait()
	default:
		s.partition.count(err)
		s.partition.engine.warn(s.member, "container is not merged", err)
	}
}

// gone reports whether an error is that a process or a cgroup is gone.
func gone(err error) bool {
	return errors.Is(err, kernel.ErrNoProcess) || process.Gone(err)
}

// repair sees to a number that was bound or merged and whose process exited
// meanwhile. If a process that is not the container's has it now, that one may have
// been taken into the partition. Where the kernel binds processes it says whether it
// was. If it was, or may have been, it may have forked since, too: all there is in the
// partition is unmerged, and it starts anew.
func (p *partition) repair(ctx context.Context, m *member, pid int) {
	k, ctx := p.engine.kernel, context.WithoutCancel(ctx)
	if member, err := p.engine.host.member(m.CgroupsPath, pid); err == nil && member {
		return
	}
	var err error
	if p.engine.features.Bind {
		err = k.Unbind(p.name, pid)
	} else {
		err = k.Unmerge(ctx, p.name, pid)
	}
	if errors.Is(err, kernel.ErrNoProcess) || errors.Is(err, kernel.ErrNoPartition) || errors.Is(err, kernel.ErrNotMember) {
		return
	}
	p.spoilt = true
	p.log.WithField("pid", pid).Warn("another process has the number of one that exited in a merge: unmerging the partition")
}

// release unmerges what is left of containers that are no members any more. Those for
// which it fails stay for the next time.
func (p *partition) release(ctx context.Context, leaving []*member) error {
	var errs []error
	for _, m := range leaving {
		if err := p.releaseOne(ctx, m); err != nil {
			p.putBack([]*member{m})
			errs = append(errs, err)
		} else {
			p.engine.mu.Lock()
			p.engine.parted(m)
			p.engine.mu.Unlock()
		}
	}
	return errors.Join(errs...)
}

func (p *partition) releaseOne(ctx context.Context, m *member) error {
	e := p.engine
	if e.features.OneSpace {
		e.mu.Lock()
		stays := p.members[m.ID] != nil
		e.mu.Unlock()
		if stays {
			// It is the same container, and its memory is where it is to be.
			return nil
		}
		if err := p.stillMergeable([]*member{m}); err != nil {
			return err
		}
	}
	return p.eachProcess(m, func(pid int) error {
		if e.features.Bind {
			return e.kernel.Unbind(p.name, pid)
		}
		return e.kernel.Unmerge(ctx, p.name, pid)
	})
}

// looksForChildren is how often the processes of a container are looked for that one has
// forked before it was unmerged.
const looksForChildren = 8

// eachProcess unmerges the processes of a container, and those that they fork meanwhile.
func (p *partition) eachProcess(m *member, unmerge func(pid int) error) error {
	done := map[int]bool{}
	for range looksForChildren {
		processes, err := p.engine.host.open(m.CgroupsPath)
		if err != nil && !gone(err) {
			return err
		}
		more := false
		var errs []error
		for _, proc := range processes {
			if pid := proc.Pid(); !done[pid] {
				done[pid] = true
				err := unmerge(pid)
				// One that is of no partition has no children that are.
				more = more || !errors.Is(err, kernel.ErrNotMember)
				if !gone(err) && !errors.Is(err, kernel.ErrNoPartition) && !errors.Is(err, kernel.ErrNotMember) {
					errs = append(errs, err)
				}
			}
			proc.Close()
		}
		if err := errors.Join(errs...); err != nil || !more {
			return err
		}
	}
	return fmt.Errorf("container %s forks faster than it is unmerged", m.ID)
}

// plan says when the next merge is, by what this one came to, and logs that for each
// member that took part, if it has changed. What the partition saves is divided among those by what they
// have merged in it, and each page that several share is one member's only in part.
func (p *partition) plan(passes []*pass, began time.Time) {
	e := p.engine
	var results []Result
	var all uint64
	changed := false
	for _, s := range passes {
		if s.unchanged {
			r := s.member.result
			r.Took, r.At = s.took, time.Now()
			all += r.Merged
			results = append(results, r)
			continue
		}
		changed = true
		r := Result{Offered: s.offered, Zero: s.zero, Took: s.took, Processes: len(s.merged), At: time.Now()}
		for _, proc := range s.merged {
			if n, err := e.host.merged(proc.Pid()); err == nil && proc.Alive() {
				r.Merged += n
			}
		}
		all += r.Merged
		results = append(results, r)
	}
	if changed && !e.features.SharedCounters {
		counters, err := e.kernel.Counters(p.name)
		if err != nil {
			p.count(err)
			if msg := "savings are not known"; p.said.again(msg) {
				p.log.WithError(err).Warn(msg)
			}
		} else if pages := counters.Shared + counters.Sharing; pages > 0 {
			for i := range results {
				results[i].Saved = uint64(float64(results[i].Merged) * float64(counters.Sharing) / float64(pages))
			}
		}
	}
	yield := all - min(all, p.merged)
	p.merged = all

	e.mu.Lock()
	if yield >= little {
		p.poor = 0
	} else {
		p.poor++
	}
	p.expected = (p.expected + float64(yield)) / 2
	p.last = time.Now()
	p.next = p.last.Add(p.pause())
	p.did.Merges.add(p.last.Sub(began))
	e.did.Merges.add(p.last.Sub(began))
	for i, s := range passes {
		s.member.result = results[i]
		if s.member.failures == s.failures && results[i].Processes > 0 {
			s.member.reason = reason{}
		}
	}
	e.mu.Unlock()

	for i, s := range passes {
		r := results[i]
		switch {
		case s.unchanged:
			s.member.log.Debug("unchanged")
			continue
		case r.Processes == 0:
			continue
		}
		fields := logrus.Fields{
			"offered_bytes": r.Offered,
			"merged_bytes":  r.Merged,
			"zero_bytes":    r.Zero,
			"duration_ms":   float64(r.Took.Microseconds()) / 1000,
			"processes":     r.Processes,
		}
		if !e.features.SharedCounters {
			fields["saved_bytes"] = r.Saved
		}
		s.member.log.WithFields(fields).Info("merged")
	}
}

// warn keeps a failure as the reason that a container is not merged, and logs it the
// first time that it happens, and then no more often than [repeated].
func (e *Engine) warn(m *member, msg string, err error) {
	e.mu.Lock()
	m.reason = reasonOf(err)
	m.failures++
	failures, log := m.failures, m.warned.again(msg)
	e.mu.Unlock()
	if log {
		m.log.WithError(err).WithField("failures", failures).Warn(msg)
	}
}

// chunks cuts ranges so that none is larger than a chunk.
func chunks(ranges []kernel.Range) []kernel.Range {
	var cut []kernel.Range
	for _, r := range ranges {
		for start := r.Start; start < r.End; start += chunk {
			cut = append(cut, kernel.Range{Start: start, End: min(start+chunk, r.End)})
		}
	}
	return cut
}
