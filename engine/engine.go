// Package engine keeps the partitions that containers need, and decides when their
// memory is merged.
//
// Each partition has one worker, which alone asks the kernel for anything about
// it: it adds the partition, merges its members, unmerges those that leave, and
// removes it with the last of them. All else only changes what the worker will
// find, so that no caller waits for a merge.
//
// The kernel and the runtime are the truth, and the engine keeps no state of its
// own beyond its life: when it ends, partitions stay as they are, and the next
// engine adopts them in [Engine.Reconcile].
package engine

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// Container is a container whose memory belongs to a partition.
type Container struct {
	// ID is the runtime's id, by which the container is known here.
	ID string
	// Name, Pod and Namespace are what people call it.
	Name, Pod, Namespace string
	// SandboxID is the runtime's id of its pod sandbox.
	SandboxID string
	// CgroupsPath is its cgroup, in a form that package cgroup knows. All processes
	// in that cgroup are the container's.
	CgroupsPath string
	// Partition is the name of its partition.
	Partition string
}

// Options are what an engine is made of.
type Options struct {
	// Kernel does the merging.
	Kernel kernel.Kernel
	// Owned says whether a partition's name is one that we give. Those that nobody
	// needs are removed; others are never touched.
	Owned func(partition string) bool
	// StartDelays are the times after a container's start at which its partition is
	// merged.
	StartDelays []time.Duration
	// Interval is the time from the end of one merge of a partition to its next.
	Interval time.Duration
	// Log gets one line with the message "merged" for each container that was
	// merged, and one for each kind of failure of a container.
	Log logrus.FieldLogger
}

// Engine merges the memory of containers inside of their partitions. Its methods
// may be called concurrently, and none waits for a merge.
type Engine struct {
	kernel kernel.Kernel
	owned  func(string) bool
	log    logrus.FieldLogger
	host   host
	// slots has one place for each merge that may run at a time.
	slots   chan struct{}
	workers sync.WaitGroup

	// mu protects what follows, and what partition and member say it does. It is
	// never held over a call to the kernel.
	mu         sync.Mutex
	ctx        context.Context // of Run; nil before and after it
	partitions map[string]*partition
	members    map[string]*member // by the container's id
	delays     []time.Duration
	interval   time.Duration
}

// member is a container in its partition.
type member struct {
	Container
	log       logrus.FieldLogger
	partition *partition
	// ctx ends when the container leaves.
	ctx   context.Context
	leave context.CancelFunc

	started time.Time       // zero before; protected by Engine.mu
	warned  map[string]bool // the worker's own
}

// warn logs a kind of failure the first time that it happens.
func (m *member) warn(msg string, err error) {
	if !m.warned[msg] {
		m.warned[msg] = true
		m.log.WithError(err).Warn(msg)
	}
}

// New makes an engine. It does nothing until [Engine.Run].
func New(o Options) *Engine {
	return &Engine{
		kernel:     o.Kernel,
		owned:      o.Owned,
		log:        o.Log,
		host:       linux{cgroupRoot: cgroup.DefaultRoot},
		slots:      make(chan struct{}, max(1, runtime.NumCPU()/2)),
		partitions: map[string]*partition{},
		members:    map[string]*member{},
		delays:     o.StartDelays,
		interval:   o.Interval,
	}
}

// Run lets the engine work until ctx ends, and returns when it has stopped.
// Partitions and what is merged in them are left in place. It is called once.
func (e *Engine) Run(ctx context.Context) {
	e.mu.Lock()
	e.ctx = ctx
	for _, p := range e.partitions {
		e.work(p)
	}
	e.mu.Unlock()

	<-ctx.Done()
	e.mu.Lock()
	e.ctx = nil
	e.mu.Unlock()
	e.workers.Wait()
}

// SetSchedule changes when partitions are merged, from each one's next merge on.
func (e *Engine) SetSchedule(startDelays []time.Duration, interval time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.delays, e.interval = startDelays, interval
}

// Add makes a container a member of its partition, before it runs. It returns when
// the kernel has the partition. When ctx ends earlier it returns nil, and the
// partition will be there before the first merge. An error means that the kernel
// refused the partition, and that the container is no member.
func (e *Engine) Add(ctx context.Context, c Container) error {
	e.mu.Lock()
	p := e.join(c)
	e.mu.Unlock()

	select {
	case <-p.tried:
	case <-ctx.Done():
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if p.refused != nil {
		e.stop(c.ID)
		return fmt.Errorf("container %s: %w", c.ID, p.refused)
	}
	return nil
}

// Start says that a container runs: its partition is merged after the start
// delays. Containers that are not members are ignored.
func (e *Engine) Start(containerID string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.start(containerID)
}

// Stop takes a container out of its partition: a merge of it is ended, what is
// left of its processes is unmerged, and the partition is removed with its last
// member. Containers that are not members are ignored.
func (e *Engine) Stop(containerID string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stop(containerID)
}

// StopSandbox stops all containers of a pod sandbox.
func (e *Engine) StopSandbox(sandboxID string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for id, m := range e.members {
		if m.SandboxID == sandboxID {
			e.stop(id)
		}
	}
}

// Reconcile takes over what the runtime says exists: containers that were created
// and those that run become members, those that are neither are stopped, and
// partitions of ours that nobody needs are removed. The error says that the
// kernel's partitions could not be listed; all else is done then.
func (e *Engine) Reconcile(created, running []Container) error {
	existing, err := e.kernel.Partitions()

	e.mu.Lock()
	defer e.mu.Unlock()
	known := map[string]bool{}
	for _, c := range slices.Concat(created, running) {
		known[c.ID] = true
		e.join(c)
	}
	for _, c := range running {
		e.start(c.ID)
	}
	for id := range e.members {
		if !known[id] {
			e.stop(id)
		}
	}
	for _, name := range existing {
		if e.owned(name) {
			// The worker of a partition without members removes it.
			e.partition(name)
		}
	}
	return err
}

// join makes a container a member. e.mu is held.
func (e *Engine) join(c Container) *partition {
	if m := e.members[c.ID]; m != nil {
		if m.Container == c {
			return m.partition
		}
		started := m.started
		e.stop(c.ID)
		defer func() {
			if !started.IsZero() {
				e.start(c.ID)
			}
		}()
	}
	p := e.partition(c.Partition)
	m := &member{
		Container: c,
		log: e.log.WithFields(logrus.Fields{
			"pod": c.Pod, "namespace": c.Namespace, "container": c.Name, "container_id": c.ID, "partition": c.Partition,
		}),
		partition: p,
		warned:    map[string]bool{},
	}
	m.ctx, m.leave = context.WithCancel(context.Background())
	e.members[c.ID], p.members[c.ID] = m, m
	p.poke()
	return p
}

// start plans the merges of a container that runs. e.mu is held.
func (e *Engine) start(id string) {
	m := e.members[id]
	if m == nil || !m.started.IsZero() {
		return
	}
	p := m.partition
	m.started = time.Now()
	for _, d := range e.delays {
		p.due = append(p.due, m.started.Add(d))
	}
	if p.last.IsZero() {
		p.last = m.started
	}
	p.poke()
}

// stop takes a member out. e.mu is held.
func (e *Engine) stop(id string) {
	m := e.members[id]
	if m == nil {
		return
	}
	m.leave()
	p := m.partition
	delete(e.members, id)
	delete(p.members, id)
	p.leaving = append(p.leaving, m)
	p.poke()
}

// partition returns a partition, new if need be, whose worker runs. e.mu is held.
func (e *Engine) partition(name string) *partition {
	p := e.partitions[name]
	if p == nil {
		p = &partition{
			engine:  e,
			name:    name,
			log:     e.log.WithField("partition", name),
			wake:    make(chan struct{}, 1),
			tried:   make(chan struct{}),
			members: map[string]*member{},
		}
		e.partitions[name] = p
		e.work(p)
	}
	return p
}

// work starts the worker of a partition, if the engine runs. e.mu is held.
func (e *Engine) work(p *partition) {
	if ctx := e.ctx; ctx != nil {
		e.workers.Go(func() { p.work(ctx) })
	}
}
