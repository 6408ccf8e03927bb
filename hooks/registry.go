package hooks

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/hooks/member"
)

// Engine is what a registry needs of an [engine.Engine].
type Engine interface {
	Add(ctx context.Context, c engine.Container) error
	Start(containerID string)
	Stop(containerID string)
	Reconcile(created, running []engine.Container) error
	Knows(containerID string) bool
	Status() []engine.PartitionStatus
}

const (
	// addTimeout is how long a hook may wait for its container's partition, and whoever
	// waits for hooks' containers for all of theirs.
	addTimeout = 50 * time.Millisecond
	// readTimeout is how long whoever waits for hooks' containers may wait for a hook that
	// changes one.
	readTimeout = 500 * time.Millisecond
	// swept is how often containers are looked for that have ended without a hook.
	swept = 30 * time.Second
	// Until a container's program runs, it is looked at after minLook, and after twice
	// as long each time, up to maxLook.
	minLook = 2 * time.Millisecond
	maxLook = time.Second
)

// Registry has an engine know the containers that hooks tell of. Those that the engine
// knows from somebody else are left to them. Its methods may be called concurrently.
type Registry struct {
	engine  Engine
	dir     *member.Dir
	log     logrus.FieldLogger
	machine machine
	// once is that a container is merged after its start only, and not again when the
	// next engine takes it over.
	once    bool
	waiting sync.WaitGroup // for programs to run

	// mu is held over what is read of the members and told to the engine of that, so that
	// they do not part. It protects what follows.
	mu     sync.Mutex
	policy config.Config
	ctx    context.Context // of Run; nil before and after it
	known  map[string]*entry
	ended  bool
	asked  time.Time // when a hook last came
}

// entry is a member as the engine has it, with what policy gives it now.
type entry struct {
	member.Member
	// forget ends the wait for its program.
	forget context.CancelFunc
	// waits is when the wait for its program began, and running when that was seen to
	// run; each is zero before.
	waits, running time.Time
}

// NewRegistry makes a registry whose containers get what the policy gives them. It does
// nothing until [Registry.Run].
func NewRegistry(e Engine, dir *member.Dir, policy config.Config, log logrus.FieldLogger) *Registry {
	return &Registry{
		engine: e, dir: dir, policy: policy, log: log, known: map[string]*entry{}, asked: time.Now(),
		machine: machine{proc: "/proc", cgroups: cgroup.DefaultRoot},
	}
}

// Run waits for the containers' programs, and sees to containers whose hook did not come
// or was not heard, until ctx ends.
func (r *Registry) Run(ctx context.Context) {
	r.mu.Lock()
	r.ctx = ctx
	for _, have := range r.known {
		r.start(have)
	}
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		r.ctx = nil
		r.mu.Unlock()
		r.waiting.Wait()
	}()
	tick := time.NewTicker(swept)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			r.mu.Lock()
			r.sweep(ctx)
			r.mu.Unlock()
		case <-ctx.Done():
			return
		}
	}
}

// Yield reports that the engine does not end for another one.
func (*Registry) Yield() bool { return false }

// Sync looks at what is written down of a container, and has the engine do what
// follows from it. It returns an error that matches [control.ErrNoEngine] when the
// engine is ending, and otherwise the kernel's reason not to have the partition.
func (r *Registry) Sync(ctx context.Context, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		return control.ErrNoEngine
	}
	r.asked = time.Now()
	reading, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	m, found, err := r.dir.Get(reading, id)
	if err != nil {
		return err
	}
	if !found {
		if have := r.known[id]; have != nil {
			r.drop(have)
		}
		return nil
	}
	return r.look(ctx, r.placed(m))
}

// Reconcile is that of the engine, for those containers that hooks have told of, and
// for others, which somebody else has.
func (r *Registry) Reconcile(created, running []engine.Container) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	others := map[string]bool{}
	for _, c := range slices.Concat(created, running) {
		others[c.ID] = true
	}
	all, err := r.all(context.Background())
	all = slices.DeleteFunc(all, func(m member.Member) bool { return others[m.ID] })
	before := r.known
	r.known = map[string]*entry{}
	for _, m := range all {
		if have := before[m.ID]; have != nil && have.Created.Equal(m.Created) {
			have.Started = m.Started
			r.known[m.ID] = have
			delete(before, m.ID)
			continue
		}
		r.keep(r.placed(m))
	}
	for _, have := range before {
		have.forget()
		if _, again := r.known[have.ID]; again {
			r.engine.Stop(have.ID)
		}
	}
	for _, have := range r.known {
		if r.wanted(have) && (!have.running.IsZero() || r.runs(have.Member)) {
			if have.running.IsZero() {
				have.waits, have.running = time.Now(), time.Now()
			}
			running = append(running, have.Container)
		} else {
			created = append(created, have.Container)
		}
	}
	err = errors.Join(err, r.engine.Reconcile(created, running))
	for _, have := range r.known {
		r.start(have)
	}
	return err
}

// Use gives all containers what another policy gives them, those that run too. Hooks
// whose own policy left a container out have not told of it, and it stays out.
func (r *Registry) Use(policy config.Config) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.policy = policy
	ctx, cancel := context.WithTimeout(context.Background(), addTimeout)
	defer cancel()
	for _, have := range r.known {
		now := r.placed(have.Member)
		if now.Container == have.Container {
			continue
		}
		have.Member = now
		if err := r.engine.Add(ctx, now.Container); err != nil && !errors.Is(err, kernel.ErrKeptOut) {
			// It is to be tried again.
			r.log.WithError(err).WithField("container_id", now.ID).Debug("container is not merged")
			r.drop(have)
			continue
		}
		if !have.running.IsZero() {
			r.engine.Start(now.ID)
		}
	}
}

// placed is a member with the partition that policy gives it now. One that it leaves out
// is in none: a hook has said why, or whoever changed the policy knows. r.mu is held.
func (r *Registry) placed(m member.Member) member.Member {
	c, err := assign(r.policy, m.Container, m.Facts)
	if err != nil {
		r.log.WithError(err).WithField("container_id", m.ID).Debug("container is not merged")
	}
	m.Container = c
	return m
}

// all are the members that are written down. If not all of them can be read, those that
// are known are taken to be there still. r.mu is held.
func (r *Registry) all(ctx context.Context) ([]member.Member, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	all, err := r.dir.All(ctx)
	if err == nil {
		return all, nil
	}
	for id, have := range r.known {
		if !slices.ContainsFunc(all, func(m member.Member) bool { return m.ID == id }) {
			all = append(all, have.Member)
		}
	}
	return all, err
}

// sweep looks at all that is written down, and reports whether that has changed. r.mu is
// held.
func (r *Registry) sweep(ctx context.Context) (changed bool) {
	all, err := r.all(ctx)
	if err != nil {
		r.log.WithError(err).Warn("what hooks have told of containers was not read whole")
	}
	ctx, cancel := context.WithTimeout(ctx, addTimeout)
	defer cancel()
	there := map[string]bool{}
	for _, m := range all {
		there[m.ID] = true
	}
	for id, have := range r.known {
		if !there[id] {
			r.drop(have)
			changed = true
		}
	}
	for _, m := range all {
		have := r.known[m.ID]
		changed = changed || !r.somebodys(m.ID) && (have == nil || have.Started != m.Started || !have.Created.Equal(m.Created))
		if err := r.look(ctx, r.placed(m)); err != nil {
			r.log.WithError(err).WithField("container_id", m.ID).Debug("container is not merged")
		}
	}
	return changed
}

// look brings the engine to know what is written down of a container. r.mu is held.
func (r *Registry) look(ctx context.Context, m member.Member) error {
	have := r.known[m.ID]
	if have != nil && !m.Created.Equal(have.Created) {
		r.drop(have)
		have = nil
	}
	var err error
	if have == nil {
		if r.somebodys(m.ID) {
			return nil
		}
		ctx, cancel := context.WithTimeout(ctx, addTimeout)
		defer cancel()
		err = r.engine.Add(ctx, m.Container)
		if err != nil && !errors.Is(err, kernel.ErrKeptOut) {
			// The engine would know it as one in no partition. It is to be tried again.
			r.engine.Stop(m.ID)
			return err
		}
		have = r.keep(m)
	}
	have.Started = m.Started
	for _, each := range r.known {
		if each.Partition == have.Partition {
			r.start(each)
		}
	}
	return err
}

// keep takes a member as known. As long as one of a partition is not done, none is: the
// others are what it is merged with. r.mu is held.
func (r *Registry) keep(m member.Member) *entry {
	have := &entry{Member: m, forget: func() {}}
	r.known[m.ID] = have
	all := true
	for _, each := range r.known {
		all = all && (each.Done || each.Partition != m.Partition)
	}
	for _, each := range r.known {
		each.Done = each.Done && (all || each.Partition != m.Partition)
	}
	return have
}

// drop has the engine forget a container. r.mu is held.
func (r *Registry) drop(have *entry) {
	have.forget()
	delete(r.known, have.ID)
	r.engine.Stop(have.ID)
}

// somebodys reports whether somebody else has told the engine of a container: also that
// it is in no partition, which a hook may not know the reason for. r.mu is held.
func (r *Registry) somebodys(containerID string) bool {
	return r.known[containerID] == nil && r.engine.Knows(containerID)
}

// wanted reports whether a container has been started, and is to be merged. r.mu is held.
func (r *Registry) wanted(have *entry) bool {
	return have.Started && !(r.once && have.Done)
}

// start has the engine merge a container, as soon as its own program runs: runc calls
// the hook before that. r.mu is held.
func (r *Registry) start(have *entry) {
	if !r.wanted(have) || !have.waits.IsZero() || r.ctx == nil {
		return
	}
	have.waits = time.Now()
	ctx, cancel := context.WithCancel(r.ctx)
	have.forget = cancel
	m := have.Member
	r.waiting.Go(func() {
		defer cancel()
		for look := minLook; !r.runs(m); look = min(2*look, maxLook) {
			select {
			case <-time.After(look):
			case <-ctx.Done():
				return
			}
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.known[m.ID] == have {
			have.running = time.Now()
			r.engine.Start(m.ID)
		}
	})
}

// runs reports whether a container's first process executes another program than the
// runtime's, or is gone, which the engine will see.
func (r *Registry) runs(m member.Member) bool {
	now, err := r.machine.program(m.PID)
	return errors.Is(err, os.ErrNotExist) || err == nil && now != m.Init
}
