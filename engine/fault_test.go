package engine

import (
	"fmt"
	"slices"
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
	"add", "remove", "list", "bind", "unbind", "merge", "settle", "unmerge", "counters",
	"open", "member", "exists", "waitEmpty", "mergeableOnes", "mergeable", "find", "activity", "clearDirty", "merged",
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
}

// Whatever fails, and however: nothing hangs or is left open, partitions of others are
// not touched, no process is merged outside of its own, and when nothing fails any
// more, all is as it should be.
func TestFaults(t *testing.T) {
	for features, f := range faulty {
		for _, call := range calls {
			for _, err := range errnos {
				if call == "remove" && err == kernel.ErrNoPartition {
					continue // a kernel that says that it is done is believed
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
			troubled(t, f, func(*bench, string) error {
				mu.Lock()
				defer mu.Unlock()
				if n++; n%3 != 0 {
					return nil
				}
				return errnos[n/3%len(errnos)]
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
		b.configure(func(s *Settings) { s.Dirty = true })
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

		b.failWith(func(called string) error { return trouble(b, called) })
		for _, c := range all {
			b.Add(b.Context(), c)
			b.Start(c.ID)
		}
		time.Sleep(15 * time.Minute)
		took()
		b.failWith(nil)
		if err := b.Reconcile(nil, all); err != nil {
			t.Error(err)
		}
		time.Sleep(30 * time.Minute)
		synctest.Wait()
		now := b.took()
		for pid, partition := range want {
			if !slices.ContainsFunc(now, func(c string) bool { return strings.HasPrefix(c, "merge "+partition+" "+pid+" ") }) {
				t.Errorf("process %s is not merged in %s when all is well again", pid, partition)
			}
		}
		made = append(made, now...)
		for _, name := range []string{"own-1", "own-2"} {
			if !b.has(name) {
				t.Errorf("partition %s is missing", name)
			}
		}

		b.failWith(func(called string) error { return trouble(b, called) })
		for _, c := range all {
			b.Stop(c.ID)
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
			if len(words) > 2 && want[words[2]] != words[1] {
				t.Errorf("asked for %q of a process of %s", c, want[words[2]])
			}
		}
	})
}
