package engine

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	logtest "github.com/sirupsen/logrus/hooks/test"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest"
	"github.com/selective-ksm/selective-ksm/engine/kernel/sysfs"
	"github.com/selective-ksm/selective-ksm/engine/memory"
	"github.com/selective-ksm/selective-ksm/test/missing"
	"github.com/selective-ksm/selective-ksm/test/pages"
)

const (
	// forkerAt is where forkers have their data, all of them, and forkerPages how much.
	forkerAt    = 0x200000000000
	forkerPages = 16
)

// forking is the environment variable that makes the test's binary a forker.
const forking = "SELECTIVE_KSM_FORK"

func init() {
	if os.Getenv(forking) == "" {
		return
	}
	if err := serveForks(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// serveForks forks children that hold the same data and do nothing.
func serveForks() error {
	// Children end with the thread that made them, and are reaped by the kernel.
	runtime.LockOSThread()
	signal.Ignore(unix.SIGCHLD)
	size := uintptr(forkerPages * os.Getpagesize())
	at, err := unix.MmapPtr(-1, 0, unsafe.Add(nil, forkerAt), size,
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED_NOREPLACE)
	if err != nil {
		return err
	}
	data := unsafe.Slice((*byte)(at), size)
	for i := range data {
		data[i] = byte(i/os.Getpagesize() + 1)
	}
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		command, argument, _ := strings.Cut(lines.Text(), " ")
		number, _ := strconv.Atoi(argument)
		answer := 0
		switch command {
		case "mergeable":
			err = unix.Prctl(unix.PR_SET_MEMORY_MERGE, 1, 0, 0, 0)
		case "fork":
			answer, err = kerneltest.Fork()
		case "kill":
			err = unix.Kill(number, unix.SIGKILL)
		case "reuse":
			answer, err = kerneltest.ForkAs(number)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", lines.Text(), err)
		}
		fmt.Println(answer)
	}
	return lines.Err()
}

// forker is a process that forks when it is told.
type forker struct {
	t   *testing.T
	pid int
	in  io.WriteCloser
	out *bufio.Scanner
}

// startForker starts a forker in a cgroup of its own.
func startForker(t *testing.T, name string) *forker {
	t.Helper()
	dir := newCgroup(t, name)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), forking+"=1", "GOMAXPROCS=1")
	cmd.Stderr = os.Stderr
	f := &forker{t: t}
	if f.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	f.out = bufio.NewScanner(out)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	f.pid = cmd.Process.Pid
	enter(t, dir, f.pid)
	if !f.out.Scan() {
		t.Fatalf("forker said nothing: %v", f.out.Err())
	}
	return f
}

func (f *forker) do(format string, args ...any) int {
	f.t.Helper()
	if _, err := fmt.Fprintf(f.in, format+"\n", args...); err != nil {
		f.t.Fatal(err)
	}
	if !f.out.Scan() {
		f.t.Fatalf("forker did not answer to "+format, args...)
	}
	n, err := strconv.Atoi(f.out.Text())
	if err != nil {
		f.t.Fatal(err)
	}
	return n
}

// late is a kernel that is asked to merge a process when its number is another's
// already: as late as it can be.
type late struct {
	kernel.Kernel
	bind bool
	// victim is the number, once; reuse makes it another's.
	victim int
	reuse  func(pid int)
	// answer is what the kernel said to the merge.
	answer error
}

func (l *late) Features() kernel.Features {
	f := l.Kernel.Features()
	f.Bind = f.Bind && l.bind
	return f
}

func (l *late) Merge(ctx context.Context, partition string, pid int, r kernel.Range) error {
	if pid != l.victim {
		return l.Kernel.Merge(ctx, partition, pid, r)
	}
	l.victim = 0
	l.reuse(pid)
	l.answer = l.Kernel.Merge(ctx, partition, pid, r)
	return l.answer
}

// onlyData is the machine, of which forkers offer no more than their data.
type onlyData struct{ linux }

func (onlyData) find(_ context.Context, pid int, o memory.Options) (memory.Offer, error) {
	data := kernel.Range{Start: forkerAt, End: forkerAt + uint64(forkerPages*os.Getpagesize())}
	return memory.Offer{Ranges: []kernel.Range{data}, Bytes: data.Len(), Mergeable: true}, nil
}

// Numbers of processes are used again, thousands of times, between the moment that
// the engine looks at a process and that the kernel is asked to merge it. No page of
// the stranger stays merged with the container's.
func TestVMNumbersUsedAgain(t *testing.T) {
	if os.Getenv("SELECTIVE_KSM_VM") == "" {
		t.Skip("not in the VM: it leaves the whole machine few numbers for processes")
	}
	fs, err := sysfs.Open()
	if err != nil {
		missing.Skip(t, "%v", err)
	}
	for name, tc := range map[string]struct {
		bind     bool // the engine binds processes
		stranger func(t *testing.T, k kernel.Kernel, b *forker)
		want     error // what the kernel says to the merge of the stranger
		taken    bool  // the stranger was taken in, or may have been, and must be let go
		reuses   int   // how often a number is used again
	}{
		"bound elsewhere": {true, func(t *testing.T, k kernel.Kernel, b *forker) {
			if err := errors.Join(k.AddPartition("sksm-test-b"), k.Bind("sksm-test-b", b.pid)); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { k.RemovePartition("sksm-test-b") })
		}, kernel.ErrBusy, false, 1200},
		"bound to nothing": {true, func(t *testing.T, k kernel.Kernel, b *forker) { b.do("mergeable") }, nil, true, 300},
		"without binding":  {false, func(t *testing.T, k kernel.Kernel, b *forker) { b.do("mergeable") }, nil, true, 300},
		// Where it does not bind, the kernel does not say whether it has merged anything.
		"not mergeable": {false, func(*testing.T, kernel.Kernel, *forker) {}, nil, true, 300},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.bind && !fs.Features().Bind {
				missing.Skip(t, "the kernel does not bind processes")
			}
			a, b := startForker(t, "sksm-test-a"), startForker(t, "sksm-test-b")
			k := &late{Kernel: fs, bind: tc.bind}
			tc.stranger(t, fs, b)
			if !tc.bind {
				a.do("mergeable")
			}
			kerneltest.FewNumbers(t)

			log, _ := logtest.NewNullLogger()
			e := New(Options{Kernel: k, Owned: func(string) bool { return false }, Log: log, Settings: Settings{Interval: time.Hour}})
			e.host = onlyData{linux{cgroupRoot: cgroup.DefaultRoot}}
			p := e.partition("sksm-test-a")
			e.mu.Lock()
			e.join(Container{ID: "a", CgroupsPath: "/sksm-test-a", Partition: p.name})
			e.start("a")
			e.mu.Unlock()
			t.Cleanup(func() { fs.RemovePartition(p.name) })
			p.step(t.Context())

			var forks, taken int
			for done := 0; done < tc.reuses; {
				child := a.do("fork")
				for child < kerneltest.Reserved {
					a.do("kill %d", child)
					child = a.do("fork")
				}
				k.victim, k.answer = child, errors.New("not asked")
				reused := 0
				k.reuse = func(pid int) {
					a.do("kill %d", pid)
					reused = b.do("reuse %d", pid)
				}
				p.again()
				p.step(t.Context())
				if reused < 0 {
					if p.spoilt {
						p.step(t.Context())
					}
					continue
				}
				done++
				forks += reused
				if !errors.Is(k.answer, tc.want) {
					t.Fatalf("the kernel said %v to a merge of a stranger, want %v", k.answer, tc.want)
				}
				if p.spoilt {
					taken++
					p.step(t.Context()) // it is unmerged, and begins anew
				}
				if n := mergedWith(t, a.pid, child); n != 0 {
					t.Fatalf("%d pages of a stranger are merged with the container's", n)
				}
				if still, err := os.ReadFile(fmt.Sprintf("/proc/%d/ksm_merging_pages", child)); err != nil || string(bytes.TrimSpace(still)) != "0" {
					t.Fatalf("%s pages of the stranger are merged, %v", still, err)
				}
				b.do("kill %d", child)
			}
			t.Logf("%d numbers were used again, after %d forks; %d times a stranger was taken in and let go", tc.reuses, forks, taken)
			if want := map[bool]int{true: tc.reuses}[tc.taken]; taken != want {
				t.Errorf("a stranger was let go %d times, want %d", taken, want)
			}
		})
	}
}

// mergedWith is how many pages of the data that two forkers have are one page.
func mergedWith(t *testing.T, a, b int) int {
	t.Helper()
	var frames [2][]pages.Page
	for i, pid := range []int{a, b} {
		held, err := pages.Range(pid, forkerAt, forkerAt+uint64(forkerPages*os.Getpagesize()))
		if err != nil {
			t.Fatal(err)
		}
		if len(held) != forkerPages {
			t.Fatalf("process %d has %d pages of data, want %d", pid, len(held), forkerPages)
		}
		frames[i] = pages.ByFrame(held)
	}
	return len(pages.Common(frames[0], frames[1]))
}
