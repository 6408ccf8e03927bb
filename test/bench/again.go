package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/selective-ksm/selective-ksm/test/bench/result"
)

// processesAgain is how many have the memory that is merged again.
const processesAgain = 4

// Merges of what was merged before, in their order. Between 1 and 5 of them, as the engine
// passes over nothing each sixth time.
var changes = []struct {
	name    string
	percent int
}{{"unchanged", 0}, {"1 % changed", 1}, {"10 % changed", 10}}

// repeated measures merging what was merged before, by the kernel alone, which looks at all
// pages, and by the engine, which does not ask for all.
func (g *guest) repeated(ctx context.Context) error {
	for range g.rounds {
		if !g.selective {
			if err := g.repeatedByKsmd(ctx); err != nil {
				return err
			}
			continue
		}
		if err := g.repeatedOnRequest(ctx); err != nil {
			return err
		}
		for _, incremental := range []string{"faults", "softDirty"} {
			if err := g.repeatedBeside(ctx, incremental); err != nil {
				return fmt.Errorf("incremental: %s: %w", incremental, err)
			}
		}
	}
	return nil
}

func (g *guest) crowdAgain(ctx context.Context) (*crowd, error) {
	pages := pagesIn(g.size.again) / processesAgain
	return g.crowd(ctx, processesAgain, pages, pages*someEqual/100)
}

func (g *guest) repeatedOnRequest(ctx context.Context) (err error) {
	c, err := g.crowdAgain(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.kill()) }()
	merge := func(name string) error {
		t, err := byRequest(func() error { return c.mergeIn(partitionName, c.actors...) })
		return errors.Join(err, saves(partitionName, c.saving()), g.took("again", result.Sample{Case: name, Variant: onRequest}, t, 1))
	}
	return withPartition(partitionName, func() error {
		if err := merge(firstMerge); err != nil {
			return err
		}
		for _, change := range changes {
			if change.percent > 0 {
				if err := c.change(change.percent); err != nil {
					return err
				}
			}
			if err := merge(change.name); err != nil {
				return err
			}
		}
		return nil
	})
}

// repeatedByKsmd measures ksmd: where nothing has changed, a scan of all.
func (g *guest) repeatedByKsmd(ctx context.Context) (err error) {
	c, err := g.crowdAgain(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.kill()) }()
	d, err := findKsmd()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.unmerge()) }()
	m := modes[0]
	s := result.Sample{Case: firstMerge, Variant: m.name}
	var t times
	if t, s.Over, err = d.merges(ctx, m, c.saving(), patience); err != nil {
		return err
	}
	if err := g.took("again", s, t, 1); err != nil {
		return err
	}
	for _, change := range changes {
		s := result.Sample{Case: change.name, Variant: m.name}
		if change.percent == 0 {
			t, err = d.scan(ctx)
		} else if err = errors.Join(d.pause(), c.change(change.percent)); err == nil {
			t, err = d.mergesAgain(ctx, m, c.saving())
		}
		if err := errors.Join(err, g.took("again", s, t, 1)); err != nil {
			return err
		}
	}
	return nil
}

// scan is one scan of all memory, of the ksmd that runs.
func (d *ksmd) scan(ctx context.Context) (t times, err error) {
	n, err := scans()
	if err != nil {
		return t, err
	}
	if _, err := reach(ctx, scans, n+1, patience); err != nil {
		return t, err
	}
	began, cpu := time.Now(), clock(d.clock)
	_, err = reach(ctx, scans, n+2, patience)
	return times{time.Since(began), clock(d.clock) - cpu}, err
}

// repeatedBeside has the plugin merge containers by an interval. That is long enough to
// change them in.
func (g *guest) repeatedBeside(ctx context.Context, incremental string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	config := logged + unbounded + fmt.Sprintf("startDelays: [1s]\ninterval: %[1]s\nmaxInterval: %[1]s\nincremental: %s\n", g.interval, incremental)
	return g.beside(ctx, config, nil, func(f *fleet, r *nri, p *agent, _ time.Duration) (err error) {
		c, err := g.crowdAgain(ctx)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, c.kill()) }()
		if err := f.house(c.actors, 1); err != nil {
			return err
		}
		for _, ctr := range f.containers {
			if err := r.starts(ctx, f.pods[0], ctr); err != nil {
				return err
			}
		}
		merge := func(name string, merges int) error {
			if n := p.merged(); n != merges*len(c.actors) {
				return fmt.Errorf("%s: %d merges of containers, not %d", name, n, merges*len(c.actors))
			}
			cpu := p.cpu()
			if err := p.waitMerged(ctx, (merges+1)*len(c.actors)); err != nil {
				return err
			}
			saved, err := allSharing()
			if err == nil && saved < c.saving() {
				err = fmt.Errorf("%s: %d pages are saved, not %d", name, saved, c.saving())
			}
			s := result.Sample{Figure: "again-cpu", Case: name, Variant: "incremental: " + incremental, Value: (p.cpu() - cpu).Seconds()}
			return errors.Join(err, g.sample(s))
		}
		if err := merge(firstMerge, 0); err != nil {
			return err
		}
		for i, change := range changes {
			if change.percent > 0 {
				if err := c.change(change.percent); err != nil {
					return err
				}
			}
			if err := merge(change.name, i+1); err != nil {
				return err
			}
		}
		return nil
	})
}
