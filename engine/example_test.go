package engine_test

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/budget"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// names is a kernel that keeps the names of partitions, and nothing else. A program
// opens the kernel that it runs on with package detect.
type names struct {
	kernel.Kernel
	mu  sync.Mutex
	all map[string]bool
}

func (n *names) Features() kernel.Features { return kernel.Features{} }

func (n *names) Recover(context.Context) error { return nil }

func (n *names) Partitions() ([]string, error) { return nil, nil }

func (n *names) AddPartition(name string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.all[name] = true
	return nil
}

func (n *names) RemovePartition(name string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.all, name)
	return nil
}

// A container runtime creates a container, which becomes a member of its pod's
// partition before it runs, and is merged from its start on.
func Example() {
	log := logrus.New()
	log.SetOutput(io.Discard)
	e := engine.New(engine.Options{
		Kernel: &names{all: map[string]bool{}},
		Owned:  func(partition string) bool { return strings.HasPrefix(partition, "sksm-") },
		Settings: engine.Settings{
			StartDelays: []time.Duration{0, 10 * time.Second},
			Interval:    10 * time.Minute,
			MaxInterval: time.Hour,
			Budget:      budget.Limits{Total: 0.05, Partition: 0.05, Window: time.Minute, Workers: 2},
		},
		Log: log,
	})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { e.Run(ctx) })

	web := engine.Container{ID: "1a2b", Name: "web", Pod: "shop", CgroupsPath: "/kubepods/shop/1a2b", Partition: "sksm-shop"}
	if err := e.Add(ctx, web); err != nil {
		fmt.Println(err)
	}
	for _, p := range e.Status() {
		for _, c := range p.Containers {
			fmt.Printf("%s has %s/%s, running: %v\n", p.Name, c.Pod, c.Name, c.Running)
		}
	}
	// e.Start("1a2b") when it runs, and e.Stop("1a2b") at its end.

	cancel()
	running.Wait()
	// Output: sksm-shop has shop/web, running: false
}
