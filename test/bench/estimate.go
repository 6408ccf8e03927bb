package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine/estimate"
	"github.com/selective-ksm/selective-ksm/hooks/inventory"
	"github.com/selective-ksm/selective-ksm/test/bench/result"
)

// estimated measures what an estimate takes for reading memory, next to merging the same.
func (g *guest) estimated(ctx context.Context) error {
	for range g.rounds {
		for _, equal := range []int{0, someEqual} {
			if err := g.estimatedOf(ctx, equal); err != nil {
				return err
			}
		}
	}
	return nil
}

func (g *guest) estimatedOf(ctx context.Context, equal int) (err error) {
	pages := pagesIn(g.size.merge) / someProcesses
	c, err := g.crowd(ctx, someProcesses, pages, pages*equal/100)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.kill()) }()
	var pids []int
	for _, a := range c.actors {
		pids = append(pids, a.Pid)
	}
	all, err := inventory.Processes(pids...)
	if err != nil {
		return err
	}
	r, err := estimate.Run(ctx, all, estimate.Options{Config: config.Default(), Rate: 1})
	if err != nil {
		return err
	}
	s := result.Sample{Figure: "estimate", Case: fmt.Sprint(equal, " % equal"), Variant: reading}
	gib := float64(g.size.merge) / 1024
	s.Value = r.Own.CPUSeconds / gib
	if err := g.sample(s); err != nil {
		return err
	}
	var t times
	if g.selective {
		s.Variant = onRequest
		t, err = c.onRequest()
	} else {
		s.Variant = flatOut
		t, err = c.byKsmd(ctx, c.saving())
	}
	if err != nil {
		return err
	}
	s.Value = t.cpu.Seconds() / gib
	return g.sample(s)
}
