package e2e_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selective-ksm/selective-ksm/test/e2e/border"
	"github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/e2e/plugin"
	"github.com/selective-ksm/selective-ksm/test/workload/control"
)

var (
	chaosSeed   = flag.Uint64("chaos.seed", 0, "seed of TestChaos, 0 for another one each time")
	chaosLength = flag.Duration("chaos.length", 0, "how long TestChaos goes on, when everything was done once")
)

// What is killed.
const (
	ofPlugin     = "plugin"
	ofContainerd = "containerd"
	ofShim       = "shim"
)

// outage is what is killed together, and the order in which it is started again.
type outage struct{ killed, restarted []string }

var outages = []outage{
	{[]string{ofPlugin}, []string{ofPlugin}},
	{[]string{ofContainerd}, []string{ofContainerd}},
	{[]string{ofShim}, nil},
	beside,
	{[]string{ofPlugin, ofShim}, []string{ofPlugin}},
	{[]string{ofPlugin, ofContainerd}, []string{ofPlugin, ofContainerd}},
	{[]string{ofPlugin, ofContainerd}, []string{ofContainerd, ofPlugin}},
	{[]string{ofPlugin, ofContainerd, ofShim}, []string{ofPlugin, ofContainerd}},
	{[]string{ofPlugin, ofContainerd, ofShim}, []string{ofContainerd, ofPlugin}},
}

// beside is one that the plugin survives.
var beside = outage{[]string{ofContainerd, ofShim}, []string{ofContainerd}}

// The plugin, containerd and a shim are killed, alone and together, and started again
// in each order, while pods come and go, a container ends, containers write to their
// memory, and the machine is short of it. After each time the partitions are those of the
// pods that run, and no container has failed but those whose shim was killed. Nor has one
// lost data. All the time one pod goes on writing, and no page is in two pods. A plugin
// that lives through some of that has not grown.
func TestChaos(t *testing.T) {
	needPartitions(t)
	seed := *chaosSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %#x, to be given with -chaos.seed, for %s", seed, *chaosLength)

	// As often, but that it merges when memory is short, too.
	config := strings.Replace(often, "pressure: off\n", "", 1)
	if seed%2 == 1 {
		// One run in two, so that a wrapper that is mounted is tried as well.
		config += "optIn: wrapper\n"
	}
	t.Logf("by\n%s", config)
	n := startNode(t, node.Built(build))
	s := &siege{t: t, node: n, random: rand.New(rand.NewPCG(seed, 0)), guard: border.Watch()}
	s.args = append(plugin.Args(configFile(t, config), n.NRISocket()), "-metrics", metricsPort)
	s.launch()
	t.Cleanup(func() {
		if err := s.plugin.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(s.plugin.Log())
		}
	})
	s.must(s.plugin.Synchronized(deadline(t), 1))
	s.kubelet = &kubelet{siege: s, random: rand.New(rand.NewPCG(seed, 1)), pods: map[string]tenant{}}
	s.residents = []tenant{s.run("shop", 2), s.run("bank", 2)}
	s.writer = s.run("writer", 2)
	for i, c := range s.writer.containers {
		do(t, control.Request{Op: control.Churn, Count: siegePages / 2, Seed: uint64(i), Seeds: 4, Pause: 500 * time.Millisecond}, c)
	}
	s.guard.Add(processesOf(s.stay()...)...)
	stalled := press(t)

	began := time.Now()
	for {
		all := slices.Clone(outages)
		s.random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		for _, o := range all {
			s.suffer(o)
		}
		if time.Since(began) >= *chaosLength/2 {
			break
		}
	}
	s.launchAnew()
	before := stalled()
	var g growth
	for len(g) < fewest || time.Since(began) < *chaosLength {
		s.suffer(beside)
		s.rest()
		g = append(g, measure(t, s.plugin))
	}
	t.Logf("the plugin had %+v at first, and %+v after %d outages", g[0], g[len(g)-1], len(g))
	if err := g.check(); err != nil {
		t.Errorf("the plugin has grown: %v", err)
	}
	if after := stalled() - before; before == 0 || after == 0 {
		t.Errorf("something waited for memory for %s while all was killed, for %s afterwards", before, after)
	} else {
		t.Logf("something waited for memory for %s", (before + after).Round(time.Millisecond))
	}
	t.Logf("meanwhile %d pods were started and %d stopped, %d requests were cut off", s.kubelet.started, s.kubelet.stopped, s.kubelet.cutOff)
	for _, c := range s.writer.containers {
		if r := do(t, control.Request{Op: control.Settle}, c); r[0].Rounds == 0 {
			t.Errorf("%s never wrote", c.Name)
		} else {
			t.Logf("%s wrote %d times", c.Name, r[0].Rounds)
		}
	}
	stopGuard(t, s.guard)
	s.removeOthers(nil)
	noPartitions(t)
}

// suffer has things killed and started again, and looks at what is left.
func (s *siege) suffer(o outage) {
	s.t.Helper()
	killed := slices.Clone(o.killed)
	s.random.Shuffle(len(killed), func(i, j int) { killed[i], killed[j] = killed[j], killed[i] })
	began := time.Now()
	victim := s.run(fmt.Sprintf("victim-%d", s.suffered), 1)
	s.suffered++
	s.guard.AddBrief(processesOf(victim)...)
	before := s.plugin.Synchronizations()
	stop := s.kubelet.start()
	s.write()
	// How long each thing takes is the machine's; this is only for it to come at
	// different times.
	pause := func() { time.Sleep(time.Duration(s.random.IntN(400)) * time.Millisecond) }
	for _, what := range killed {
		pause()
		switch what {
		case ofPlugin:
			s.killPlugin()
		case ofContainerd:
			s.killContainerd()
		case ofShim:
			s.must(victim.containers[0].KillShim())
		}
	}
	if !slices.Contains(killed, ofShim) {
		// It ends while others may be away.
		s.must(syscall.Kill(victim.containers[0].PID, syscall.SIGKILL))
	}
	for _, what := range o.restarted {
		pause()
		switch what {
		case ofPlugin:
			s.launch()
			before = 0
		case ofContainerd:
			s.restartContainerd()
		}
	}
	pause()
	stop()
	if len(o.restarted) > 0 {
		s.must(s.plugin.Synchronized(deadline(s.t), before+1))
	}
	s.waitEnded(victim.containers[0])
	s.waitNeeded()
	s.settle()

	// What is not known is what a request left that was cut off.
	known := slices.Concat(s.stay(), slices.Collect(maps.Values(s.kubelet.pods)))
	s.removeOthers(known)
	for _, pod := range known {
		for _, c := range pod.containers {
			if running, err := c.Running(deadline(s.t)); !running || err != nil {
				s.t.Errorf("%s/%s: running: %v, %v", pod.Name, c.Name, running, err)
			}
		}
		if pod.ID != s.writer.ID { // that checks its memory itself
			unchanged(s.t, pod.containers...)
		}
	}
	s.must(partition.WaitFor(deadline(s.t), partitionsOf(known)...))
	for _, pod := range s.residents {
		waitMerged(s.t, pod.containers[0], pod.containers[1])
	}
	if crossings, err := border.Crossings(processesOf(known...)...); err != nil || len(crossings) > 0 {
		s.t.Errorf("%v crossings, %v", crossings, err)
	}
	s.t.Logf("killed %v, restarted %v, with %d pods in %s", killed, o.restarted, len(known), time.Since(began).Round(time.Millisecond))
	if s.t.Failed() {
		s.t.FailNow()
	}
}

// write has one container of each resident pod write to half of its memory, until settle.
func (s *siege) write() {
	s.t.Helper()
	for _, pod := range s.residents {
		do(s.t, control.Request{Op: control.Churn, Count: siegePages / 2, Seed: s.random.Uint64()}, pod.containers[0])
	}
}

// settle ends that, and makes the memory what it was.
func (s *siege) settle() {
	s.t.Helper()
	for _, pod := range s.residents {
		if r := do(s.t, control.Request{Op: control.Settle}, pod.containers[0]); r[0].Rounds == 0 {
			s.t.Errorf("%s never wrote", pod.Name)
		}
		do(s.t, control.Request{Op: control.Write, Count: siegePages / 2, Seed: siegeSeed}, pod.containers[0])
	}
}

// rest leaves alone those that stay, so that the plugin has what it had before.
func (s *siege) rest() {
	s.t.Helper()
	clear(s.kubelet.pods)
	s.removeOthers(s.stay())
	s.must(partition.WaitFor(deadline(s.t), partitionsOf(s.stay())...))
}

// stay are the pods that are never removed.
func (s *siege) stay() []tenant { return append(slices.Clone(s.residents), s.writer) }

// partitionsOf are those that pods have.
func partitionsOf(pods []tenant) []string {
	var names []string
	for _, pod := range pods {
		names = append(names, partition.OfPod(pod.ID))
	}
	return names
}

// processesOf are those that pods have, a tenant each.
func processesOf(pods ...tenant) []border.Process {
	var all []border.Process
	for _, pod := range pods {
		for _, c := range pod.containers {
			all = append(all, border.Process{Tenant: pod.ID, Name: pod.Name + "/" + c.Name, PID: c.PID})
		}
	}
	return all
}

// launchAnew starts the plugin once more.
func (s *siege) launchAnew() {
	s.t.Helper()
	s.killPlugin()
	s.launch()
	s.must(s.plugin.Synchronized(deadline(s.t), 1))
}

// siege is a node whose parts are killed.
type siege struct {
	t         *testing.T
	node      *node.Node
	random    *rand.Rand
	args      []string // of the plugin
	plugin    *plugin.Process
	kubelet   *kubelet
	residents []tenant // stay all the time
	writer    tenant   // stays, and writes all the time
	guard     *border.Guard
	suffered  int // outages
	// outages is odd while containerd is away.
	outages atomic.Int64
}

func (s *siege) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *siege) launch() {
	s.t.Helper()
	p, err := plugin.Launch(program, s.args...)
	s.must(err)
	s.plugin = p
}

func (s *siege) killPlugin() {
	s.t.Helper()
	s.must(s.plugin.Kill())
}

func (s *siege) killContainerd() {
	s.t.Helper()
	s.outages.Add(1)
	s.must(s.node.Kill())
}

func (s *siege) restartContainerd() {
	s.t.Helper()
	s.must(s.node.Restart(deadline(s.t)))
	s.outages.Add(1)
}

// What each container holds.
const (
	siegeMiB  = 2
	siegeSeed = 1
)

var siegePages = siegeMiB << 20 / os.Getpagesize()

// run runs a pod while nothing is killed.
func (s *siege) run(name string, containers int) tenant {
	s.t.Helper()
	pod, err := s.try(name, containers)
	s.must(err)
	return pod
}

// try runs a pod with containers that all hold the same.
func (s *siege) try(name string, containers int) (tenant, error) {
	ctx := deadline(s.t)
	p, err := s.node.RunPod(ctx, name)
	if err != nil {
		return tenant{}, err
	}
	pod := tenant{Pod: p}
	for i := range containers {
		c, err := p.Start(ctx, node.ContainerConfig{Name: fmt.Sprintf("c%d", i), MiB: siegeMiB, Seed: siegeSeed})
		if err != nil {
			return tenant{}, err
		}
		s.t.Cleanup(func() { c.Close() })
		pod.containers = append(pod.containers, c)
	}
	return pod, nil
}

// waitEnded waits until a container has no process, and the runtime knows that.
func (s *siege) waitEnded(c *node.Container) {
	s.t.Helper()
	poll(s.t, func(ctx context.Context) string {
		if err := syscall.Kill(c.PID, 0); !errors.Is(err, syscall.ESRCH) {
			return fmt.Sprintf("process %d of %s is there", c.PID, c.Pod.Name)
		}
		if running, err := c.Running(ctx); running || err != nil {
			return fmt.Sprintf("%s runs: %v, %v", c.Pod.Name, running, err)
		}
		return ""
	})
}

// waitNeeded waits until the partitions are those of the pods that have containers, as
// the runtime says.
func (s *siege) waitNeeded() {
	s.t.Helper()
	poll(s.t, func(ctx context.Context) string {
		r, err := s.node.CRI().ListContainers(ctx, &runtime.ListContainersRequest{})
		s.must(err)
		needed := map[string]bool{}
		for _, c := range r.Containers {
			if c.State == runtime.ContainerState_CONTAINER_RUNNING || c.State == runtime.ContainerState_CONTAINER_CREATED {
				needed[partition.OfPod(c.PodSandboxId)] = true
			}
		}
		there, err := partition.List()
		s.must(err)
		if want := slices.Sorted(maps.Keys(needed)); !slices.Equal(there, want) {
			return fmt.Sprintf("partitions are %q, the pods need %q", there, want)
		}
		return ""
	})
}

// removeOthers removes all pods but some.
func (s *siege) removeOthers(but []tenant) {
	s.t.Helper()
	r, err := s.node.CRI().ListPodSandbox(deadline(s.t), &runtime.ListPodSandboxRequest{})
	s.must(err)
	for _, p := range r.Items {
		if slices.ContainsFunc(but, func(pod tenant) bool { return pod.ID == p.Id }) {
			continue
		}
		_, err := s.node.CRI().StopPodSandbox(deadline(s.t), &runtime.StopPodSandboxRequest{PodSandboxId: p.Id})
		s.must(err)
		_, err = s.node.CRI().RemovePodSandbox(deadline(s.t), &runtime.RemovePodSandboxRequest{PodSandboxId: p.Id})
		s.must(err)
	}
}

// kubelet starts and stops pods, without rest.
type kubelet struct {
	*siege
	random *rand.Rand
	// pods run, by their names. It is for the kubelet's goroutine while there is one, as
	// all below is.
	pods                     map[string]tenant
	started, stopped, cutOff int
}

// start begins, and returns what ends it, when it has had enough to do.
func (k *kubelet) start() (stop func()) {
	const enough = 3
	over := make(chan struct{})
	var working sync.WaitGroup
	before := k.started + k.stopped
	working.Go(func() {
		for {
			select {
			case <-over:
				if k.started+k.stopped >= before+enough || k.t.Failed() {
					return
				}
			default:
			}
			k.step()
		}
	})
	stop = sync.OnceFunc(func() {
		close(over)
		working.Wait()
	})
	k.t.Cleanup(stop)
	return stop
}

// step starts or stops a pod. That may fail if containerd is away meanwhile, and only
// then.
func (k *kubelet) step() {
	const most = 4
	outages := k.outages.Load()
	if outages%2 == 1 {
		time.Sleep(10 * time.Millisecond)
		return
	}
	var err error
	if names := slices.Sorted(maps.Keys(k.pods)); len(names) == 0 || len(names) < most && k.random.IntN(2) == 0 {
		var pod tenant
		name := fmt.Sprintf("pod-%d", k.started+k.cutOff)
		if pod, err = k.try(name, 1+k.random.IntN(2)); err == nil {
			k.pods[name] = pod
			k.guard.AddBrief(processesOf(pod)...)
			k.started++
		}
	} else {
		name := names[k.random.IntN(len(names))]
		err = k.pods[name].Remove(deadline(k.t))
		for _, c := range k.pods[name].containers {
			c.Close()
		}
		delete(k.pods, name)
		if err == nil {
			k.stopped++
		}
	}
	if err != nil {
		k.cutOff++
		if k.outages.Load() == outages {
			k.t.Errorf("while containerd was there: %v", err)
		}
	}
}
