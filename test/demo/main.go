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

// layout is who runs what.
var layout = []struct {
	pod        string
	containers []string
}{
	{"shop", []string{"web", "worker"}},
	{"bank", []string{"web", "worker"}},
}

// pluginConfig leaves the containers of a pod the time to fill their memory, so
// that the first merge finds all of it.
const pluginConfig = `startDelays: [5s]
interval: 5s
logFormat: json
`

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
	config := n.Path("selective-ksm.yaml")
	if err := os.WriteFile(config, []byte(pluginConfig), 0o644); err != nil {
		return err
	}
	p, err := plugin.Start(ctx, filepath.Join(build, "bin", "selective-ksm"), config, n.NRISocket())
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, p.Stop())
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, p.Log())
		}
	}()
	return show(ctx, n, p)
}

func show(ctx context.Context, n *node.Node, p *plugin.Process) error {
	guard := border.Watch()
	pods, containers, err := startPods(ctx, n, guard)
	if err == nil {
		err = showMerges(ctx, p, containers)
	}
	if err == nil {
		err = showPages(containers)
	}
	guard.Sweep()
	sweeps, crossings, guardErr := guard.Stop()
	if err := errors.Join(err, guardErr); err != nil {
		return err
	}
	say("  shop and bank              %5d   at any of %d looks since the start", len(crossings), sweeps)
	if len(crossings) > 0 {
		return fmt.Errorf("pages crossed the border between pods: %v", crossings[0])
	}
	if err := checkData(ctx, containers); err != nil {
		return err
	}
	say("\nAll four containers have checked their data: not a bit has changed.")

	for _, pod := range pods {
		if err := pod.Remove(ctx); err != nil {
			return err
		}
	}
	if err := partition.WaitFor(ctx); err != nil {
		return fmt.Errorf("after the pods were stopped: %w", err)
	}
	say("Both pods are stopped: no partition is left.")
	return nil
}

// startPods starts all pods and containers, and puts each under guard as soon
// as it runs, which is before it is merged.
func startPods(ctx context.Context, n *node.Node, guard *border.Guard) (pods []*node.Pod, containers []*node.Container, err error) {
	say("Starting two pods of two containers, all with the same %d MiB of data.", dataMiB)
	for _, l := range layout {
		pod, err := n.RunPod(ctx, l.pod)
		if err != nil {
			return nil, nil, err
		}
		pods = append(pods, pod)
		for _, name := range l.containers {
			c, err := pod.Start(ctx, node.ContainerConfig{Name: name, MiB: dataMiB, Seed: seed})
			if err != nil {
				return nil, nil, err
			}
			guard.Add(border.Process{Tenant: l.pod, Name: name, PID: c.PID})
			containers = append(containers, c)
		}
	}
	for _, c := range containers {
		if c.Hello.Sum != containers[0].Hello.Sum {
			return nil, nil, fmt.Errorf("%s/%s does not hold the same data", c.Pod.Name, c.Name)
		}
	}
	return pods, containers, nil
}

// showMerges waits for each pod's first merge with all containers ready, and
// prints what the plugin says of it.
func showMerges(ctx context.Context, p *plugin.Process, containers []*node.Container) error {
	say("\n%-11s %8s %8s %8s %8s  %s", "", "offered", "merged", "saved", "time", "partition")
	for _, c := range containers {
		l, err := p.Wait(ctx, 1, plugin.Merged(c.ID, podReady(c.Pod, containers)))
		if err != nil {
			return fmt.Errorf("first merge of %s/%s: %w", c.Pod.Name, c.Name, err)
		}
		say("%-11s %4d MiB %4d MiB %4d MiB %6.2f s  %s", c.Pod.Name+"/"+c.Name,
			l.Offered/mib, l.Merged/mib, l.Saved/mib, l.Took().Seconds(), l.Partition)
		if want := partition.OfPod(c.Pod.ID); l.Partition != want {
			return fmt.Errorf("%s/%s was merged in %s, not in its pod's %s", c.Pod.Name, c.Name, l.Partition, want)
		}
	}
	return nil
}

// podReady is when the last container of a pod had its memory filled.
func podReady(pod *node.Pod, containers []*node.Container) (ready time.Time) {
	for _, c := range containers {
		if c.Pod == pod && c.Ready.After(ready) {
			ready = c.Ready
		}
	}
	return ready
}

// showPages counts the physical pages that the containers of each pod share.
func showPages(containers []*node.Container) error {
	say("\nPhysical pages that two processes have in common, from their page tables:")
	for i, a := range containers {
		for _, b := range containers[i+1:] {
			if a.Pod != b.Pod {
				continue
			}
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
			say("  %-26s %5d   of %d with data, %.1f %%", a.Pod.Name+"/"+a.Name+" and "+b.Pod.Name+"/"+b.Name,
				merged, len(inA), 100*float64(merged)/float64(len(inA)))
			if merged*100 < len(inA)*least {
				return fmt.Errorf("less than %d %% of the data in pod %s is merged", least, a.Pod.Name)
			}
		}
	}
	return nil
}

func data(c *node.Container) ([]pages.Page, error) {
	return pages.Range(c.PID, c.Hello.Start, c.Hello.End)
}

func checkData(ctx context.Context, containers []*node.Container) error {
	for _, c := range containers {
		r, err := c.Do(ctx, control.Request{Op: control.Check})
		if err != nil {
			return fmt.Errorf("%s/%s: %w", c.Pod.Name, c.Name, err)
		}
		if r.Sum != c.Hello.Sum {
			return fmt.Errorf("%s/%s: the data sums to %#x, summed to %#x before it was merged", c.Pod.Name, c.Name, r.Sum, c.Hello.Sum)
		}
	}
	return nil
}

func say(format string, args ...any) { fmt.Printf(format+"\n", args...) }
