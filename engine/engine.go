// Package engine keeps the partitions that containers need, and decides when their
// memory is merged.
//
// Each partition has one worker, which alone asks the kernel for anything about
// its members: it adds the partition, merges its members, unmerges those that leave, and
// removes it with the last of them. All else only changes what the worker will
// find, so that no caller waits for a merge. The workers share a budget of CPU time
// (package budget), out of which they take turns.
//
// The kernel and the runtime are the truth, and the engine keeps no state of its
// own beyond its life: when it ends, partitions stay as they are, and the next
// engine adopts them in [Engine.Reconcile]. What the runtime says is a hint, since it
// does not tell of every end: the engine watches the containers' processes itself.
//
// The engine knows kernels by their [kernel.Features] only, and where one cannot keep
// partitions apart, it merges less.
package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/selective-ksm/selective-ksm/engine/budget"
	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// Container is a container whose memory belongs to a partition.
type Container struct {
	// ID is the runtime's id, by which the container is known here.
	ID string `json:"id"`
	// Name, Pod and Namespace are what people call it.
	Name      string `json:"name,omitempty"`
	Pod       string `json:"pod,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	// SandboxID is the runtime's id of its pod sandbox.
	SandboxID string `json:"sandbox_id,omitempty"`
	// CgroupsPath is its cgroup, in a form that package cgroup knows. All processes
	// in that cgroup are the container's.
	CgroupsPath string `json:"cgroups_path,omitempty"`
	// Partition is the name of its partition. Empty means that it is in none: the
	// engine knows it then only not to take its processes for the machine's.
	Partition string `json:"partition,omitempty"`
	// Interval is how often it is to be merged: its partition has the least of its
	// members' intervals. Zero means that of [Settings].
	Interval time.Duration `json:"interval_ns,omitempty"`
	// OnDemand has it merged by [Engine.Merge] only.
	OnDemand bool `json:"on_demand,omitempty"`
	// Secrets offers memory that its programs have marked as secret.
	Secrets bool `json:"secrets,omitempty"`
	// Because says for people why it is in that partition, or in none. Cause is the kind
	// of that reason for one in none, [CausePolicy] if it is empty. Neither decides
	// anything.
	Because string `json:"because,omitempty"`
	Cause   Cause  `json:"cause,omitempty"`
}

// Path is what people call it, NAMESPACE/POD/NAME, without what is not known.
func (c Container) Path() string {
	parts := []string{c.Namespace, c.Pod, c.Name}
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), "/")
}

// same reports whether two are to be merged in the same way.
func (c Container) same(other Container) bool {
	c.Because, c.Cause = other.Because, other.Cause
	return c == other
}

// Pressure is whose scarcity of memory brings merges forward.
type Pressure string

const (
	// PressureOff is nobody's.
	PressureOff Pressure = "off"
	// PressureNode is the machine's: those partitions that are likely to save most are
	// merged.
	PressureNode Pressure = "node"
	// PressurePod is that of the pod's cgroup, on cgroup v2: its partition is merged.
	PressurePod Pressure = "pod"
)

// Settings say when to merge, and what.
type Settings struct {
	// StartDelays are the times after a container's start at which its partition is
	// merged.
	StartDelays []time.Duration `json:"start_delays_ns"`
	// Interval is the time from the end of one merge of a partition to its next, and
	// up to a tenth more, unless its containers ask for another. After a merge that
	// saved little it is twice that of before, up to MaxInterval.
	Interval    time.Duration `json:"interval_ns"`
	MaxInterval time.Duration `json:"max_interval_ns"`
	// Budget is what merging may cost.
	Budget budget.Limits `json:"budget"`
	// Pressure brings merges forward.
	Pressure Pressure `json:"pressure"`
	// Zero offers zero pages that were never written.
	Zero bool `json:"zero_pages"`
	// Dirty has later merges offer what was written to since the one before, as the
	// kernel's soft-dirty bits tell. Otherwise they pass over processes that have had
	// no fault, and whose resident size is the same.
	Dirty bool `json:"soft_dirty"`
	// OptedIn leaves out processes that have not made their memory mergeable
	// themselves, though the kernel lets the engine do it.
	OptedIn bool `json:"opted_in"`
}

// Options are what an engine is made of.
type Options struct {
	// Kernel does the merging.
	Kernel kernel.Kernel
	// Owned says whether a partition's name is one that we give. Those that nobody
	// needs are removed; others are never touched.
	Owned func(partition string) bool
	// Settings may be changed later.
	Settings Settings
	// Log gets one line with the message "merged" for each container that was
	// merged, and one for each kind of failure of a container.
	Log logrus.FieldLogger
}

// Engine merges the memory of containers inside of their partitions. Its methods
// may be called concurrently, and none waits for a merge.
type Engine struct {
	kernel   kernel.Kernel
	features kernel.Features
	owned    func(string) bool
	log      logrus.FieldLogger
	host     host
	jitter   func(time.Duration) time.Duration
	budget   *budget.Budget
	began    time.Time
	workers  sync.WaitGroup
	untold   sync.Once     // that pods have no pressure stall information
	beat     chan struct{} // is received from by the sweep, whenever it has nothing to do
	created  chan struct{} // has one when a container was created that the sweep may not know

	// mu protects what follows, and what partition and member say it does. It is
	// never held over a call to the kernel.
	mu         sync.Mutex
	ctx        context.Context // of Run; nil before and after it
	partitions map[string]*partition
	members    map[string]*member   // by the container's id
	waiting    map[string]*member   // those that are created and not started, by their ids
	departed   map[string][]*member // those whose memory may be where they left, by their ids
	outside    map[string]Container // those in no partition, by their ids
	settings   Settings
	// relieved is when merges were last brought forward for the node.
	relieved time.Time
	// unwatched is why the machine's pressure is not watched.
	unwatched error
	did       Work // but for its CPU, which the budget knows
}

// member is a container in its partition.
type member struct {
	Container
	log       logrus.FieldLogger
	partition *partition
	added     time.Time
	// ctx ends when the container leaves.
	ctx   context.Context
	leave context.CancelFunc
	// left is closed when the container's memory is out of the partition. before are those
	// of the partitions that it was in before, as far as they are not.
	left   chan struct{}
	before []<-chan struct{}

	// Protected by Engine.mu.
	started time.Time // zero before
	watched bool      // its pod's pressure
	reason  reason    // why it is not merged, or not all of it
	// failures is how often that was so.
	failures int
	result   Result // of the last merge

	// For the worker.
	unmerge bool // first, as its memory may be in a partition of an engine before
	warned  told
	seen    map[int]look // processes, as they were when they were last merged

	// For the sweep.
	cgroup bool // has been there
}

// New makes an engine. It does nothing until [Engine.Run].
func New(o Options) *Engine {
	return &Engine{
		kernel:     o.Kernel,
		features:   o.Kernel.Features(),
		owned:      o.Owned,
		log:        o.Log,
		host:       linux{cgroupRoot: cgroup.DefaultRoot},
		jitter:     func(d time.Duration) time.Duration { return rand.N(d/10 + 1) },
		budget:     budget.New(o.Settings.Budget),
		began:      time.Now(),
		partitions: map[string]*partition{},
		members:    map[string]*member{},
		waiting:    map[string]*member{},
		departed:   map[string][]*member{},
		outside:    map[string]Container{},
		settings:   o.Settings,
		beat:       make(chan struct{}),
		created:    make(chan struct{}, 1),
	}
}

// Run lets the engine work until ctx ends, and returns when it has stopped.
// Partitions and what is merged in them are left in place. It is called once.
func (e *Engine) Run(ctx context.Context) {
	if err := e.kernel.Recover(ctx); err != nil {
		e.log.WithError(err).Warn("what an engine before this one has changed in the kernel is not restored")
	}
	e.mu.Lock()
	e.ctx = ctx
	for _, p := range e.partitions {
		e.work(p)
	}
	for _, m := range e.members {
		if !m.started.IsZero() {
			e.watch(m)
		}
	}
	e.workers.Go(func() { e.sweep(ctx) })
	e.workers.Go(func() { e.watchNode(ctx) })
	e.mu.Unlock()

	<-ctx.Done()
	e.mu.Lock()
	e.ctx = nil
	e.mu.Unlock()
	e.workers.Wait()
}

// Configure changes the settings. What is planned already stays planned.
func (e *Engine) Configure(s Settings) {
	e.budget.SetLimits(s.Budget)
	e.mu.Lock()
	defer e.mu.Unlock()
	if s.Pressure == PressureNode && e.settings.Pressure != PressureNode && e.unwatched != nil {
		e.log.WithError(e.unwatched).Warn(notForNode)
	}
	e.settings = s
	for _, m := range e.members {
		if !m.started.IsZero() {
			e.watchPressure(m)
		}
	}
}

// OptsIn reports whether the engine makes the memory of containers mergeable itself,
// unless [Settings] say otherwise, because the kernel lets it. Otherwise each
// container's own process has to, before its program: see package optin.
func (e *Engine) OptsIn() bool { return e.features.Bind }

// Add makes a container a member of its partition, before it runs. It returns when
// the kernel has the partition. When ctx ends earlier it returns nil, and the
// partition will be there before the first merge. An error means that the kernel
// refused the partition. The container's memory must not be made mergeable then. If
// the error matches [kernel.ErrKeptOut] it stays known, for [Engine.Status];
// otherwise it is no member.
func (e *Engine) Add(ctx context.Context, c Container) error {
	e.mu.Lock()
	p := e.join(c)
	e.mu.Unlock()
	if p == nil {
		return nil
	}

	select {
	case <-p.tried:
	case <-ctx.Done():
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if p.refused == nil {
		return nil
	}
	if !errors.Is(p.refused, kernel.ErrKeptOut) {
		e.stop(c.ID)
		c.Because, c.Cause = p.refused.Error(), causeOf(p.refused)
		e.outside[c.ID] = c
	}
	return fmt.Errorf("container %s: %w", c.ID, p.refused)
}

// Knows reports whether somebody has told of a container, be it in a partition or in
// none, and not that it has ended.
func (e *Engine) Knows(containerID string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, outside := e.outside[containerID]
	return outside || e.members[containerID] != nil
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
	maps.DeleteFunc(e.outside, func(_ string, c Container) bool { return c.SandboxID == sandboxID })
}

// Merge merges a partition as soon as the budget allows, and all of it, whether it
// has changed or not, with those of its members that are merged on demand; the empty
// name is that of all. What [Engine.Unmerge] holds it lets go. It does not wait for the
// merge. It returns [kernel.ErrNoPartition] where the engine has none of that name.
func (e *Engine) Merge(name string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if name != "" && e.partitions[name] == nil {
		return fmt.Errorf("merging partition %s: %w", name, kernel.ErrNoPartition)
	}
	for _, p := range e.partitions {
		if name == "" || name == p.name {
			p.hold = HoldNot
			p.full = true
			p.bringForward()
			p.poke()
		}
	}
	return nil
}

// Reconcile takes over what the runtime says exists: containers that were created
// and those that run become members if they have a partition, those that are neither
// are stopped, and partitions of ours that nobody needs are removed. The error says
// that the kernel's partitions could not be listed; all else is done then.
func (e *Engine) Reconcile(created, running []Container) error {
	existing, err := e.kernel.Partitions()
	if e.features.OneSpace {
		// Before an engine that ended, one of these had the merge space: that whose
		// processes are still mergeable. It must have it again, before another asks. If
		// it cannot, its worker will say so.
		if name := e.heldBefore(running); name != "" {
			_ = e.kernel.AddPartition(name)
		}
	}

	e.mu.Lock()
	defer e.mu.Unlock()
	known, needed := map[string]bool{}, map[string]bool{}
	for _, c := range slices.Concat(running, created) {
		known[c.ID], needed[c.Partition] = true, true
	}
	// A kernel that does not remove one partition alone keeps what is merged in it, and
	// nothing there keeps a process from being merged in two. Where they cannot be listed,
	// there may be one.
	orphan := func(name string) bool { return e.owned(name) && !needed[name] && e.partitions[name] == nil }
	unmerge := e.features.WideRemoval && !e.features.OneSpace && (err != nil || slices.ContainsFunc(existing, orphan))
	for _, c := range slices.Concat(running, created) {
		before := e.members[c.ID]
		e.join(c)
		if m := e.members[c.ID]; m != nil && m != before {
			m.unmerge = unmerge
		}
	}
	for _, c := range running {
		e.start(c.ID)
	}
	for id := range e.members {
		if !known[id] {
			e.stop(id)
		}
	}
	maps.DeleteFunc(e.outside, func(id string, _ Container) bool { return !known[id] })
	for _, name := range existing {
		if e.owned(name) {
			// The worker of a partition without members removes it.
			e.partition(name)
		}
	}
	return err
}

// looked is how long the runtime is kept waiting for that, at most.
const looked = 500 * time.Millisecond

// heldBefore is the partition of a container that has a process that is mergeable; none
// if there is no such container, or too much to look at.
func (e *Engine) heldBefore(containers []Container) string {
	began := time.Now()
	for _, c := range containers {
		if time.Since(began) > looked {
			break
		}
		if mergeable, err := e.anyMergeable(c.CgroupsPath); err == nil && mergeable {
			return c.Partition
		}
	}
	return ""
}

// anyMergeable reports whether a container has a process that is mergeable, or of which
// that cannot be told.
func (e *Engine) anyMergeable(cgroupsPath string) (bool, error) {
	processes, err := e.host.open(cgroupsPath)
	if err != nil {
		if gone(err) {
			err = nil
		}
		return false, err
	}
	found := false
	for _, proc := range processes {
		if mergeable, err := e.host.mergeable(proc.Pid()); (err != nil && !gone(err) || mergeable) && proc.Alive() {
			found = true
		}
		proc.Close()
	}
	return found, nil
}

// join makes a container a member. It returns nil if that is of no partition. e.mu
// is held.
func (e *Engine) join(c Container) *partition {
	if c.Partition == "" {
		e.stop(c.ID)
		e.outside[c.ID] = c
		return nil
	}
	delete(e.outside, c.ID)
	if m := e.members[c.ID]; m != nil {
		if m.same(c) {
			m.Because, m.Cause = c.Because, c.Cause
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
		added:     time.Now(),
		left:      make(chan struct{}),
		warned:    told{},
		seen:      map[int]look{},
	}
	for _, was := range e.departed[c.ID] {
		m.before = append(m.before, was.left)
	}
	m.ctx, m.leave = context.WithCancel(context.Background())
	e.members[c.ID], p.members[c.ID], e.waiting[c.ID] = m, m, m
	select {
	case e.created <- struct{}{}:
	default:
	}
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
	delete(e.waiting, id)
	e.watch(m)
	p.poke()
	if m.OnDemand {
		return
	}
	for _, d := range e.settings.StartDelays {
		p.mergeAt(m.started.Add(d))
	}
	p.poor = 0
	if next := m.started.Add(p.pause()); p.next.IsZero() || p.next.After(next) {
		p.next = next
	}
}

// stop takes a member out. e.mu is held.
func (e *Engine) stop(id string) {
	delete(e.outside, id)
	m := e.members[id]
	if m == nil {
		return
	}
	m.leave()
	p := m.partition
	delete(e.members, id)
	delete(e.waiting, id)
	delete(p.members, id)
	p.leaving = append(p.leaving, m)
	e.departed[id] = append(e.departed[id], m)
	p.poke()
	if e.features.WideRemoval && len(p.members) == 0 {
		// Others may have waited for this one with their removal, or with their turn.
		for _, other := range e.partitions {
			other.poke()
		}
	}
}

// parted says that the memory of one that left is out of its partition. e.mu is held.
func (e *Engine) parted(m *member) {
	close(m.left)
	rest := slices.DeleteFunc(e.departed[m.ID], func(other *member) bool { return other == m })
	if e.departed[m.ID] = rest; len(rest) == 0 {
		delete(e.departed, m.ID)
	}
}

// partition returns a partition, new if need be, whose worker runs. e.mu is held.
func (e *Engine) partition(name string) *partition {
	p := e.partitions[name]
	if p == nil {
		p = &partition{
			engine: e,
			name:   name,
			log:    e.log.WithField("partition", name),
			// An engine before this one may have left it so.
			mixed:     e.features.OneSpace,
			wake:      make(chan struct{}, 1),
			tried:     make(chan struct{}),
			members:   map[string]*member{},
			said:      told{},
			interrupt: func() {},
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

// config returns the settings.
func (e *Engine) config() Settings {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.settings
}
