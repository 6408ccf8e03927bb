package engine

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// calls are all that the engine asks the kernel and the machine for.
var calls = []string{
	"recover", "add", "remove", "list", "bind", "unbind", "merge", "settle", "unmerge", "counters",
	"open", "member", "exists", "waitEmpty", "pressed", "mergeableOnes", "mergeable", "find", "activity", "clearDirty", "merged",
}

// errnos are what the kernel may answer to any of them.
var errnos = []error{
	unix.EPERM, unix.ENOENT, unix.ESRCH, unix.EINTR, unix.EIO, unix.EBADF, unix.EAGAIN, unix.ENOMEM, unix.EACCES, unix.EFAULT,
	unix.EBUSY, unix.EEXIST, unix.ENODEV, unix.EINVAL, unix.EMFILE, unix.ENFILE, unix.ENOSPC, unix.ENOSYS, unix.ENAMETOOLONG,
	kernel.ErrNotSupported, kernel.ErrNoPartition, kernel.ErrPartitionExists, kernel.ErrGoing, kernel.ErrKeptOut,
	kernel.ErrNoProcess, kernel.ErrNotMember, kernel.ErrBusy,
}

// faulty are the kernels that faults are tried on.
var faulty = map[string]kernel.Features{
	"series": {}, "binding": {Bind: true}, "wide": {WideRemoval: true, SharedCounters: true, PageByPage: true},
	"mainline": oneSpace,
}

// believed reports whether an answer is taken for the truth, and would be a lie: that
// there is no such partition to remove, or, where one has the merge space, that another
// has it, too.
func believed(f kernel.Features, call string, err error) bool {
	return call == "remove" && err == kernel.ErrNoPartition || f.OneSpace && call == "add" && err == kernel.ErrPartitionExists
}

// Whatever fails, and however: nothing hangs or is left open, partitions of others are
// not touched, no process is merged outside of its own, and when nothing fails any
// more, all is as it should be.
func TestFaults(t *testing.T) {
	for features, f := range faulty {
		for _, call := range calls {
			for _, err := range errnos {
				if believed(f, call, err) {
					continue
				}
				t.Run(fmt.Sprintf("%s/%s/%v", features, call, err), func(t *testing.T) {
					troubled(t, f, func(b *bench, called string) error {
						if strings.HasPrefix(called+" ", call+" ") {
							return fmt.Errorf("injected: %w", err)
						}
						return nil
					})
				})
			}
		}
	}
}

// A kernel that fails only each third time, in turn by every error.
func TestFaultsNowAndThen(t *testing.T) {
	for features, f := range faulty {
		t.Run(features, func(t *testing.T) {
			var mu sync.Mutex
			n := 0
			troubled(t, f, func(_ *bench, called string) error {
				mu.Lock()
				defer mu.Unlock()
				if n++; n%3 != 0 {
					return nil
				}
				call, _, _ := strings.Cut(called, " ")
				if err := errnos[n/3%len(errnos)]; !believed(f, call, err) {
					return err
				}
				return nil
			})
		})
	}
}

// A kernel that takes its time.
func TestDelays(t *testing.T) {
	for features, f := range faulty {
		for _, call := range calls {
			for _, delay := range []time.Duration{time.Second, time.Minute} {
				t.Run(fmt.Sprintf("%s/%s/%v", features, call, delay), func(t *testing.T) {
					troubled(t, f, func(b *bench, called string) error {
						if strings.HasPrefix(called+" ", call+" ") {
							time.Sleep(delay)
						}
						return nil
					})
				})
			}
		}
	}
}

// Somebody else removes our partitions, before each kind of call.
func TestPartitionsVanish(t *testing.T) {
	for features, f := range faulty {
		if f.OneSpace {
			continue // who has the merge space is for us alone to say
		}
		for _, call := range calls {
			t.Run(features+"/"+call, func(t *testing.T) {
				troubled(t, f, func(b *bench, called string) error {
					if strings.HasPrefix(called+" ", call+" ") {
						b.set(func(m *machine) {
							delete(m.partitions, "own-1")
							delete(m.partitions, "own-2")
						})
					}
					return nil
				})
			})
		}
	}
}

// troubled runs containers through their lives while something is wrong.
func troubled(t *testing.T, f kernel.Features, trouble func(b *bench, called string) error) {
	on(t, f, func(b *bench) {
		b.configure(func(s *Settings) { s.Dirty, s.Pressure = true, PressurePod })
		b.machine.partitions["theirs"] = true
		all := []Container{b.container("a", "own-1", 11), b.container("b", "own-1", 12), b.container("c", "own-2", 13)}
		want := map[string]string{"11": "own-1", "12": "own-1", "13": "own-2"} // by pid
		if f.WideRemoval {
			// Beside a partition of somebody else nothing would be removed.
			delete(b.machine.partitions, "theirs")
		}
		var made []string
		took := func() {
			synctest.Wait()
			made = append(made, b.took()...)
		}
		// watched looks at the one merge space of a kernel that has no more, each time that
		// it is merged.
		watched := func(trouble func(b *bench, called string) error) func(called string) error {
			return func(called string) error {
				if partition, settles := strings.CutPrefix(called, "settle "); settles {
					b.wantAlone(partition, want)
				}
				return trouble(b, called)
			}
		}
		well := func(*bench, string) error { return nil }

		b.failWith(watched(trouble))
		for i, c := range all {
			// As the plugin does: what is refused is not opted in.
			if err := b.Add(b.Context(), c); f.OneSpace {
				b.set(func(m *machine) {
					if pid := 11 + i; err == nil {
						m.mergeableAll = append(m.mergeableAll, pid)
					} else {
						m.optedOut[pid] = true
					}
				})
			}
			b.Start(c.ID)
		}
		time.Sleep(10 * time.Minute)
		if err := b.Engine.Unmerge(""); err != nil {
			t.Error(err)
		}
		time.Sleep(5 * time.Minute)
		took()
		b.failWith(watched(well))
		if err := b.Engine.Merge(""); err != nil {
			t.Error(err)
		}
		if err := b.Reconcile(nil, all); err != nil {
			t.Error(err)
		}
		time.Sleep(30 * time.Minute)
		synctest.Wait()
		now := b.took()
		there := b.partitionsOf(want)
		if !f.OneSpace && len(there) != 2 {
			t.Errorf("partitions are %v when all is well again", there)
		}
		for pid, partition := range want {
			merged := slices.ContainsFunc(now, func(c string) bool { return strings.HasPrefix(c, "merge "+partition+" "+pid+" ") })
			if should := slices.Contains(there, partition) && b.optedIn(pid); merged != should {
				t.Errorf("process %s is merged in %s when all is well again: %v, want %v", pid, partition, merged, should)
			}
		}
		if f.OneSpace {
			b.wantOneSpace(want)
		}
		made = append(made, now...)

		b.failWith(watched(trouble))
		for _, c := range all {
			b.Stop(c.ID)
			if f.OneSpace {
				// What is mergeable stays so until it ends.
				b.set(func(m *machine) { delete(m.containers, c.CgroupsPath); m.mergeableAll = nil })
			}
		}
		time.Sleep(15 * time.Minute)
		took()
		b.failWith(nil)
		time.Sleep(10 * time.Minute)
		took()
		b.machine.mu.Lock()
		left := len(b.machine.partitions)
		if b.machine.partitions["theirs"] {
			left--
		}
		bound := len(b.machine.bound)
		b.machine.mu.Unlock()
		if left != 0 || len(b.Status()) != 0 {
			t.Errorf("%d partitions are left, and %+v", left, b.Status())
		}
		if f.Bind && bound > 0 && !slices.ContainsFunc(made, func(c string) bool { return strings.HasPrefix(c, "remove") }) {
			t.Errorf("%d processes are still bound", bound)
		}
		for _, c := range made {
			words := strings.Fields(c)
			if words[1] == "theirs" {
				t.Errorf("asked for %q", c)
			}
			// Somebody may have to be let go elsewhere.
			if len(words) > 2 && words[0] != "unbind" && want[words[2]] != words[1] {
				t.Errorf("asked for %q of a process of %s", c, want[words[2]])
			}
		}
	})
}

// optedIn reports whether a process is mergeable, or may be made so.
func (b *bench) optedIn(pid string) bool {
	b.machine.mu.Lock()
	defer b.machine.mu.Unlock()
	n, err := strconv.Atoi(pid)
	return err == nil && !b.optedOut[n]
}

// partitionsOf are those of processes' partitions that the kernel has.
func (b *bench) partitionsOf(want map[string]string) []string {
	var there []string
	for _, partition := range want {
		if b.has(partition) {
			there = append(there, partition)
		}
	}
	slices.Sort(there)
	return slices.Compact(there)
}

// wantAlone fails the test if a process of another partition is mergeable.
func (b *bench) wantAlone(partition string, want map[string]string) {
	b.machine.mu.Lock()
	defer b.machine.mu.Unlock()
	for _, pid := range b.mergeableAll {
		if of := want[strconv.Itoa(pid)]; of != partition {
			b.Errorf("ksmd runs for %s while process %d of %s is mergeable", partition, pid, of)
		}
	}
}

// wantOneSpace fails the test unless one partition has the merge space, that of those
// that are mergeable if there are any, and the others say why they have not.
func (b *bench) wantOneSpace(want map[string]string) {
	there, most := b.partitionsOf(want), 0
	for pid := range want {
		if b.optedIn(pid) {
			most = 1
		}
	}
	if len(there) != most {
		b.Fatalf("partitions are %v, want %d", there, most)
	}
	for _, p := range b.Status() {
		if kept := strings.Contains(p.Reason, kernel.ErrKeptOut.Error()); kept == slices.Contains(there, p.Name) {
			b.Errorf("%s has the merge space, and status is %+v", there, p)
		}
	}
}
