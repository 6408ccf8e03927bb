package engine

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// settled is the time after a container's start from which its processes must be
// opted in. Before, they may still be the runtime's init or the wrapper.
const settled = time.Second

// errNotOptedIn is why processes that nobody made mergeable are left out.
var errNotOptedIn = errors.New("the kernel says that their memory is not mergeable: " +
	"they joined by exec, or the container was created while the plugin was away, or prctl(PR_SET_MEMORY_MERGE) is not allowed to it")

// merged is what came of merging one member.
type merged struct {
	member    *member
	processes []handle // that were merged
	offered   uint64   // bytes
	took      time.Duration
}

// merge merges all members that run, and logs what came of it. It returns early
// when the partition turns out to be gone or spoilt.
func (p *partition) merge(ctx context.Context) {
	p.engine.mu.Lock()
	now := time.Now()
	p.due = slices.DeleteFunc(p.due, func(t time.Time) bool { return !t.After(now) })
	members := p.running()
	p.engine.mu.Unlock()

	var results []merged
	for _, m := range members {
		r := p.mergeMember(ctx, m)
		defer func() {
			for _, proc := range r.processes {
				proc.Close()
			}
		}()
		if !p.exists || p.spoilt {
			return
		}
		results = append(results, r)
	}
	p.report(results)

	p.engine.mu.Lock()
	p.last = time.Now()
	p.engine.mu.Unlock()
}

// mergeMember merges the processes of one container, until it leaves.
func (p *partition) mergeMember(ctx context.Context, m *member) merged {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.ctx, cancel)()

	r := merged{member: m}
	select {
	case p.engine.slots <- struct{}{}:
		defer func() { <-p.engine.slots }()
	case <-ctx.Done():
		return r
	}
	begin := time.Now()
	processes, err := p.engine.host.open(m.CgroupsPath)
	if errors.Is(err, fs.ErrNotExist) {
		// The runtime does not tell when a shim is killed, for one.
		m.log.WithError(err).Info("container is gone")
		p.engine.Stop(m.ID)
		return r
	} else if err != nil {
		m.warn("container is not merged: its processes were not found", err)
		return r
	}
	for _, proc := range processes {
		if ctx.Err() == nil && !p.spoilt && p.exists && p.mergeProcess(ctx, m, proc, &r.offered) {
			r.processes = append(r.processes, proc)
		} else {
			proc.Close()
		}
	}
	r.took = time.Since(begin)
	return r
}

// mergeProcess merges what a process has to offer, adds that to offered, and
// reports whether it was merged. That a process exits meanwhile is no failure.
func (p *partition) mergeProcess(ctx context.Context, m *member, proc handle, offered *uint64) bool {
	pid := proc.Pid()
	mergeable, err := p.engine.host.mergeable(pid)
	if err == nil && !mergeable && proc.Alive() {
		if time.Since(m.started) >= settled {
			m.warn("processes of the container are not merged", errNotOptedIn)
		}
		return false
	}
	if err != nil {
		p.failedProcess(m, err)
		return false
	}
	offer, err := p.engine.host.find(pid)
	if err != nil {
		p.failedProcess(m, err)
		return false
	}
	for _, r := range chunks(offer.Ranges) {
		// What follows is asked for by number, which is this process's as long as it
		// is alive.
		if !proc.Alive() {
			return false
		}
		err = p.engine.kernel.Merge(ctx, p.name, pid, r)
		if !proc.Alive() {
			p.repair(ctx, pid)
			return false
		}
		if err != nil {
			p.failedProcess(m, err)
			return false
		}
	}
	*offered += offer.Bytes
	return true
}

// chunk is the most that is asked of the kernel at a time, in bytes: a merge under
// way cannot be ended.
const chunk = 16 << 20

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

// failedProcess takes note of why a process was not merged, or not to its end.
func (p *partition) failedProcess(m *member, err error) {
	switch {
	case errors.Is(err, context.Canceled),
		errors.Is(err, kernel.ErrNoProcess), errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ESRCH):
	case errors.Is(err, kernel.ErrNoPartition):
		p.exists = false
		p.log.WithError(err).Warn("partition was removed by somebody else: adding it again")
	default:
		m.warn("container is not merged", err)
	}
}

// repair sees to a number that was merged and whose process exited meanwhile. If
// another process has it now, that one may have been merged, and may have forked
// since: all there is in the partition is unmerged, and it starts anew.
func (p *partition) repair(ctx context.Context, pid int) {
	err := p.engine.kernel.Unmerge(context.WithoutCancel(ctx), p.name, pid)
	if errors.Is(err, kernel.ErrNoProcess) || errors.Is(err, kernel.ErrNoPartition) {
		return
	}
	p.spoilt = true
	p.log.WithField("pid", pid).Warn("another process has the number of one that exited in a merge: unmerging the partition")
}

// unmerge unmerges what is left of a container that is no member any more.
func (p *partition) unmerge(ctx context.Context, m *member) {
	processes, err := p.engine.host.open(m.CgroupsPath)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			m.warn("processes that the container left are not unmerged", err)
		}
		return
	}
	for _, proc := range processes {
		err := p.engine.kernel.Unmerge(ctx, p.name, proc.Pid())
		if err != nil && !errors.Is(err, kernel.ErrNoProcess) && !errors.Is(err, kernel.ErrNoPartition) && ctx.Err() == nil {
			m.warn("processes that the container left are not unmerged", err)
		}
		proc.Close()
	}
}

// report logs what a merge of the partition came to, for each member that took
// part. What the partition saves is divided among those by what they have merged
// in it, and each page that several share is one member's only in part.
func (p *partition) report(results []merged) {
	counters, err := p.engine.kernel.Counters(p.name)
	if err != nil {
		p.log.WithError(err).Warn("savings are not known")
	}
	for _, r := range results {
		if len(r.processes) == 0 {
			continue
		}
		var bytes uint64
		for _, proc := range r.processes {
			if n, err := p.engine.host.merged(proc.Pid()); err == nil && proc.Alive() {
				bytes += n
			}
		}
		var saved uint64
		if all := counters.Shared + counters.Sharing; all > 0 {
			saved = uint64(float64(bytes) * float64(counters.Sharing) / float64(all))
		}
		r.member.log.WithFields(logrus.Fields{
			"offered_bytes": r.offered,
			"merged_bytes":  bytes,
			"saved_bytes":   saved,
			"duration_ms":   float64(r.took.Microseconds()) / 1000,
			"processes":     len(r.processes),
		}).Info("merged")
	}
}
