package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"github.com/selective-ksm/selective-ksm/test/bench/result"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
)

const (
	containers = 4 // in each pod

	nodeTimeout = 20 * time.Minute
	// spare is what there is between the time in which nothing is done and the next merge.
	spare = 20 * time.Second
)

// node measures the plugin beside many containers, each with one small process.
func (g *guest) node(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	fill := func(_ string, f *fleet) error {
		for i := range g.pods {
			if err := f.sleepers(fmt.Sprint("pod-", i)); err != nil {
				return err
			}
		}
		return nil
	}
	// The interval is longer than the time in which there is to be no merge.
	config := logged + unbounded + fmt.Sprintf("startDelays: [0s]\ninterval: %[1]s\nmaxInterval: %[1]s\n", g.calm+g.quiet+spare)
	return g.beside(ctx, config, fill, func(_ *fleet, _ *nri, p *agent, took time.Duration) error {
		began := time.Now()
		there := func() (int, error) {
			names, err := partition.List()
			return len(names), err
		}
		if all, err := reach(ctx, there, g.pods, nodeTimeout); err != nil || !all {
			return errors.Join(fmt.Errorf("there are not %d partitions", g.pods), err)
		}
		took += time.Since(began)

		all := g.pods * containers
		if err := p.waitMerged(ctx, all); err != nil {
			return err
		}
		// Between the first merge and the next, by the interval, nothing is to be done.
		first := p.cpu()
		if err := wait(ctx, g.calm); err != nil {
			return err
		}
		idle := p.cpu()
		if err := wait(ctx, g.quiet); err != nil {
			return err
		}
		idle = p.cpu() - idle
		if merged := p.merged(); merged != all {
			return fmt.Errorf("%d merges while nothing was to be done", merged-all)
		}
		resident, err := p.resident()
		if err != nil {
			return err
		}
		before := p.cpu()
		if err := p.waitMerged(ctx, 2*all); err != nil {
			return err
		}
		round := p.cpu() - before
		what := fmt.Sprintf("%d in %d pods", all, g.pods)
		return errors.Join(
			g.sample(result.Sample{Figure: "reconcile", Case: what, Variant: product, Value: took.Seconds()}),
			g.sample(result.Sample{Figure: "resident", Case: what, Variant: product, Value: float64(resident) / (1 << 20)}),
			g.sample(result.Sample{Figure: "idle-vm", Case: what, Variant: product, Value: 100 * idle.Seconds() / g.quiet.Seconds()}),
			g.sample(result.Sample{Figure: "pass", Case: firstMerge, Variant: product, Value: first.Seconds()}),
			g.sample(result.Sample{Figure: "pass", Case: "no change", Variant: product, Value: round.Seconds()}),
		)
	})
}

// sleepers adds a pod of containers that do nothing.
func (f *fleet) sleepers(name string) error {
	pod, err := f.pod(name, "bench")
	for i := 0; i < containers && err == nil; i++ {
		ctr, addErr := f.container(pod, fmt.Sprint("container-", i))
		if err = addErr; err == nil {
			err = f.start(ctr, exec.Command("sleep", "infinity"))
		}
	}
	return err
}

// wait lets time pass in which nothing is done.
func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
