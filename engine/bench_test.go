package engine

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

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

// BenchmarkRound is one round over 1,000 containers in 250 partitions, which have
// processes and have done nothing since the last. A round of that kind asks the
// kernel's KSM for nothing.
func BenchmarkRound(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skip("not root")
	}
	const pods, containers = 250, 4
	log := logrus.New()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer null.Close()
	log.SetOutput(null)
	log.SetFormatter(&logrus.JSONFormatter{})
	e := New(Options{
		Kernel: quick{}, Owned: func(string) bool { return true }, Log: log,
		Settings: Settings{Interval: time.Hour, MaxInterval: time.Hour, Budget: budget.Limits{Workers: 2}},
	})
	e.host = anyMemory{linux{cgroupRoot: cgroup.DefaultRoot}}
	var partitions []*partition
	for pod := range pods {
		p := e.partition(fmt.Sprint("sksm-test-", pod))
		partitions = append(partitions, p)
		for i := range containers {
			name := fmt.Sprintf("sksm-test-%d-%d", pod, i)
			dir := newCgroup(b, name)
			sleep := exec.Command("sleep", "infinity")
			if err := sleep.Start(); err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { sleep.Process.Kill(); sleep.Wait() })
			enter(b, dir, sleep.Process.Pid)
			e.mu.Lock()
			e.join(Container{ID: name, CgroupsPath: "/" + name, Partition: p.name})
			e.start(name)
			e.mu.Unlock()
		}
		p.exists = true
	}
	for _, p := range partitions {
		p.merge(b.Context())
		for _, m := range p.running(true) {
			if len(m.seen) != 1 {
				b.Fatalf("%s was not merged: %v", m.ID, m.reason.text)
			}
		}
	}
	for b.Loop() {
		for _, p := range partitions {
			p.passes = 1 // not the one in which nobody is passed over
			p.merge(b.Context())
		}
	}
	if round := b.Elapsed() / time.Duration(b.N); round >= maxRound {
		b.Errorf("a round takes %v, and may take %v", round, maxRound)
	}
}
