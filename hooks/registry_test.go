package hooks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/hooks/member"
)

// fakeEngine notes what it is told.
type fakeEngine struct {
	mu         sync.Mutex
	calls      []string
	containers map[string]engine.ContainerStatus
	refuse     error
}

func (f *fakeEngine) note(format string, args ...any) {
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
}

// told is what it was told since the last call.
func (f *fakeEngine) told() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := strings.Join(f.calls, ", ")
	f.calls = nil
	return all
}

func (f *fakeEngine) Add(_ context.Context, c engine.Container) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("add %s", c.ID)
	if f.refuse != nil && !errors.Is(f.refuse, kernel.ErrKeptOut) {
		c.Partition = "" // as the engine knows it from then on
	}
	f.containers[c.ID] = engine.ContainerStatus{Container: c}
	return f.refuse
}

func (f *fakeEngine) Start(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("start %s", id)
}

func (f *fakeEngine) Stop(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("stop %s", id)
	delete(f.containers, id)
}

func (f *fakeEngine) Reconcile(created, running []engine.Container) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	names := func(all []engine.Container) (ids []string) {
		for _, c := range all {
			ids = append(ids, c.ID)
			f.containers[c.ID] = engine.ContainerStatus{Container: c}
		}
		slices.Sort(ids)
		return ids
	}
	f.note("reconcile %v %v", names(created), names(running))
	return nil
}

func (f *fakeEngine) Knows(id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, known := f.containers[id]
	return known
}

func (f *fakeEngine) Status() []engine.PartitionStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all engine.PartitionStatus
	for _, c := range f.containers {
		if c.Partition != "" {
			all.Containers = append(all.Containers, c)
		}
	}
	if len(all.Containers) == 0 {
		return nil
	}
	return []engine.PartitionStatus{all}
}

// partition is that of a container.
func (f *fakeEngine) partition(id string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.containers[id].Partition
}

func (f *fakeEngine) refuseWith(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.refuse = err
}

// merged is that a container has been merged now.
func (f *fakeEngine) merged(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.containers[id]
	c.Result.At = time.Now()
	f.containers[id] = c
}

// bench is a machine with an engine that hooks tell of containers.
type bench struct {
	t       *testing.T
	dir     string
	machine machine
	engine  *fakeEngine
	members *member.Dir
	spawned []string
	nextPID int
	pids    map[string]int
	gone    sync.Map
}

func newBench(t *testing.T) *bench {
	b := &bench{
		t: t, dir: t.TempDir(), nextPID: 100, pids: map[string]int{},
		engine: &fakeEngine{containers: map[string]engine.ContainerStatus{}},
	}
	b.machine = machine{proc: filepath.Join(b.dir, "proc"), cgroups: filepath.Join(b.dir, "cgroups")}
	write(t, filepath.Join(b.machine.cgroups, "cgroup.controllers"), "")
	var err error
	b.members, err = member.Open(filepath.Join(b.dir, "hooks"), func(path string) bool {
		_, gone := b.gone.Load(path)
		return gone
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// registry makes the registry of an engine.
func (b *bench) registry() *Registry {
	log := logrus.New()
	log.SetOutput(io.Discard)
	r := NewRegistry(b.engine, b.members, config.Default(), log)
	r.machine = b.machine
	return r
}

// running makes a registry that runs, until the function ends it.
func (b *bench) running() (r *Registry, stop func()) {
	r = b.registry()
	ctx, cancel := context.WithCancel(b.t.Context())
	var running sync.WaitGroup
	running.Go(func() { r.Run(ctx) })
	synctest.Wait()
	return r, func() {
		cancel()
		running.Wait()
	}
}

func (b *bench) hook(stage Stage, id string) {
	b.t.Helper()
	pid := b.pids[id]
	if stage == CreateRuntime {
		time.Sleep(time.Nanosecond) // no two at the same time
		b.nextPID++
		pid = b.nextPID
		b.pids[id] = pid
		process := filepath.Join(b.machine.proc, strconv.Itoa(pid))
		write(b.t, filepath.Join(process, "cgroup"), "0::/"+id+"\n")
		write(b.t, filepath.Join(process, "exe"), "runtime")
		write(b.t, filepath.Join(process, "ns/pid"), "")
		write(b.t, filepath.Join(b.machine.proc, "self/ns/pid"), "")
		write(b.t, filepath.Join(b.machine.cgroups, id, "cgroup.procs"), fmt.Sprintln(pid))
	}
	state := fmt.Sprintf(`{"ociVersion":"1.0.2","id":%q,"pid":%d,"bundle":%q}`, id, pid, bundleOf(b.t, b.dir, id, ordinary))
	o := Options{Dir: b.dir, Policy: config.Default(), Spawn: func(id string) error {
		b.spawned = append(b.spawned, id)
		return nil
	}}
	if err := run(b.t.Context(), stage, strings.NewReader(state), o, b.machine); err != nil {
		b.t.Error(err)
	}
}

// execute has a container's process execute its program.
func (b *bench) execute(id string) {
	b.t.Helper()
	exe := filepath.Join(b.machine.proc, strconv.Itoa(b.pids[id]), "exe")
	write(b.t, exe+".new", "program")
	if err := os.Rename(exe+".new", exe); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) want(calls string) {
	b.t.Helper()
	if got := b.engine.told(); got != calls {
		b.t.Errorf("the engine was told %q, want %q", got, calls)
	}
}

func (b *bench) sync(r *Registry, id string) {
	b.t.Helper()
	if err := r.Sync(b.t.Context(), id); err != nil {
		b.t.Error(err)
	}
}

// A container is merged when its own program runs, not before, and is forgotten at the
// end; so is one that comes again with the same id.
func TestRegistry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r, stop := b.running()
		for range 2 {
			b.hook(CreateRuntime, "a")
			b.sync(r, "a")
			b.want("add a")
			b.hook(Poststart, "a")
			b.sync(r, "a")
			time.Sleep(time.Minute)
			b.want("")
			b.execute("a")
			time.Sleep(maxLook)
			synctest.Wait()
			b.want("start a")
			b.sync(r, "a")
			b.want("")
			b.hook(Poststop, "a")
			b.sync(r, "a")
			b.want("stop a")
		}
		// Its poststop never came.
		b.hook(CreateRuntime, "a")
		b.sync(r, "a")
		b.hook(CreateRuntime, "a")
		b.sync(r, "a")
		b.want("add a, stop a, add a")

		// Nobody has told of these.
		b.hook(CreateRuntime, "b")
		time.Sleep(swept + 1)
		synctest.Wait()
		b.want("add b")
		b.gone.Store("/b", true)
		time.Sleep(swept)
		synctest.Wait()
		b.want("stop b")

		b.sync(r, "unknown")
		b.want("")
		stop()
		if len(b.spawned) != 9 {
			t.Errorf("engines were started for %q", b.spawned)
		}
	})
}

// While a hook hangs that changes what is written down, nobody waits for it, and nothing is
// taken to be gone.
func TestHookHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r := b.registry()
		b.hook(CreateRuntime, "a")
		b.sync(r, "a")
		b.want("add a")
		lock, err := os.Open(filepath.Join(b.dir, "hooks", "lock"))
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Close()
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		r.sweep(t.Context())
		b.want("")
		if err := r.Reconcile(nil, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		b.want("reconcile [a] []")
		if err := r.Sync(t.Context(), "a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if took := time.Since(began); took > 3*readTimeout {
			t.Errorf("took %v", took)
		}
	})
}

// Where an NRI plugin and hooks tell of the same container, it is the plugin's.
func TestOnce(t *testing.T) {
	b := newBench(t)
	r := b.registry()
	theirs := engine.Container{ID: "nri", CgroupsPath: "/kubepods/nri", Partition: "p"}
	// Also one that its policy leaves out.
	out := engine.Container{ID: "out", CgroupsPath: "/kubepods/out"}
	for _, c := range []engine.Container{theirs, out} {
		if err := b.engine.Add(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		b.want("add " + c.ID)
		b.hook(CreateRuntime, c.ID)
		b.sync(r, c.ID)
		b.hook(Poststart, c.ID)
		b.sync(r, c.ID)
		b.want("")
	}
	b.hook(CreateRuntime, "ours")
	b.sync(r, "ours")
	b.want("add ours")

	// The runtime connects again, and knows nothing of ours.
	if err := r.Reconcile(nil, []engine.Container{theirs, out}); err != nil {
		t.Error(err)
	}
	b.want("reconcile [ours] [nri out]")
	r.sweep(t.Context())
	b.want("")
	b.hook(Poststop, "nri")
	b.sync(r, "nri")
	b.want("")
	if b.engine.containers["nri"].Container != theirs {
		t.Error("the plugin's container was changed")
	}
}

// Another policy is that of the containers that run, too.
func TestUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r, stop := b.running()
		partition := func(id, want string) {
			t.Helper()
			if got := b.engine.partition(id); got != want {
				t.Errorf("%s is in partition %q, want %q", id, got, want)
			}
		}
		for _, id := range []string{"a", "b"} {
			b.hook(CreateRuntime, id)
			b.sync(r, id)
		}
		b.hook(Poststart, "a")
		b.execute("a")
		b.sync(r, "a")
		time.Sleep(maxLook)
		b.want("add a, add b, start a")
		inPod := b.engine.partition("a")

		r.Use(config.Default())
		b.want("")
		policy := config.Default()
		policy.PartitionBy = config.ScopeContainer
		r.Use(policy)
		if got := b.engine.told(); got != "add a, start a, add b" && got != "add b, add a, start a" {
			t.Errorf("the engine was told %q", got)
		}
		partition("a", strings.Replace(inPod, "pod", "ctr", 1))

		// One that comes later, told of by a hook that has not seen the change.
		b.hook(CreateRuntime, "c")
		b.sync(r, "c")
		b.want("add c")
		if got := b.engine.partition("c"); !strings.HasPrefix(got, "sksm-ctr-") {
			t.Errorf("c is in partition %q", got)
		}

		policy.Pods.OnlyAnnotated = true
		r.Use(policy)
		b.engine.told()
		partition("a", "")
		r.sweep(t.Context())
		if err := r.Reconcile(nil, nil); err != nil {
			t.Error(err)
		}
		b.want("reconcile [b c] [a]")
		partition("a", "")

		b.engine.refuseWith(errors.New("no memory"))
		r.Use(config.Default())
		if got := b.engine.told(); strings.Count(got, "stop") != 3 {
			t.Errorf("the engine was told %q", got)
		}
		b.engine.refuseWith(nil)
		time.Sleep(swept + maxLook)
		partition("a", inPod)
		if got := b.engine.told(); !strings.Contains(got, "start a") {
			t.Errorf("the engine was told %q", got)
		}
		stop()
	})
}

func TestRefused(t *testing.T) {
	b := newBench(t)
	r := b.registry()
	b.engine.refuse = errors.New("no memory")
	b.hook(CreateRuntime, "a")
	if err := r.Sync(t.Context(), "a"); !errors.Is(err, b.engine.refuse) {
		t.Errorf("got %v", err)
	}
	// It is tried again.
	b.engine.refuse = fmt.Errorf("first: %w", kernel.ErrKeptOut)
	if err := r.Sync(t.Context(), "a"); !errors.Is(err, kernel.ErrKeptOut) {
		t.Errorf("got %v", err)
	}
	b.want("add a, stop a, add a")
	// It is known from now on, and has to be forgotten.
	b.hook(Poststop, "a")
	b.sync(r, "a")
	b.want("stop a")
}

// A worker ends when all containers are merged, and the next one leaves those alone
// that are not in the partition of a new one.
func TestWorker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		log := logrus.New()
		log.SetOutput(io.Discard)
		work := func(during func(w *Worker)) {
			policy := config.Default()
			policy.StartDelays = []time.Duration{0, 10 * time.Second}
			w := NewWorker(b.engine, b.members, policy, log, false)
			w.machine = b.machine
			if err := w.Reconcile(nil, nil); err != nil {
				t.Error(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			var running sync.WaitGroup
			running.Go(func() { w.Run(ctx) })
			ended := make(chan error, 1)
			go func() { ended <- w.Work(ctx) }()
			during(w)
			if err := <-ended; err != nil {
				t.Error(err)
			}
			if err := w.Sync(ctx, "a"); !errors.Is(err, control.ErrNoEngine) {
				t.Errorf("asked when it has ended: %v", err)
			}
			cancel()
			running.Wait()
		}

		b.hook(CreateRuntime, "a")
		work(func(w *Worker) {
			b.hook(Poststart, "a")
			b.sync(w.Registry, "a")
			time.Sleep(time.Minute)
			b.execute("a")
			time.Sleep(2 * time.Second)
			b.engine.merged("a")
			time.Sleep(9 * time.Second)
			b.want("reconcile [a] [], start a")
			b.engine.merged("a")
		})
		if m, _, err := b.members.Get(t.Context(), "a"); err != nil || !m.Done {
			t.Errorf("left behind: %+v, %v", m, err)
		}

		// Another one.
		b.hook(CreateRuntime, "b")
		b.hook(Poststart, "b")
		b.execute("b")
		b.engine.containers = map[string]engine.ContainerStatus{}
		work(func(w *Worker) {
			time.Sleep(11 * time.Second)
			b.engine.merged("b")
		})
		b.want("reconcile [a] [b]")

		// One that ends without a hook: its partition must go before the worker does.
		b.gone.Store("/b", true)
		b.hook(Poststop, "a")
		b.engine.containers = map[string]engine.ContainerStatus{}
		work(func(*Worker) {})
		b.want("reconcile [] []")

		// Another engine is to be the machine's.
		b.hook(CreateRuntime, "c")
		b.hook(Poststart, "c")
		begin := time.Now()
		work(func(w *Worker) {
			for range 2 {
				if !w.Yield() {
					t.Error("does not yield")
				}
			}
		})
		if took := time.Since(begin); took > 0 {
			t.Errorf("yields after %v", took)
		}
		if m, _, err := b.members.Get(t.Context(), "c"); err != nil || m.Done {
			t.Errorf("left behind: %+v, %v", m, err)
		}
	})
}
