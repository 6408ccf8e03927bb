package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// Hold says whether somebody has had a partition unmerged. It holds for containers that
// join later, too, until [Engine.Merge], or as long as the engine has the partition.
type Hold string

const (
	// HoldNot is that nobody has.
	HoldNot Hold = ""
	// HoldUnmerging is that its containers are being unmerged.
	HoldUnmerging Hold = "unmerging"
	// HoldUnmerged is that they are.
	HoldUnmerged Hold = "unmerged"
)

var heldReason = reason{CauseHeld, "selective-ksm unmerge holds its partition, until selective-ksm merge"}

// Unmerge ends a merge of a partition that is under way, unmerges the partition, and has
// it not merged again until [Engine.Merge] is called for it. The empty name is that of
// all partitions that there are. It does not wait for that: [PartitionStatus] tells when
// it is done. It returns [kernel.ErrNoPartition] where the engine has none of that name.
func (e *Engine) Unmerge(name string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if name != "" && e.partitions[name] == nil {
		return fmt.Errorf("unmerging partition %s: %w", name, kernel.ErrNoPartition)
	}
	for _, p := range e.partitions {
		if name == "" || name == p.name {
			p.hold = HoldUnmerging
			p.interrupt()
			p.poke()
		}
	}
	return nil
}

// unmerge does what [Engine.Unmerge] has asked for, if it has.
func (p *partition) unmerge(ctx context.Context) error {
	e := p.engine
	e.mu.Lock()
	wanted, members := p.hold == HoldUnmerging, p.running(true)
	e.mu.Unlock()
	if !wanted {
		return nil
	}
	var errs []error
	for _, m := range members {
		clear(m.seen)
		errs = append(errs, p.eachProcess(m, func(pid int) error { return e.kernel.Unmerge(ctx, p.name, pid) }))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	p.merged = 0
	e.mu.Lock()
	held := p.unmerged()
	e.mu.Unlock()
	if held {
		p.log.Info("partition is unmerged, and is not merged until somebody asks for it")
	}
	return nil
}

// unmerged says that nothing is merged in a partition, and reports whether it is held.
// e.mu is held.
func (p *partition) unmerged() bool {
	if p.hold == HoldUnmerging {
		p.hold = HoldUnmerged
	}
	return p.hold == HoldUnmerged
}

// RemoveAll unmerges and removes all partitions of ours, when [Engine.Run] has returned
// and no other engine is to take them over. Where the kernel would unmerge the partitions
// of others with them, ours are unmerged and stay, which is an error.
func (e *Engine) RemoveAll(ctx context.Context) error {
	names, err := e.kernel.Partitions()
	if err != nil {
		return fmt.Errorf("removing partitions: %w", err)
	}
	others := false
	for _, name := range names {
		others = others || !e.owned(name)
	}
	var errs []error
	for _, name := range names {
		switch {
		case !e.owned(name):
		case ctx.Err() != nil:
			return errors.Join(append(errs, fmt.Errorf("removing partitions: %w", ctx.Err()))...)
		case e.features.WideRemoval && others:
			e.mu.Lock()
			p := e.partition(name)
			p.hold = HoldUnmerging
			e.mu.Unlock()
			errs = append(errs, p.unmerge(ctx), fmt.Errorf("partition %s stays: this kernel would unmerge those of others with it", name))
		default:
			if err := e.kernel.RemovePartition(name); err != nil && !errors.Is(err, kernel.ErrNoPartition) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
