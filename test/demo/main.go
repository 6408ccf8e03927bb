// Command demo shows Selective KSM at work: two pods of two containers, all
// four with the same data, under a real containerd on a kernel with
// partitions. It prints what was merged, checks it against the page tables,
// and exits with an error if any of it is not as promised.
//
// It runs as root in the test VM; see make demo.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/selective-ksm/selective-ksm/test/e2e/border"
	"github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/e2e/plugin"
	"github.com/selective-ksm/selective-ksm/test/pages"
	"github.com/selective-ksm/selective-ksm/test/workload/control"
)

const (
	mib = 1 << 20

	// dataMiB is what each container holds, the same in all of them.
	dataMiB = 64
	seed    = 1

	// least is how much of it must be merged, in percent.
	least = 95
)

// The plugin merges nothing while the containers fill their memory. Then it is
// started anew, takes over what runs, and merges it: so the first merge finds all
// of the data.
const (
	whileFilling = "startDelays: []\n" + always
	whenFilled   = "startDelays: [0s]\n" + always
	// Nothing but the start of a container has it merged, as fast as it can be.
	always = "interval: 1000h\npressure: off\nbudget: 200%\npartitionBudget: 100%\nlogFormat: json\n"
)

func main() {
	build := flag.String("build", "build", "directory with what make has built")
	flag.Parse()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	if err := run(ctx, *build); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, build string) (err error) {
	if !partition.Supported() {
		return errors.New("this kernel has no partitions in /sys/kernel/mm/ksm: make demo boots one that has")
	}
	say("Starting containerd and the plugin.")
	n, err := node.Start(ctx, node.Built(build))
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, n.Log())
		}
		err = errors.Join(err, n.Stop(context.WithoutCancel(ctx)))
	}()
	return show(ctx, n, filepath.Join(build, "bin", "selective-ksm"))
}

// withPlugin does something while the plugin runs.
func withPlugin(ctx context.Context, n *node.Node, program, config string, do func(*plugin.Process) error) (err error) {
	path := n.Path("selective-ksm.yaml")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		return err
	}
	p, err := plugin.Start(ctx, program, path, n.NRISocket())
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, p.Stop())
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, p.Log())
		}
	}()
	return do(p)
}

func show(ctx context.Context, n *node.Node, program string) error {
	guard := border.Watch()
	var tenants []*tenant
	err := withPlugin(ctx, n, program, whileFilling, func(*plugin.Process) (err error) {
		say("Starting two pods of two containers, all with the same %d MiB of data.", dataMiB)
		tenants, err = startTenants(ctx, n, guard)
		return err
	})
	if err == nil {
		err = withPlugin(ctx, n, program, whenFilled, func(p *plugin.Process) error {
			return showTenants(ctx, p, guard, tenants)
		})
	}
	if _, _, guardErr := guard.Stop(); err == nil {
		err = guardErr
	}
	return err
}

func showTenants(ctx context.Context, p *plugin.Process, guard *border.Guard, tenants []*tenant) error {
	if err := showMerges(ctx, p, tenants); err != nil {
		return err
	}
	if err := showPages(tenants); err != nil {
		return err
	}
	guard.Sweep()
	sweeps, crossings, err := guard.Stop()
	if err != nil {
		return err
	}
	say("  %-26s %5d   at any of %d looks since the start", "shop and bank", len(crossings), sweeps)
	if len(crossings) > 0 {
		return fmt.Errorf("pages crossed the border between pods: %v", crossings[0])
	}
	if err := checkData(ctx, tenants); err != nil {
		return err
	}
	say("\nAll four containers have checked their data: not a bit has changed.")

	if err := forEach(tenants, func(t *tenant) error { return t.pod.Remove(ctx) }); err != nil {
		return err
	}
	if err := partition.WaitFor(ctx); err != nil {
		return fmt.Errorf("after the pods were stopped: %w", err)
	}
	say("Both pods are stopped: no partition is left.")
	return nil
}

// tenant is a pod with its containers.
type tenant struct {
	name       string
	names      []string // of the containers to be
	pod        *node.Pod
	containers []*node.Container
}

// startTenants starts all pods and containers, and puts each under guard as
// soon as it runs, which is before it is merged.
func startTenants(ctx context.Context, n *node.Node, guard *border.Guard) ([]*tenant, error) {
	tenants := []*tenant{
		{name: "shop", names: []string{"web", "worker"}},
		{name: "bank", names: []string{"web", "worker"}},
	}
	err := forEach(tenants, func(t *tenant) (err error) {
		if t.pod, err = n.RunPod(ctx, t.name); err != nil {
			return err
		}
		for _, name := range t.names {
			c, err := t.pod.Start(ctx, node.ContainerConfig{Name: name, MiB: dataMiB, Seed: seed})
			if err != nil {
				return err
			}
			guard.Add(border.Process{Tenant: t.name, Name: name, PID: c.PID})
			t.containers = append(t.containers, c)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	sum := tenants[0].containers[0].Hello.Sum
	for _, t := range tenants {
		for _, c := range t.containers {
			if c.Hello.Sum != sum {
				return nil, fmt.Errorf("%s/%s does not hold the same data", t.name, c.Name)
			}
		}
	}
	return tenants, nil
}

// forEach does something for all tenants at once.
func forEach(tenants []*tenant, do func(*tenant) error) error {
	errs := make([]error, len(tenants))
	var all sync.WaitGroup
	for i, t := range tenants {
		all.Go(func() { errs[i] = do(t) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// showMerges waits for each pod's first merge, and prints what the plugin says of
// it.
func showMerges(ctx context.Context, p *plugin.Process, tenants []*tenant) error {
	say("\n%-11s %8s %8s %8s %8s  %s", "", "offered", "merged", "saved", "time", "partition")
	for _, t := range tenants {
		var ids []string
		var ready time.Time
		for _, c := range t.containers {
			ids = append(ids, c.ID)
			ready = c.Ready // they were started one after the other
		}
		lines, err := p.Merged(ctx, ready, ids...)
		if err != nil {
			return fmt.Errorf("first merge of pod %s: %w", t.name, err)
		}
		for _, l := range lines {
			say("%-11s %4d MiB %4d MiB %4d MiB %6.2f s  %s", l.Pod+"/"+l.Container,
				l.Offered/mib, l.Merged/mib, l.Saved/mib, l.Took().Seconds(), l.Partition)
			if want := partition.OfPod(t.pod.ID); l.Partition != want {
				return fmt.Errorf("%s/%s was merged in %s, not in its pod's %s", l.Pod, l.Container, l.Partition, want)
			}
		}
	}
	return nil
}

// showPages counts the physical pages that the containers of each pod share.
func showPages(tenants []*tenant) error {
	say("\nPhysical pages that two processes have in common, from their page tables:")
	for _, t := range tenants {
		a, b := t.containers[0], t.containers[1]
		inA, err := data(a)
		if err != nil {
			return err
		}
		inB, err := data(b)
		if err != nil {
			return err
		}
		merged, err := pages.Merged(inA, inB)
		if err != nil {
			return err
		}
		say("  %-26s %5d   of %d with data, %.1f %%", t.name+"/"+a.Name+" and "+t.name+"/"+b.Name,
			merged, len(inA), 100*float64(merged)/float64(len(inA)))
		if merged*100 < len(inA)*least {
			return fmt.Errorf("less than %d %% of the data in pod %s is merged", least, t.name)
		}
	}
	return nil
}

func data(c *node.Container) ([]pages.Page, error) {
	return pages.Range(c.PID, c.Hello.Start, c.Hello.End)
}

func checkData(ctx context.Context, tenants []*tenant) error {
	return forEach(tenants, func(t *tenant) error {
		for _, c := range t.containers {
			r, err := c.Do(ctx, control.Request{Op: control.Check})
			if err != nil {
				return fmt.Errorf("%s/%s: %w", t.name, c.Name, err)
			}
			if r.Sum != c.Hello.Sum {
				return fmt.Errorf("%s/%s: the data sums to %#x, summed to %#x before it was merged", t.name, c.Name, r.Sum, c.Hello.Sum)
			}
		}
		return nil
	})
}

func say(format string, args ...any) { fmt.Printf(format+"\n", args...) }
