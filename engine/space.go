package engine

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// alone reports whether the partition may be merged on a kernel that has one merge
// space: whether no process of another container is mergeable, be it that it made
// itself so. If one is, it may have been merged with the partition's already, and all
// is unmerged. Processes of the machine itself are reported once.
func (p *partition) alone(ctx context.Context) bool {
	e := p.engine
	intruders, others, err := p.sharers(ctx)
	e.mu.Lock()
	members := p.running(true)
	e.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		return false
	case err != nil:
		p.count(err)
		err = fmt.Errorf("processes that share the merge space were not found: %w", err)
	case len(intruders) > 0:
		err = fmt.Errorf("processes %d of other containers have made themselves mergeable, and %w", intruders, errShared)
		p.spoilt = p.mixed
	}
	if err != nil {
		for _, m := range members {
			e.warn(m, "container is not merged", err)
		}
		return false
	}
	if len(others) > 0 && !p.told {
		p.log.WithField("pids", others).Warn("processes outside of containers are mergeable, and share the partition's merge space")
	}
	p.told = len(others) > 0
	return true
}

// sharers are the processes of the machine that are mergeable and not the partition's:
// those of other containers, and the others. Whether a process is in a container that
// is no member, as it may be of another runtime, shows in its mount namespace; that a
// service of the machine may have one too makes for less merging, not for more.
func (p *partition) sharers(ctx context.Context) (intruders, others []int, err error) {
	e := p.engine
	err = e.budget.Do(ctx, p.name, func() (time.Duration, error) {
		mergeable, err := e.host.mergeableOnes()
		if err != nil || len(mergeable) == 0 {
			return 0, err
		}
		owner, err := e.owners()
		if err != nil {
			return 0, err
		}
		for _, pid := range mergeable {
			switch o := owner[pid]; {
			case o == p:
			case o == nil && !e.host.contained(pid):
				others = append(others, pid)
			default:
				intruders = append(intruders, pid)
			}
		}
		return 0, nil
	})
	return intruders, others, err
}

// owners tells the partitions of the processes of all containers, those included that
// have left one and still run.
func (e *Engine) owners() (map[int]*partition, error) {
	type place struct {
		path  string
		owner *partition
	}
	nobody := &partition{} // is the owner of those that left
	e.mu.Lock()
	var places []place
	for _, p := range e.partitions {
		for _, m := range p.leaving {
			places = append(places, place{m.CgroupsPath, nobody})
		}
	}
	for _, m := range e.members {
		places = append(places, place{m.CgroupsPath, m.partition})
	}
	for _, c := range e.outside {
		places = append(places, place{c.CgroupsPath, nobody})
	}
	e.mu.Unlock()
	owner := map[int]*partition{}
	var errs []error
	for _, at := range places {
		processes, err := e.host.open(at.path)
		if err != nil && !gone(err) {
			errs = append(errs, err)
		}
		for _, proc := range processes {
			owner[proc.Pid()] = at.owner
			proc.Close()
		}
	}
	return owner, errors.Join(errs...)
}
