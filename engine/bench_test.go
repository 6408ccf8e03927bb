package engine

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime/debug"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/budget"
	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/memory"
)

// quick is a kernel that does nothing, at once.
type quick struct{ kernel.Kernel }

func (quick) Features() kernel.Features                              { return kernel.Features{Bind: true} }
func (quick) AddPartition(string) error                              { return nil }
func (quick) RemovePartition(string) error                           { return nil }
func (quick) Partitions() ([]string, error)                          { return nil, nil }
func (quick) Recover(context.Context) error                          { return nil }
func (quick) Bind(string, int) error                                 { return nil }
func (quick) Merge(context.Context, string, int, kernel.Range) error { return nil }
func (quick) Counters(string) (kernel.Counters, error)               { return kernel.Counters{}, nil }

// anyMemory is the machine, where memory is offered that is not mergeable.
type anyMemory struct{ linux }

func (a anyMemory) find(ctx context.Context, pid int, o memory.Options) (memory.Offer, error) {
	o.Any = true
	offer, err := a.linux.find(ctx, pid, o)
	offer.Mergeable = true
	return offer, err
}

// maxRound is what a round over a large node may take that changes nothing.
const maxRound = time.Second

// node is an engine, and 1,000 containers in 250 partitions, each with a process.
func node(b *testing.B, s Settings) (*Engine, []Container) {
	b.Helper()
	if os.Getuid() != 0 {
		b.Skip("not root")
	}
	const pods, containers = 250, 4
	log := logrus.New()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { null.Close() })
	log.SetOutput(null)
	log.SetFormatter(&logrus.JSONFormatter{})
	e := New(Options{Kernel: quick{}, Owned: func(string) bool { return true }, Log: log, Settings: s})
	e.host = anyMemory{linux{cgroupRoot: cgroup.DefaultRoot}}
	var all []Container
	for pod := range pods {
		for i := range containers {
			name := fmt.Sprintf("sksm-test-%d-%d", pod, i)
			dir := newCgroup(b, name)
			sleep := exec.Command("sleep", "infinity")
			if err := sleep.Start(); err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { sleep.Process.Kill(); sleep.Wait() })
			enter(b, dir, sleep.Process.Pid)
			all = append(all, Container{ID: name, CgroupsPath: "/" + name, Partition: fmt.Sprint("sksm-test-", pod)})
		}
	}
	return e, all
}

var unlimited = budget.Limits{Workers: 2}

// BenchmarkRound is one round over containers that have done nothing since the last. A
// round of that kind asks the kernel's KSM for nothing.
func BenchmarkRound(b *testing.B) {
	e, containers := node(b, Settings{Interval: time.Hour, MaxInterval: time.Hour, Budget: unlimited})
	e.mu.Lock()
	for _, c := range containers {
		e.join(c).exists = true
		e.start(c.ID)
	}
	e.mu.Unlock()
	for _, p := range e.partitions {
		p.merge(b.Context())
		for _, m := range p.running(true) {
			if len(m.seen) != 1 {
				b.Fatalf("%s was not merged: %v", m.ID, m.reason.text)
			}
		}
	}
	for b.Loop() {
		for _, p := range e.partitions {
			p.passes = 1 // not the one in which nobody is passed over
			p.merge(b.Context())
		}
	}
	if round := b.Elapsed() / time.Duration(b.N); round >= maxRound {
		b.Errorf("a round takes %v, and may take %v", round, maxRound)
	}
}

// maxIdle is the part of a CPU, in percent, that an engine may take that has nothing to do.
const maxIdle = 0.5

// BenchmarkIdle is an engine that has merged all containers, and watches them.
func BenchmarkIdle(b *testing.B) {
	const window = 10 * time.Second
	e, containers := node(b, Settings{
		StartDelays: []time.Duration{0}, Interval: time.Hour, MaxInterval: time.Hour, Budget: unlimited, Pressure: PressureNode,
	})
	ctx, cancel := context.WithCancel(b.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() { e.Run(ctx) })
	if err := e.Reconcile(nil, containers); err != nil {
		b.Fatal(err)
	}
	merged := func() (n int) {
		for _, p := range e.Status() {
			for _, c := range p.Containers {
				if !c.Result.At.IsZero() {
					n++
				}
			}
		}
		return n
	}
	for tick := time.NewTicker(100 * time.Millisecond); merged() < len(containers); <-tick.C {
	}
	spent := func() time.Duration {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	// Go would give back to the system for a while what it has taken for that, and how long
	// depends on what that costs.
	debug.FreeOSMemory()
	var percent float64
	for b.Loop() {
		before := spent()
		time.Sleep(window)
		percent += 100 * (spent() - before).Seconds() / window.Seconds()
	}
	percent /= float64(b.N)
	b.ReportMetric(percent, "%-of-a-CPU")
	if percent > maxIdle {
		b.Errorf("it takes %.2f %% of a CPU, and may take %v %%", percent, maxIdle)
	}
}
