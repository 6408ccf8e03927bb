package kernel_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
)

// patience is for what the kernel does by itself. It is long, since an
// emulated kernel that checks itself is slow.
const patience = time.Minute

// eventually fails the test if f does not return nil in time.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for began := time.Now(); ; <-poll.C {
		err := f()
		if err == nil {
			return
		}
		if time.Since(began) > patience {
			t.Fatal(err)
		}
	}
}

func exists(name string) bool {
	_, err := os.Stat(filepath.Join(ksm.Root, name))
	return err == nil
}

// wantGone waits for a partition to go.
func wantGone(t *testing.T, name string) {
	t.Helper()
	eventually(t, func() error {
		if exists(name) {
			return fmt.Errorf("partition %s is still there", name)
		}
		return nil
	})
}

func wantHere(t *testing.T, name string) {
	t.Helper()
	if !exists(name) {
		t.Fatalf("partition %s is gone", name)
	}
}

// Whichever way a partition was made, both see it, and merge into the same.
func TestSamePartitionBothWays(t *testing.T) {
	wantFeature(t, syscalls)
	const n = 256
	for _, made := range []string{"in sysfs", "by ksm_open"} {
		t.Run(made, func(t *testing.T) {
			flags := 0
			if made == "in sysfs" {
				partition(t, "a")
			} else {
				flags = unix.O_CREAT | unix.O_EXCL
			}
			f := open(t, "a", flags)
			wantHere(t, "a")
			wantErr(t, "add it", ksm.Write("control/add_partition", "a"), unix.EEXIST)
			p, q := holding(t, n, 1), holding(t, n, 1)
			if err := p.mergeInto(f); err != nil {
				t.Fatal(err)
			}
			q.mergeAll("a")
			if got := counter(t, "a/pages_sharing"); got != n {
				t.Errorf("%d pages merged, want %d", got, n)
			}
			wantCounters(t, "a", p, q)
			p.ask("check")
			q.ask("check")
		})
	}
}

// The last close of a partition that ksm_open made unmerges and removes it.
func TestLastCloseRemoves(t *testing.T) {
	wantFeature(t, syscalls)
	const n = 256
	other := partition(t, "other")
	f := open(t, "a", unix.O_CREAT)
	second := open(t, "a", unix.O_CREAT)
	dup, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	third := os.NewFile(uintptr(dup), "a")
	defer third.Close()
	p, q := holding(t, n, 1), holding(t, n, 1)
	p.mergeAll("a")
	q.mergeAll("a")
	for _, f := range []*os.File{f, second} {
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		wantHere(t, "a")
		if got := counter(t, "a/pages_sharing"); got != n {
			t.Errorf("%d pages merged while a descriptor is open, want %d", got, n)
		}
	}
	if err := p.mergeInto(third); err != nil {
		t.Errorf("ksm_merge by the last descriptor: %v", err)
	}
	if err := third.Close(); err != nil {
		t.Fatal(err)
	}
	wantGone(t, "a")
	if mappings, _ := ksmPages(t, p, q); mappings != 0 {
		t.Errorf("%d entries of page tables map ksm pages of a partition that is gone", mappings)
	}
	wantErr(t, "merge into another partition then", p.merge(other, 0, n), nil)
	p.ask("check")
	q.ask("check")
}

// A descriptor that was forked is one more holder, and a killed holder is none.
func TestHoldersMayDie(t *testing.T) {
	wantFeature(t, syscalls)
	holder := startUnmergeable(t)
	holder.ask("open %d %d a", ksm.OpenNumber, unix.O_CREAT)
	child := holder.fork()
	holder.kill()
	wantHere(t, "a")
	p := holding(t, 16, 1)
	p.mergeAll("a")
	child.kill()
	wantGone(t, "a")
	if mappings, _ := ksmPages(t, p); mappings != 0 {
		t.Errorf("%d ksm pages of a partition that is gone", mappings)
	}
	// exec keeps a descriptor that was not opened to be closed.
	holder = startUnmergeable(t)
	holder.ask("open %d %d a", ksm.OpenNumber, unix.O_CREAT)
	if err := holder.Exec(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantHere(t, "a")
	if err := holder.Exec(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantHere(t, "a")
	holder.kill()
	wantGone(t, "a")
}

func TestSysfsPartitionSurvivesClose(t *testing.T) {
	wantFeature(t, syscalls)
	const n = 64
	a := partition(t, "a")
	p := holding(t, n, 1)
	for range 2 {
		f := open(t, a, unix.O_CREAT)
		if err := p.mergeInto(f); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	// What a close does without being asked would be done by now.
	f := open(t, "later", unix.O_CREAT)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	wantGone(t, "later")
	wantHere(t, a)
	if got := counter(t, a+"/pages_unshared"); got != n {
		t.Errorf("%d candidates after the last close, want %d", got, n)
	}
}

// Descriptors of a partition that was removed have no part in a new one of the
// same name.
func TestRemoveUnderDescriptors(t *testing.T) {
	wantFeature(t, syscalls)
	const n = 64
	p, q := holding(t, n, 1), holding(t, n, 1)
	f := open(t, "a", unix.O_CREAT)
	p.mergeAll("a")
	q.mergeAll("a")
	if err := ksm.Write("control/remove_partition", "a"); err != nil {
		t.Fatal(err)
	}
	wantGone(t, "a")
	if mappings, _ := ksmPages(t, p, q); mappings != 0 {
		t.Errorf("%d ksm pages of a removed partition", mappings)
	}
	wantErr(t, "ksm_merge into a removed partition", p.mergeInto(f), unix.ENOENT)
	wantErr(t, "ksm_open of a removed partition", openErr("a", 0), unix.ENOENT)
	a := partition(t, "a")
	wantErr(t, "ksm_merge with the old descriptor", p.mergeInto(f), unix.ENOENT)
	p.mergeAll(a)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	wantHere(t, a)
	if got := counter(t, a+"/pages_unshared"); got != n {
		t.Errorf("%d candidates in the new partition, want %d", got, n)
	}
}

func openErr(name string, flags int) error {
	fd, err := ksm.Open(name, flags|unix.O_CLOEXEC)
	if err == nil {
		err = unix.Close(fd)
	}
	return err
}

// Who makes a partition of a name whose last one is just going waits for that.
func TestMakeWhileTheLastOneGoes(t *testing.T) {
	wantFeature(t, syscalls)
	const n, rounds = 128, 50
	p, q := holding(t, n, 1), holding(t, n, 1)
	for range rounds {
		f := open(t, "a", unix.O_CREAT)
		for _, r := range []*process{p, q} {
			if err := r.mergeInto(f); err != nil {
				t.Fatal(err)
			}
		}
		if got := counter(t, "a/pages_sharing"); got != n {
			t.Fatalf("%d pages merged, want %d", got, n)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	wantGone(t, "a")
	p.ask("check")
	q.ask("check")
}
