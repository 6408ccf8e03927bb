package kernel_test

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/actor"
	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
	"github.com/selective-ksm/selective-ksm/test/missing"
	"github.com/selective-ksm/selective-ksm/test/pages"
)

// stage is where all processes of the tests report.
var stage *actor.Stage

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	// Only where there is something to test the program must be there.
	if hasPartitions() == nil {
		var err error
		if stage, err = actor.OpenStage("../../build/bin/actor"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer stage.Close()
	}
	return m.Run()
}

func hasPartitions() error {
	_, err := os.Stat(ksm.Root + "/control/add_partition")
	return err
}

func needsKernel(t *testing.T) {
	t.Helper()
	if err := hasPartitions(); err != nil {
		missing.Skip(t, "this kernel has no Selective KSM (%v); make test boots one that has", err)
	}
}

// process is an actor, and the region of memory that it holds.
type process struct {
	t *testing.T
	*actor.Actor
	start, end uint64
}

// startUnmergeable runs a process that is not mergeable, and whose memory is
// none but what it is told to hold.
func startUnmergeable(t *testing.T) *process {
	t.Helper()
	needsKernel(t)
	return startAs(t, unix.SysProcAttr{})
}

// startAs does so with attributes of the process, and files from descriptor 3
// on.
func startAs(t *testing.T, attr unix.SysProcAttr, files ...*os.File) *process {
	t.Helper()
	a, err := stage.Start(t.Context(), attr, files...)
	if err != nil {
		t.Fatal(err)
	}
	return own(t, a)
}

// own kills an actor at the end of the test.
func own(t *testing.T, a *actor.Actor) *process {
	t.Cleanup(func() {
		if err := a.Kill(); err != nil {
			t.Error(err)
		}
	})
	return &process{t: t, Actor: a}
}

// start runs a process that has made its memory mergeable.
func start(t *testing.T) *process {
	t.Helper()
	p := startUnmergeable(t)
	p.optIn(true)
	return p
}

// holding runs a process that holds a number of pages, all different, that are
// the same for the same seed.
func holding(t *testing.T, number int, seed uint64) *process {
	t.Helper()
	p := start(t)
	p.hold(number, number, seed)
	return p
}

// optIn has the process make its memory mergeable by itself, or no longer.
func (p *process) optIn(in bool) {
	p.t.Helper()
	value := 0
	if in {
		value = 1
	}
	p.syscall(unix.SYS_PRCTL, unix.PR_SET_MEMORY_MERGE, value, 0, 0, 0)
}

func (p *process) hold(number, distinct int, seed uint64) {
	p.t.Helper()
	p.start = uint64(p.ask("map %d %d %d", number, distinct, seed))
	p.end = p.start + uint64(number*actor.PageSize)
}

// ask has the process do something, and fails the test if it could not.
func (p *process) ask(format string, args ...any) int64 {
	p.t.Helper()
	n, err := p.Ask(format, args...)
	if err != nil {
		p.t.Fatal(err)
	}
	return n
}

// trySyscall has the process do a system call.
func (p *process) trySyscall(number int, args ...any) (int64, error) {
	format := "syscall %d"
	for range args {
		format += " %d"
	}
	return p.Ask(format, append([]any{number}, args...)...)
}

func (p *process) syscall(number int, args ...any) int64 {
	p.t.Helper()
	n, err := p.trySyscall(number, args...)
	if err != nil {
		p.t.Fatal(err)
	}
	return n
}

// fork has the process fork; the other one has the same memory.
func (p *process) fork() *process {
	p.t.Helper()
	a, err := p.Fork(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	child := own(p.t, a)
	child.start, child.end = p.start, p.end
	return child
}

// kill ends the process at once, and waits until it is gone.
func (p *process) kill() {
	p.t.Helper()
	if err := p.Kill(); err != nil {
		p.t.Fatal(err)
	}
}

// merge merges the pages from first on, as many as count says.
func (p *process) merge(partition string, first, count int) error {
	from := p.start + uint64(first*actor.PageSize)
	return ksm.Write(partition+"/trigger_merge", "%d %x %x", p.Pid, from, from+uint64(count*actor.PageSize))
}

func (p *process) mergeAll(partition string) {
	p.t.Helper()
	if err := ksm.Write(partition+"/trigger_merge", "%d %x %x", p.Pid, p.start, p.end); err != nil {
		p.t.Fatal(err)
	}
}

// wantBound fails the test if the process is not bound to a partition, so that
// another one refuses it.
func (p *process) wantBound(t *testing.T, partition, other string) {
	t.Helper()
	if err := ksm.Write(other+"/trigger_merge", "%d 1000 2000", p.Pid); !errors.Is(err, unix.EBUSY) {
		t.Errorf("merge process %d of partition %s into %s: %v, want %v", p.Pid, partition, other, err, unix.EBUSY)
	}
	if err := ksm.Write(partition+"/trigger_merge", "%d 1000 2000", p.Pid); err != nil {
		t.Errorf("merge process %d into its partition %s: %v", p.Pid, partition, err)
	}
}

func (p *process) pages() []pages.Page {
	p.t.Helper()
	found, err := pages.Range(p.Pid, p.start, p.end)
	if err != nil {
		p.t.Fatal(err)
	}
	return found
}

// ksmPages counts the page table entries of processes that map a ksm page, and
// the ksm pages.
func ksmPages(t *testing.T, processes ...*process) (mappings, frames int) {
	t.Helper()
	seen := make(map[uint64]bool)
	for _, p := range processes {
		all, err := pages.All(p.Pid)
		if err != nil {
			t.Fatal(err)
		}
		numbers := make([]uint64, len(all))
		for i, page := range all {
			numbers[i] = page.Frame
		}
		flags, err := pages.FlagsOf(numbers...)
		if err != nil {
			t.Fatal(err)
		}
		for i, f := range flags {
			if f.KSM() {
				mappings++
				seen[numbers[i]] = true
			}
		}
	}
	return mappings, len(seen)
}
