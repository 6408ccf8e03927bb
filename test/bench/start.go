package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/selective-ksm/selective-ksm/test/bench/result"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/kernel/actor"
)

// What is started: pods of two containers, which have the same memory, and no other pod has.
const podsStarted = 4

// reachable is the part of all savings that counts as merged.
const reachable = 0.9

// started measures how long it takes from the start of containers until most of what can
// be saved is. Containers have their memory when they start. The plugin is as it is without
// a configuration.
func (g *guest) started(ctx context.Context) error {
	for i := range g.rounds {
		if err := g.startedWithAll(ctx, g.reaches, func(m mode) bool { return !m.slow || i == 0 }); err != nil {
			return err
		}
	}
	return nil
}

// watched measures what that, and the time after it, takes of the CPU.
func (g *guest) watched(ctx context.Context) error { return g.watchedWith(ctx, byDefault) }

// watchedAdvisor does so for another mode of ksmd. That of ksmd flat out, which takes all
// of a CPU, is known.
func (g *guest) watchedAdvisor(ctx context.Context) error { return g.watchedWith(ctx, byAdvisor) }

func (g *guest) watchedWith(ctx context.Context, name string) error {
	return g.startedWithAll(ctx, g.follow, func(m mode) bool { return m.name == name })
}

// startedWithAll measures something by all means that the kernel has, of ksmd's those that
// are wanted.
func (g *guest) startedWithAll(ctx context.Context, measure func(context.Context, merging) error, want func(mode) bool) error {
	if g.selective {
		return g.startedBeside(ctx, measure)
	}
	d, err := findKsmd()
	if err != nil {
		return err
	}
	for _, m := range modes {
		if !want(m) {
			continue
		}
		if err := g.startedWith(ctx, d, m, measure); err != nil {
			return err
		}
	}
	return nil
}

// twins starts processes of which each two have the same memory.
func (g *guest) twins(ctx context.Context, pairs, pages int) (*crowd, error) {
	c, err := g.crowd(ctx, 2*pairs, pages, 0)
	if err != nil {
		return nil, err
	}
	const away = 10_000 // from the seeds of a crowd
	for i, a := range c.actors {
		if _, err := a.Ask("write 0 %d %d", pages, away+i/2); err != nil {
			return nil, errors.Join(err, c.kill())
		}
	}
	return c, nil
}

// startedBeside has the plugin merge.
func (g *guest) startedBeside(ctx context.Context, measure func(context.Context, merging) error) error {
	return g.beside(ctx, "logFormat: json\n", nil, func(f *fleet, r *nri, p *agent, _ time.Duration) (err error) {
		c, err := g.twins(ctx, podsStarted, pagesIn(g.size.start)/(2*podsStarted))
		if err != nil {
			return err
		}
		// The cgroups can be removed when the processes have ended.
		defer func() { err = errors.Join(err, c.kill()) }()
		if err := f.house(c.actors, podsStarted); err != nil {
			return err
		}
		return measure(ctx, merging{
			variant: product, want: podsStarted * c.pages, cpu: p.cpu, counter: allSharing,
			begin: func() error {
				for i, ctr := range f.containers {
					if err := r.starts(ctx, f.pods[i*len(f.pods)/len(f.containers)], ctr); err != nil {
						return err
					}
				}
				return nil
			},
		})
	})
}

// house puts processes in containers of so many pods, in equal parts.
func (f *fleet) house(actors []*actor.Actor, pods int) error {
	for i, a := range actors {
		if i%(len(actors)/pods) == 0 {
			if _, err := f.pod(fmt.Sprint("pod-", len(f.pods)), "bench"); err != nil {
				return err
			}
		}
		ctr, err := f.container(f.pods[len(f.pods)-1], fmt.Sprint("container-", i))
		if err == nil {
			err = f.enter(ctr, a.Pid)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// allSharing is what all partitions save, in pages.
func allSharing() (sum int, err error) {
	names, err := partition.List()
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		n, err := partition.Counter(name, "pages_sharing")
		if errors.Is(err, os.ErrNotExist) {
			continue // it is being made
		}
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// startedWith has ksmd merge.
func (g *guest) startedWith(ctx context.Context, d *ksmd, m mode, measure func(context.Context, merging) error) (err error) {
	c, err := g.twins(ctx, podsStarted, pagesIn(g.size.start)/(2*podsStarted))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.unmerge(), c.kill()) }()
	return measure(ctx, merging{
		variant: m.name, want: podsStarted * c.pages, counter: sharing,
		cpu:   func() time.Duration { return clock(d.clock) },
		begin: func() error { return d.start(m) },
	})
}

// merging is a merge that begins when containers do.
type merging struct {
	variant string
	want    int // pages that can be saved
	cpu     func() time.Duration
	counter func() (int, error) // pages that are saved
	begin   func() error
}

func (g *guest) sampleOf(m merging) result.Sample {
	return result.Sample{Case: fmt.Sprintf("%d MiB in %d containers of %d pods", g.size.start, 2*podsStarted, podsStarted), Variant: m.variant}
}

// reaches tells how long it takes.
func (g *guest) reaches(ctx context.Context, m merging) error {
	began := time.Now()
	if err := m.begin(); err != nil {
		return err
	}
	reached, err := reach(ctx, m.counter, int(reachable*float64(m.want)), patience)
	if err != nil {
		return err
	}
	s := g.sampleOf(m)
	s.Figure, s.Value, s.Over = "saving", time.Since(began).Seconds(), !reached
	return g.sample(s)
}

// follow tells what it takes of the CPU.
func (g *guest) follow(ctx context.Context, m merging) error {
	cpu, began := m.cpu(), time.Now()
	if err := m.begin(); err != nil {
		return err
	}
	if err := wait(ctx, g.idleFrom-time.Since(began)); err != nil {
		return err
	}
	idle, from := m.cpu(), time.Now()
	if err := wait(ctx, g.window-time.Since(began)); err != nil {
		return err
	}
	end, took := m.cpu(), time.Since(from)
	saved, err := m.counter()
	if err != nil {
		return err
	}
	whole, rest := g.sampleOf(m), g.sampleOf(m)
	whole.Figure, whole.Value = "saving-cpu", (end - cpu).Seconds()
	// All that it would take to save the rest is not in it.
	whole.Over = saved < int(reachable*float64(m.want))
	rest.Figure, rest.Value = "idle-cpu", 100*(end-idle).Seconds()/took.Seconds()
	return errors.Join(g.sample(whole), g.sample(rest))
}
