package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/selective-ksm/selective-ksm/engine/budget"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/memory"
)

// machine is a kernel and its processes in one, for what the engine decides.
// What a kernel does with pages is tested on a kernel.
type machine struct {
	mu         sync.Mutex
	partitions map[string]bool
	containers map[string][]int // pids by cgroup
	calls      []string
	// fail is asked before each call; it may block.
	fail func(call string) error
	// dead, foreign and optedOut are pids: of processes that exited while they
	// merged, of such whose number is another's now, and of such that are not
	// mergeable.
	dead, foreign, optedOut map[int]bool
	// again are pids of processes that exited and whose number another of the same
	// container has now.
	again map[int]bool
	// left are pids of processes that are in no container's cgroup any more, though
	// they are listed.
	left map[int]bool
	open int // handles
	// ranges are what each process offers.
	ranges []kernel.Range

	features kernel.Features
	// endless is that a look at a process's memory takes as long as it may.
	endless bool
	// quiet are processes that do nothing; others have faults all the time.
	quiet  map[int]bool
	faults uint64
	// saved is what each process has merged more after each merge, in bytes.
	saved, total uint64
	// mergeableAll are all processes of the machine that are mergeable.
	mergeableAll []int
	// inContainers are those in containers that are nobody's here.
	inContainers map[int]bool
	// bound are the partitions that processes are bound to.
	bound map[int]string
	// ended is closed, and made anew, when the containers change.
	ended   chan struct{}
	scarce  map[string]func() // by cgroup, "" for the machine's
	options []memory.Options  // of each find
	cleared []int
}

func newMachine() *machine {
	return &machine{
		partitions: map[string]bool{}, containers: map[string][]int{},
		dead: map[int]bool{}, foreign: map[int]bool{}, optedOut: map[int]bool{},
		ranges: []kernel.Range{{Start: 0x1000, End: 0x5000}},
		quiet:  map[int]bool{}, bound: map[int]string{}, ended: make(chan struct{}), scarce: map[string]func(){},
	}
}

func (m *machine) call(format string, args ...any) error {
	call := fmt.Sprintf(format, args...)
	m.mu.Lock()
	m.calls = append(m.calls, call)
	fail := m.fail
	m.mu.Unlock()
	if fail != nil {
		return fail(call)
	}
	return nil
}

// look fails as a call does, but is none to the kernel, or changes nothing there.
func (m *machine) look(what string) error {
	m.mu.Lock()
	fail := m.fail
	m.mu.Unlock()
	if fail != nil {
		return fail(what)
	}
	return nil
}

// took returns the calls since it was last called.
func (m *machine) took() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	calls := m.calls
	m.calls = nil
	return calls
}

func (m *machine) failWith(fail func(call string) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = fail
}

func (m *machine) AddPartition(name string) error {
	if err := m.call("add %s", name); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.partitions[name]:
		return kernel.ErrPartitionExists
	case m.features.OneSpace && len(m.partitions) > 0:
		return fmt.Errorf("another has the merge space: %w", kernel.ErrKeptOut)
	}
	m.partitions[name] = true
	return nil
}

func (m *machine) RemovePartition(name string) error {
	if err := m.call("remove %s", name); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.partitions[name] {
		return kernel.ErrNoPartition
	}
	delete(m.partitions, name)
	return nil
}

func (m *machine) Partitions() ([]string, error) {
	if err := m.look("list"); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.partitions)), nil
}

func (m *machine) Merge(ctx context.Context, partition string, pid int, r kernel.Range) error {
	if err := m.call("merge %s %d %x-%x", partition, pid, r.Start, r.End); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.partitions[partition] {
		return kernel.ErrNoPartition
	}
	return nil
}

func (m *machine) Unmerge(_ context.Context, partition string, pid int) error {
	if err := m.call("unmerge %s %d", partition, pid); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead[pid] && !m.foreign[pid] {
		return kernel.ErrNoProcess
	}
	return nil
}

func (m *machine) Recover(context.Context) error { return m.look("recover") }

func (m *machine) Features() kernel.Features { return m.features }
func (m *machine) Close() error              { return nil }

func (m *machine) Settle(ctx context.Context, partition string) (time.Duration, error) {
	if !m.features.OneSpace {
		return 0, ctx.Err()
	}
	return 0, m.call("settle %s", partition)
}

func (m *machine) Bind(partition string, pid int) error {
	if !m.features.Bind {
		return kernel.ErrNotSupported
	}
	if err := m.call("bind %s %d", partition, pid); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case !m.partitions[partition]:
		return kernel.ErrNoPartition
	case m.bound[pid] != "" && m.bound[pid] != partition:
		return kernel.ErrBusy
	}
	m.bound[pid] = partition
	return nil
}

func (m *machine) Unbind(partition string, pid int) error {
	if !m.features.Bind {
		return kernel.ErrNotSupported
	}
	if err := m.call("unbind %s %d", partition, pid); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.dead[pid] && !m.foreign[pid]:
		return kernel.ErrNoProcess
	case m.bound[pid] != partition:
		return kernel.ErrNotMember
	}
	delete(m.bound, pid)
	return nil
}

func (m *machine) Counters(string) (kernel.Counters, error) {
	if err := m.look("counters"); err != nil {
		return kernel.Counters{}, err
	}
	return kernel.Counters{Shared: 1, Sharing: 3}, nil
}

func (m *machine) open_(path string) ([]handle, error) {
	if err := m.look("open"); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	pids, ok := m.containers[path]
	if !ok {
		return nil, fmt.Errorf("cgroup %s: %w", path, fs.ErrNotExist)
	}
	var handles []handle
	for _, pid := range pids {
		m.open++
		handles = append(handles, &fakeHandle{m, pid, false})
	}
	return handles, nil
}

type fakeHost struct{ *machine }

func (h fakeHost) open(path string) ([]handle, error) { return h.open_(path) }

func (h fakeHost) list(path string) ([]int, error) {
	if err := h.look("open"); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if pids, ok := h.containers[path]; ok {
		return slices.Clone(pids), nil
	}
	return nil, fs.ErrNotExist
}

func (h fakeHost) member(path string, pid int) (bool, error) {
	if err := h.look("member"); err != nil {
		return false, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Contains(h.containers[path], pid) && (!h.exited(pid) || h.again[pid]) && !h.left[pid], nil
}

func (h fakeHost) exists(path string) error {
	if err := h.look("exists"); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.containers[path]; !ok {
		return fs.ErrNotExist
	}
	return nil
}

func (h fakeHost) waitEmpty(ctx context.Context, path string) error {
	if err := h.look("waitEmpty"); err != nil {
		return err
	}
	for {
		h.mu.Lock()
		pids, ended := h.containers[path], h.ended
		h.mu.Unlock()
		if len(pids) == 0 {
			return nil
		}
		select {
		case <-ended:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (h fakeHost) pressed(ctx context.Context, path string, scarce func()) error {
	if err := h.look("pressed"); err != nil {
		return err
	}
	h.mu.Lock()
	h.scarce[path] = scarce
	h.mu.Unlock()
	<-ctx.Done()
	return ctx.Err()
}

func (h fakeHost) mergeableOnes() ([]int, error) {
	if err := h.look("mergeableOnes"); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.mergeableAll), nil
}

func (h fakeHost) mergeable(pid int) (bool, error) {
	if err := h.look("mergeable"); err != nil {
		return false, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return !h.optedOut[pid], nil
}

func (h fakeHost) find(ctx context.Context, pid int, o memory.Options) (memory.Offer, error) {
	if err := h.look("find"); err != nil {
		return memory.Offer{}, err
	}
	h.mu.Lock()
	endless := h.endless
	h.mu.Unlock()
	if endless {
		<-ctx.Done()
		return memory.Offer{}, ctx.Err()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.options = append(h.options, o)
	return memory.Offer{Ranges: h.ranges, Bytes: 0x4000, Zero: 0x1000, Mergeable: !h.optedOut[pid]}, nil
}

func (h fakeHost) activity(pid int) (memory.Activity, error) {
	if err := h.look("activity"); err != nil {
		return memory.Activity{}, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.quiet[pid] {
		return memory.Activity{Resident: 1}, nil
	}
	h.faults++
	return memory.Activity{MinorFaults: h.faults}, nil
}

func (h fakeHost) contained(pid int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.inContainers[pid]
}

func (h fakeHost) clearDirty(pid int, alive func() bool) error {
	if err := h.look("clearDirty"); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cleared = append(h.cleared, pid)
	return nil
}

func (h fakeHost) merged(int) (uint64, error) {
	if err := h.look("merged"); err != nil {
		return 0, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.total += h.saved
	return 0x2000 + h.total, nil
}

type fakeHandle struct {
	m      *machine
	pid    int
	merged bool
}

func (h *fakeHandle) Pid() int { return h.pid }

func (h *fakeHandle) Alive() bool {
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	return !h.m.exited(h.pid)
}

// exited is that a process is marked as dead and was merged. m.mu is held.
func (m *machine) exited(pid int) bool {
	return m.dead[pid] && slices.ContainsFunc(m.calls, func(c string) bool {
		return strings.HasPrefix(c, "merge ") && strings.Contains(c, fmt.Sprintf(" %d ", pid))
	})
}

func (h *fakeHandle) Close() {
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	h.m.open--
}

// bench is an engine that runs on a machine.
type bench struct {
	*testing.T
	*machine
	*Engine
	logged *logtest.Hook
}

// settings are those of an engine in a test.
var settings = Settings{
	StartDelays: []time.Duration{time.Second, 10 * time.Second},
	Interval:    10 * time.Minute,
	MaxInterval: 10 * time.Minute,
	Budget:      budget.Limits{Workers: 2},
}

// with runs a test of an engine in a bubble: time is its own, and all goroutines
// must have ended when it is over.
func with(t *testing.T, test func(b *bench)) {
	t.Helper()
	on(t, kernel.Features{}, test)
}

// on runs it on a kernel with features.
func on(t *testing.T, f kernel.Features, test func(b *bench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		log, hook := logtest.NewNullLogger()
		m := newMachine()
		m.features = f
		e := New(Options{
			Kernel:   m,
			Owned:    func(name string) bool { return strings.HasPrefix(name, "own-") },
			Settings: settings,
			Log:      log,
		})
		e.host = fakeHost{m}
		e.jitter = func(time.Duration) time.Duration { return 0 }
		ctx, cancel := context.WithCancel(t.Context())
		stopped := make(chan struct{})
		go func() {
			defer close(stopped)
			e.Run(ctx)
		}()
		synctest.Wait()
		test(&bench{t, m, e, hook})
		cancel()
		<-stopped
		if m.open != 0 {
			t.Errorf("%d processes were not closed", m.open)
		}
	})
}

// container is a container with one process of number pid.
func (b *bench) container(id, partition string, pid int) Container {
	b.machine.mu.Lock()
	defer b.machine.mu.Unlock()
	b.machine.containers["/"+id] = []int{pid}
	return Container{ID: id, Name: "name-" + id, Pod: "pod", Namespace: "ns", SandboxID: "sandbox", CgroupsPath: "/" + id, Partition: partition}
}

// configure changes the settings of the test.
func (b *bench) configure(change func(*Settings)) {
	s := settings
	change(&s)
	b.Configure(s)
}

// set changes the machine.
func (b *bench) set(change func(m *machine)) {
	b.machine.mu.Lock()
	defer b.machine.mu.Unlock()
	change(b.machine)
	close(b.ended)
	b.ended = make(chan struct{})
}

func (b *bench) add(c Container) {
	b.Helper()
	if err := b.Add(b.Context(), c); err != nil {
		b.Error(err)
	}
}

// expect waits until all is quiet, and compares the calls to the kernel.
func (b *bench) expect(want ...string) {
	b.Helper()
	synctest.Wait()
	if got := b.took(); !slices.Equal(got, want) {
		b.Errorf("calls are\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

// messages are the log's lines, as container and message.
func (b *bench) messages() []string {
	var lines []string
	for _, e := range b.logged.AllEntries() {
		line := e.Message
		if id, ok := e.Data["container_id"]; ok {
			line = fmt.Sprintf("%v: %s", id, line)
		}
		lines = append(lines, line)
	}
	b.logged.Reset()
	return lines
}

func (b *bench) expectLog(want ...string) {
	b.Helper()
	synctest.Wait()
	if got := b.messages(); !slices.Equal(got, want) {
		b.Errorf("log is\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

func TestLifeOfAPartition(t *testing.T) {
	with(t, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		b.expect("add own-1")
		b.add(b.container("b", "own-1", 12))
		b.Start("a")
		b.expect()

		time.Sleep(time.Second)
		b.expect("merge own-1 11 1000-5000")
		b.Start("b")
		time.Sleep(time.Second)
		b.expect("merge own-1 11 1000-5000", "merge own-1 12 1000-5000")
		b.expectLog("a: merged", "a: merged", "b: merged")
		time.Sleep(9 * time.Second) // the second delay of each
		b.expect("merge own-1 11 1000-5000", "merge own-1 12 1000-5000", "merge own-1 11 1000-5000", "merge own-1 12 1000-5000")
		time.Sleep(10 * time.Minute)
		b.expect("merge own-1 11 1000-5000", "merge own-1 12 1000-5000")

		b.Stop("a")
		b.expect("unmerge own-1 11")
		b.Stop("b")
		b.expect("remove own-1")
		time.Sleep(time.Hour)
		b.expect()
		b.Start("a") // late events of the runtime
		b.Stop("b")
		b.StopSandbox("sandbox")
		b.expect()
	})
}

func TestMergedLine(t *testing.T) {
	with(t, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		b.Start("a")
		time.Sleep(time.Second)
		synctest.Wait()
		entry := b.logged.LastEntry()
		want := logrus.Fields{
			"pod": "pod", "namespace": "ns", "container": "name-a", "container_id": "a", "partition": "own-1",
			"offered_bytes": uint64(0x4000), "merged_bytes": uint64(0x2000), "saved_bytes": uint64(0x1800), "zero_bytes": uint64(0x1000),
			"duration_ms": 0.0, "processes": 1,
		}
		if entry.Message != "merged" || !maps.Equal(entry.Data, want) {
			t.Errorf("logged %q %v\nwant %v", entry.Message, entry.Data, want)
		}
	})
}

func TestNoStartDelays(t *testing.T) {
	with(t, func(b *bench) {
		b.configure(func(s *Settings) { s.StartDelays, s.Interval = nil, time.Minute })
		b.add(b.container("a", "own-1", 11))
		b.Start("a")
		b.expect("add own-1")
		time.Sleep(time.Minute)
		b.expect("merge own-1 11 1000-5000")
	})
}

func TestStopSandbox(t *testing.T) {
	with(t, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		b.add(b.container("b", "own-2", 12))
		other := b.container("c", "own-3", 13)
		other.SandboxID = "other"
		b.add(other)
		b.took()
		b.StopSandbox("sandbox")
		synctest.Wait()
		got := b.took()
		slices.Sort(got)
		if !slices.Equal(got, []string{"remove own-1", "remove own-2"}) {
			t.Errorf("calls are %v", got)
		}
	})
}

func TestAddRefused(t *testing.T) {
	with(t, func(b *bench) {
		b.failWith(func(call string) error {
			if strings.HasPrefix(call, "add") {
				return errors.New("no room")
			}
			return nil
		})
		err := b.Add(b.Context(), b.container("a", "own-1", 11))
		if err == nil || err.Error() != "container a: no room" {
			t.Errorf("got %v", err)
		}
		b.expect("add own-1", "remove own-1")
		b.Start("a")
		time.Sleep(time.Hour)
		b.expect()

		b.failWith(nil)
		b.add(b.container("a", "own-1", 11))
		b.expect("add own-1")
	})
}

// A partition that is still being removed keeps no caller: it is added again
// before the first merge.
func TestAddDuringRemoval(t *testing.T) {
	with(t, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		removing := make(chan struct{})
		b.failWith(func(call string) error {
			if strings.HasPrefix(call, "remove") {
				<-removing
			}
			return nil
		})
		b.Stop("a")
		b.expect("add own-1", "remove own-1")

		b.add(b.container("b", "own-1", 12))
		b.Start("b")
		time.Sleep(5 * time.Second)
		b.expect()
		close(removing)
		b.expect("add own-1", "merge own-1 12 1000-5000")
	})
}

// Nor does one whose kernel does not answer.
func TestAddGivesUpWaiting(t *testing.T) {
	with(t, func(b *bench) {
		adding := make(chan struct{})
		b.failWith(func(call string) error {
			if strings.HasPrefix(call, "add") {
				<-adding
			}
			return nil
		})
		ctx, cancel := context.WithTimeout(b.Context(), time.Second)
		defer cancel()
		if err := b.Add(ctx, b.container("a", "own-1", 11)); err != nil {
			t.Error(err)
		}
		b.Start("a")
		time.Sleep(2 * time.Second)
		close(adding)
		b.expect("add own-1", "merge own-1 11 1000-5000")
	})
}

func TestRemovalIsRetried(t *testing.T) {
	with(t, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		b.took()
		b.failWith(func(string) error { return errors.New("busy") })
		b.Stop("a")
		b.expect("remove own-1")
		time.Sleep(3 * time.Second)
		b.expect("remove own-1", "remove own-1")
		b.expectLog("partition is not removed yet")
		b.failWith(nil)
		time.Sleep(4 * time.Second)
		b.expect("remove own-1")
		time.Sleep(time.Hour)
		b.expect()
	})
}

func TestStopEndsAMerge(t *testing.T) {
	with(t, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		b.add(b.container("b", "own-1", 12))
		b.machine.containers["/a"] = []int{11, 13, 14}
		merging := make(chan struct{})
		b.failWith(func(call string) error {
			if strings.HasPrefix(call, "merge own-1 11") {
				<-merging
			}
			return nil
		})
		b.Start("a")
		time.Sleep(time.Second)
		b.expect("add own-1", "merge own-1 11 1000-5000")
		b.Stop("a")
		synctest.Wait()
		close(merging)
		b.expect("unmerge own-1 11", "unmerge own-1 13", "unmerge own-1 14")
		b.expectLog()
	})
}

func TestReconcile(t *testing.T) {
	with(t, func(b *bench) {
		b.machine.partitions = map[string]bool{"own-1": true, "own-old": true, "theirs": true}
		a, c := b.container("a", "own-1", 11), b.container("c", "own-2", 13)
		b.add(b.container("gone", "own-3", 12))
		b.expect("add own-3")

		if err := b.Reconcile([]Container{c}, []Container{a}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		got := b.took()
		slices.Sort(got)
		if want := []string{"add own-1", "add own-2", "remove own-3", "remove own-old"}; !slices.Equal(got, want) {
			t.Errorf("calls are %v, want %v", got, want)
		}
		if left, _ := b.Partitions(); !slices.Equal(left, []string{"own-1", "own-2", "theirs"}) {
			t.Errorf("partitions are %v", left)
		}
		time.Sleep(time.Second)
		b.expect("merge own-1 11 1000-5000")

		// Told the same again, as after a reconnection, nothing happens.
		if err := b.Reconcile([]Container{c}, []Container{a}); err != nil {
			t.Fatal(err)
		}
		b.expect()
	})
}

// A new policy moves a container to another partition.
func TestReconcileMoves(t *testing.T) {
	with(t, func(b *bench) {
		a := b.container("a", "own-pod", 11)
		b.add(a)
		b.Start("a")
		time.Sleep(time.Minute)
		synctest.Wait()
		b.took()
		a.Partition = "own-ctr"
		if err := b.Reconcile(nil, []Container{a}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		got := b.took()
		slices.Sort(got)
		if want := []string{"add own-ctr", "remove own-pod"}; !slices.Equal(got, want) {
			t.Errorf("calls are %v, want %v", got, want)
		}
		time.Sleep(time.Second)
		b.expect("merge own-ctr 11 1000-5000")
	})
}

func TestProcessExitsInAMerge(t *testing.T) {
	with(t, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		b.machine.containers["/a"] = []int{11, 12}
		b.machine.dead[11] = true
		b.Start("a")
		time.Sleep(time.Second)
		b.expect("add own-1", "merge own-1 11 1000-5000", "unmerge own-1 11", "merge own-1 12 1000-5000")
		b.expectLog("a: merged")
	})
}

// A stranger that got the number of a process in a merge leaves nothing in the
// partition.
func TestNumberIsUsedAgain(t *testing.T) {
	with(t, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		b.machine.containers["/a"] = []int{11, 12}
		b.machine.dead[11], b.machine.foreign[11] = true, true
		b.Start("a")
		time.Sleep(time.Second)
		b.expect("add own-1", "merge own-1 11 1000-5000", "unmerge own-1 11")
		b.expectLog("another process has the number of one that exited in a merge: unmerging the partition")

		b.machine.mu.Lock()
		b.machine.containers["/a"] = []int{12}
		b.machine.mu.Unlock()
		time.Sleep(time.Second)
		b.expect("remove own-1", "add own-1", "merge own-1 12 1000-5000")
	})
}

// A process that leaves the container's cgroup is left alone from then on, in the
// middle of its memory.
func TestProcessLeavesItsCgroup(t *testing.T) {
	with(t, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		b.set(func(m *machine) { m.ranges = []kernel.Range{{Start: 0, End: 2 * chunk}} })
		b.failWith(func(call string) error {
			if strings.HasPrefix(call, "merge") {
				b.set(func(m *machine) { m.left = map[int]bool{11: true} })
			}
			return nil
		})
		b.Start("a")
		time.Sleep(time.Second)
		b.expect("add own-1", "merge own-1 11 0-1000000")
		b.expectLog()
	})
}

func TestPartitionVanishes(t *testing.T) {
	with(t, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		synctest.Wait()
		b.RemovePartition("own-1")
		b.took()
		b.Start("a")
		time.Sleep(time.Second)
		b.expect("merge own-1 11 1000-5000")
		time.Sleep(time.Second)
		b.expect("add own-1", "merge own-1 11 1000-5000")
		b.expectLog("partition was removed by somebody else: adding it again", "a: merged")
	})
}

func TestFailuresAreLoggedOnce(t *testing.T) {
	for name, tc := range map[string]struct {
		err  error
		want []string
	}{
		"bound elsewhere": {kernel.ErrBusy, []string{"a: container is not merged"}},
		"no memory":       {errors.New("cannot allocate memory"), []string{"a: container is not merged"}},
		"process gone":    {kernel.ErrNoProcess, nil},
	} {
		t.Run(name, func(t *testing.T) {
			with(t, func(b *bench) {
				b.add(b.container("a", "own-1", 11))
				b.failWith(func(call string) error {
					if strings.HasPrefix(call, "merge") {
						return tc.err
					}
					return nil
				})
				b.Start("a")
				time.Sleep(time.Hour)
				b.expectLog(tc.want...)
			})
		})
	}
}

func TestNotOptedIn(t *testing.T) {
	with(t, func(b *bench) {
		b.configure(func(s *Settings) { s.StartDelays = []time.Duration{0, 10 * time.Second, 20 * time.Second} })
		b.add(b.container("a", "own-1", 11))
		b.machine.containers["/a"] = []int{11, 12}
		b.machine.optedOut[11] = true
		b.Start("a")
		b.expect("add own-1", "merge own-1 12 1000-5000")
		b.expectLog("a: merged") // it may just not have come to it yet
		time.Sleep(10 * time.Second)
		b.expectLog("a: processes of the container are not merged", "a: merged")
		time.Sleep(10 * time.Second)
		b.expectLog("a: merged")
	})
}

// The runtime does not tell of every end.
func TestContainerEndsUntold(t *testing.T) {
	with(t, func(b *bench) {
		b.add(b.container("a", "own-1", 11))
		b.add(b.container("b", "own-1", 12))
		b.Start("a")
		b.Start("b")
		b.expect("add own-1")
		b.set(func(m *machine) { m.containers["/a"] = nil })
		b.expect()
		if all := b.Status(); len(all) != 1 || len(all[0].Containers) != 1 {
			t.Errorf("status is %+v", all)
		}
		b.set(func(m *machine) { delete(m.containers, "/b") })
		b.expect("remove own-1")
	})
}

func TestContainerIsNeverStarted(t *testing.T) {
	with(t, func(b *bench) {
		late := b.container("late", "own-1", 11)
		b.set(func(m *machine) { delete(m.containers, "/late") })
		b.add(late)
		b.add(b.container("killed", "own-2", 12))
		time.Sleep(swept + time.Second)
		b.took()
		b.set(func(m *machine) { delete(m.containers, "/killed") })
		time.Sleep(swept)
		b.expect("remove own-2")
		time.Sleep(unborn)
		b.expect("remove own-1")

		// One that comes when nobody has waited for long.
		time.Sleep(time.Hour)
		b.add(b.container("last", "own-3", 13))
		time.Sleep(swept + time.Second)
		b.took()
		b.set(func(m *machine) { delete(m.containers, "/last") })
		time.Sleep(swept)
		b.expect("remove own-3")
	})
}

// No more merges run at a time than there are slots, and a container that leaves
// does not wait for one.
func TestSlots(t *testing.T) {
	with(t, func(b *bench) {
		merging := make(chan struct{})
		b.failWith(func(call string) error {
			if strings.HasPrefix(call, "merge") {
				<-merging
			}
			return nil
		})
		for i, id := range []string{"a", "b", "c"} {
			b.add(b.container(id, "own-"+id, 11+i))
		}
		b.took()
		b.Start("a")
		b.Start("b")
		time.Sleep(time.Millisecond)
		b.Start("c")
		time.Sleep(time.Second)
		synctest.Wait()
		if got := b.took(); len(got) != 2 {
			t.Errorf("calls are %v, want two merges", got)
		}
		b.Stop("c")
		b.expect("remove own-c")
		close(merging)
	})
}

// What happens before Run waits for it, and what is left at its end stays.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, _ := logtest.NewNullLogger()
		m := newMachine()
		e := New(Options{Kernel: m, Owned: func(string) bool { return true }, Settings: settings, Log: log})
		e.host = fakeHost{m}
		if err := e.Reconcile([]Container{{ID: "a", Partition: "own-1"}}, nil); err != nil {
			t.Fatal(err)
		}
		if calls := m.took(); len(calls) != 0 {
			t.Errorf("calls before Run: %v", calls)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		e.Run(ctx)
		e.Stop("a")
		synctest.Wait()
		if calls := m.took(); !slices.Equal(calls, []string{"add own-1"}) {
			t.Errorf("calls are %v", calls)
		}
	})
}
