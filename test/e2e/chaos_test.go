package e2e_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
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
)

var chaosSeed = flag.Uint64("chaos.seed", 0, "seed of TestChaos, 0 for another one each time")

// The plugin, containerd and a shim are killed, alone and together, and started again
// in each order, while pods come and go, and a container ends. After each time the
// partitions are those of the pods that run, and no container has failed but those
// whose shim was killed.
func TestChaos(t *testing.T) {
	needPartitions(t)
	seed := *chaosSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %#x, to be given with -chaos.seed", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	n := startNode(t, node.Built(build))
	s := &siege{t: t, node: n, args: plugin.Args(configFile(t, often), n.NRISocket())}
	s.launch()
	t.Cleanup(func() {
		if err := s.plugin.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(s.plugin.Log())
		}
	})
	if err := s.plugin.Synchronized(deadline(t), 1); err != nil {
		t.Fatal(err)
	}
	k := &kubelet{siege: s, random: rand.New(rand.NewPCG(seed, 1)), pods: map[string]tenant{}}
	residents := []tenant{s.run("shop", 2), s.run("bank", 2)}

	const ofPlugin, ofContainerd, ofShim = "plugin", "containerd", "shim"
	rounds := []struct{ killed, restarted []string }{
		{[]string{ofPlugin}, []string{ofPlugin}},
		{[]string{ofContainerd}, []string{ofContainerd}},
		{[]string{ofShim}, nil},
		{[]string{ofPlugin, ofShim}, []string{ofPlugin}},
		{[]string{ofContainerd, ofShim}, []string{ofContainerd}},
		{[]string{ofPlugin, ofContainerd}, []string{ofPlugin, ofContainerd}},
		{[]string{ofPlugin, ofContainerd}, []string{ofContainerd, ofPlugin}},
		{[]string{ofPlugin, ofContainerd, ofShim}, []string{ofPlugin, ofContainerd}},
		{[]string{ofPlugin, ofContainerd, ofShim}, []string{ofContainerd, ofPlugin}},
	}
	random.Shuffle(len(rounds), func(i, j int) { rounds[i], rounds[j] = rounds[j], rounds[i] })
	for i, round := range rounds {
		random.Shuffle(len(round.killed), func(i, j int) {
			round.killed[i], round.killed[j] = round.killed[j], round.killed[i]
		})
		began := time.Now()
		victim := s.run(fmt.Sprintf("victim-%d", i), 1)
		before := s.plugin.Synchronizations()
		stop := k.start()
		// How long each thing takes is the machine's; this is only for it to come at
		// different times.
		pause := func() { time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond) }
		for _, what := range round.killed {
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
		if !slices.Contains(round.killed, ofShim) {
			// It ends while others may be away.
			s.must(syscall.Kill(victim.containers[0].PID, syscall.SIGKILL))
		}
		for _, what := range round.restarted {
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
		if len(round.restarted) > 0 {
			s.must(s.plugin.Synchronized(deadline(t), before+1))
		}
		s.waitEnded(victim.containers[0])
		s.waitNeeded()

		// What is not known is what a request left that was cut off.
		known := slices.Concat(residents, slices.Collect(maps.Values(k.pods)))
		s.removeOthers(known)
		var partitions []string
		var processes []border.Process
		for _, pod := range known {
			partitions = append(partitions, partition.OfPod(pod.ID))
			for _, c := range pod.containers {
				if running, err := c.Running(deadline(t)); !running || err != nil {
					t.Errorf("%s/%s: running: %v, %v", pod.Name, c.Name, running, err)
				}
				processes = append(processes, border.Process{Tenant: pod.ID, Name: pod.Name + "/" + c.Name, PID: c.PID})
			}
			unchanged(t, pod.containers...)
		}
		s.must(partition.WaitFor(deadline(t), partitions...))
		for _, pod := range residents {
			waitMerged(t, pod.containers[0], pod.containers[1])
		}
		if crossings, err := border.Crossings(processes...); err != nil || len(crossings) > 0 {
			t.Errorf("%v crossings, %v", crossings, err)
		}
		t.Logf("killed %v, restarted %v, with %d pods in %s", round.killed, round.restarted, len(known), time.Since(began).Round(time.Millisecond))
		if t.Failed() {
			t.FailNow()
		}
	}
	t.Logf("meanwhile %d pods were started and %d stopped, %d requests were cut off", k.started, k.stopped, k.cutOff)
	s.removeOthers(nil)
	noPartitions(t)
}

// siege is a node whose parts are killed.
type siege struct {
	t      *testing.T
	node   *node.Node
	args   []string // of the plugin
	plugin *plugin.Process
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
		c, err := p.Start(ctx, node.ContainerConfig{Name: fmt.Sprintf("c%d", i), MiB: 2, Seed: 1})
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
			k.started++
		}
	} else {
		name := names[k.random.IntN(len(names))]
		err = k.pods[name].Remove(deadline(k.t))
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
