package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/selective-ksm/selective-ksm/test/bench/result"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
)

// patience is when a merge is given up.
const patience = 90 * time.Second

// merge measures how long merging takes.
func (g *guest) merge(ctx context.Context) error {
	for round := range g.rounds {
		slow := round == 0
		for _, equal := range g.equal {
			s := result.Sample{Case: fmt.Sprint(equal, " % equal"), X: float64(equal)}
			if err := g.mergeOf(ctx, "equal", s, someProcesses, equal, slow); err != nil {
				return err
			}
		}
		for _, processes := range g.processes {
			s := result.Sample{Case: fmt.Sprint(processes, " processes"), X: float64(processes)}
			if err := g.mergeOf(ctx, "processes", s, processes, someEqual, slow); err != nil {
				return err
			}
		}
	}
	return nil
}

// mergeOf measures one case by all means that the kernel has, those that are slow too if
// asked for.
func (g *guest) mergeOf(ctx context.Context, figure string, s result.Sample, processes, equal int, slow bool) (err error) {
	pages := pagesIn(g.size.merge) / processes
	c, err := g.crowd(ctx, processes, pages, pages*equal/100)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.kill()) }()
	gib := float64(g.size.merge) / 1024
	if g.selective {
		s.Variant = onRequest
		t, err := c.onRequest()
		if err != nil {
			return err
		}
		return g.took(figure, s, t, gib)
	}
	d, err := findKsmd()
	if err != nil {
		return err
	}
	for _, m := range modes {
		if m.slow && !slow {
			continue
		}
		s.Variant = m.name
		var t times
		if t, s.Over, err = d.merges(ctx, m, c.saving(), patience); err != nil {
			return err
		}
		if err := errors.Join(d.unmerge(), g.took(figure, s, t, gib)); err != nil {
			return err
		}
	}
	return nil
}

const partitionName = "bench"

// onRequest merges all, and returns what it took.
func (c *crowd) onRequest() (t times, err error) {
	err = withPartition(partitionName, func() error {
		t, err = byRequest(func() error { return c.mergeIn(partitionName, c.actors...) })
		return errors.Join(err, saves(partitionName, c.saving()))
	})
	return t, err
}

// byKsmd has ksmd merge all, as fast as it can, and returns what that took.
func (c *crowd) byKsmd(ctx context.Context, saving int) (times, error) {
	d, err := findKsmd()
	if err != nil {
		return times{}, err
	}
	t, over, err := d.merges(ctx, modes[0], saving, patience)
	if err == nil && over {
		err = fmt.Errorf("ksmd has not merged all within %v", patience)
	}
	return t, errors.Join(err, d.unmerge())
}

// partitioned measures how merging the same processes in more partitions takes longer, and
// how long ksmd takes, which has one for all. Each two of them have the same memory.
func (g *guest) partitioned(ctx context.Context) (err error) {
	c, err := g.twins(ctx, g.pairs, pagesIn(g.size.merge)/(2*g.pairs))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.kill()) }()
	for range g.rounds {
		s := result.Sample{Figure: "partitions", Case: onePartition, Variant: flatOut, X: 1}
		if !g.selective {
			took, err := c.byKsmd(ctx, g.pairs*c.pages)
			if err != nil {
				return err
			}
			s.Value = took.cpu.Seconds()
			if err := g.sample(s); err != nil {
				return err
			}
			continue
		}
		s.Variant = onRequest
		var x, y []float64
		for _, partitions := range g.partitions {
			took, err := c.inPartitions(partitions, g.pairs)
			if err != nil {
				return fmt.Errorf("%d partitions: %w", partitions, err)
			}
			if s.X, s.Value = float64(partitions), took.cpu.Seconds(); partitions > 1 {
				s.Case = fmt.Sprint(partitions, " partitions")
			}
			x, y = append(x, s.X), append(y, s.Value)
			if err := g.sample(s); err != nil {
				return err
			}
		}
		if err := g.growth("with partitions", onRequest, x, y); err != nil {
			return err
		}
	}
	return nil
}

// inPartitions merges pairs of processes, which so many partitions have in equal parts.
func (c *crowd) inPartitions(partitions, pairs int) (t times, err error) {
	name := func(i int) string { return fmt.Sprintf("%s-%d", partitionName, i*partitions/len(c.actors)) }
	var added []string
	defer func() {
		for _, n := range added {
			err = errors.Join(err, partition.Remove(n))
		}
	}()
	t, err = byRequest(func() error {
		for i, a := range c.actors {
			n := name(i)
			if len(added) == 0 || added[len(added)-1] != n {
				if err := partition.Add(n); err != nil {
					return err
				}
				added = append(added, n)
			}
			if err := c.mergeIn(n, a); err != nil {
				return err
			}
		}
		return nil
	})
	for _, n := range added {
		err = errors.Join(err, saves(n, c.pages*pairs/partitions))
	}
	return t, err
}

// sized measures how merging more memory takes longer.
func (g *guest) sized(ctx context.Context) error {
	variant := onRequest
	if !g.selective {
		variant = flatOut
	}
	var x, y []float64
	for _, mib := range g.memory {
		const processes = 4
		pages := pagesIn(mib) / processes
		c, err := g.crowd(ctx, processes, pages, pages*someEqual/100)
		if err != nil {
			return err
		}
		var t times
		if g.selective {
			t, err = c.onRequest()
		} else {
			t, err = c.byKsmd(ctx, c.saving())
		}
		if err := errors.Join(err, c.kill()); err != nil {
			return err
		}
		x, y = append(x, float64(mib)), append(y, t.cpu.Seconds())
		s := result.Sample{Figure: "memory", Case: fmt.Sprint(mib, " MiB"), Variant: variant, X: float64(mib), Value: t.cpu.Seconds()}
		if err := g.sample(s); err != nil {
			return err
		}
	}
	return g.growth("with memory", variant, x, y)
}

// growth tells the exponent with which y grows with x.
func (g *guest) growth(with, variant string, x, y []float64) error {
	return g.sample(result.Sample{Figure: "growth", Case: with, Variant: variant, Value: exponent(x, y)})
}

// exponent is that of the power of x that fits y best, by least squares of the logarithms.
func exponent(x, y []float64) float64 {
	var sx, sy, sxx, sxy float64
	n := float64(len(x))
	for i := range x {
		lx, ly := math.Log(x[i]), math.Log(y[i])
		sx, sy, sxx, sxy = sx+lx, sy+ly, sxx+lx*lx, sxy+lx*ly
	}
	return (n*sxy - sx*sy) / (n*sxx - sx*sx)
}
