package engine

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/kernel/sysfs"
	"github.com/selective-ksm/selective-ksm/engine/optin"
	"github.com/selective-ksm/selective-ksm/test/e2e/border"
	"github.com/selective-ksm/selective-ksm/test/missing"
	"github.com/selective-ksm/selective-ksm/test/pages"
)

// The tests of this file need root on a kernel with Selective KSM: they go by
// physical pages. With SELECTIVE_KSM_VM=1 they fail where they could not run.

const (
	holderSize = 16 << 20 // bytes
	holderName = "hold"
)

// The test binary is the opt-in wrapper and the program in a container, too.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == optin.Command {
		status, err := optin.Exec(os.Args[2:])
		fmt.Fprintln(os.Stderr, err)
		os.Exit(status)
	}
	if len(os.Args) > 1 && os.Args[1] == holderName {
		if err := hold(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// hold holds memory that is the same in all who do, each page unlike any other,
// and says where. Then it answers each line of its input: to "check" with "same" or
// "changed", to "write" by writing to every page what it has already.
func hold() error {
	mem, err := unix.Mmap(-1, 0, holderSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	random := rand.NewChaCha8([32]byte{1})
	random.Read(mem)
	want := rand.NewChaCha8([32]byte{1})
	fmt.Printf("%d\n", uintptr(unsafe.Pointer(&mem[0])))
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		switch lines.Text() {
		case "check":
			want.Seed([32]byte{1})
			page := make([]byte, os.Getpagesize())
			answer := "same"
			for have := range slices.Chunk(mem, len(page)) {
				want.Read(page)
				if !bytes.Equal(have, page) {
					answer = "changed"
				}
			}
			fmt.Println(answer)
		case "write":
			for have := range slices.Chunk(mem, os.Getpagesize()) {
				have[0]++
				have[0]--
			}
			fmt.Println("written")
		}
	}
	return lines.Err()
}

// holder is a process that holds memory, in a cgroup of its own.
type holder struct {
	Container
	pid     int
	address uint64
	in      io.Writer
	out     *bufio.Scanner
}

func selectiveKSM(t *testing.T) *sysfs.FS {
	t.Helper()
	k, err := sysfs.Open()
	if err == nil {
		return k
	}
	missing.Skip(t, "%v", err)
	return nil
}

func startHolder(t *testing.T, id, partition string) *holder {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, optin.Wrap(self, []string{self, holderName})[1:]...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cgroup.DefaultRoot, "sksm-test-"+id)
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", id, err)
		}
		os.Remove(dir)
	})
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Appendln(nil, cmd.Process.Pid), 0); err != nil {
		t.Fatal(err)
	}
	h := &holder{
		Container: Container{ID: id, Name: id, Pod: partition, CgroupsPath: "/sksm-test-" + id, Partition: partition},
		pid:       cmd.Process.Pid, in: in, out: bufio.NewScanner(out),
	}
	if !h.out.Scan() {
		t.Fatalf("%s: said nothing: %v", id, h.out.Err())
	}
	if _, err := fmt.Sscan(h.out.Text(), &h.address); err != nil {
		t.Fatal(err)
	}
	return h
}

// ask sends a holder a command.
func (h *holder) ask(t *testing.T, command, want string) {
	t.Helper()
	if _, err := fmt.Fprintln(h.in, command); err != nil {
		t.Fatalf("%s: %v", h.ID, err)
	}
	if !h.out.Scan() || h.out.Text() != want {
		t.Errorf("%s: answered %q to %s, want %q", h.ID, h.out.Text(), command, want)
	}
}

// shared is how many pages of the memory that a and b hold are the same physical
// page.
func shared(t *testing.T, a, b *holder) int {
	t.Helper()
	return len(pages.Common(pages.ByFrame(a.held(t)), pages.ByFrame(b.held(t))))
}

func (h *holder) held(t *testing.T) []pages.Page {
	t.Helper()
	p, err := pages.Range(h.pid, h.address, h.address+holderSize)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// mostly is nearly all pages that a holder holds.
var mostly = holderSize / os.Getpagesize() * 95 / 100

// apart fails the test if any two processes share any page of their memory.
func apart(t *testing.T, as, bs []*holder) {
	t.Helper()
	var processes []border.Process
	for _, a := range as {
		processes = append(processes, border.Process{Tenant: "a", Name: a.ID, PID: a.pid})
	}
	for _, b := range bs {
		processes = append(processes, border.Process{Tenant: "b", Name: b.ID, PID: b.pid})
	}
	crossings, err := border.Crossings(processes...)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range crossings {
		t.Error(c)
	}
}

// lines is a hook that passes on what is logged.
type lines chan *logrus.Entry

func (lines) Levels() []logrus.Level { return logrus.AllLevels }

func (l lines) Fire(e *logrus.Entry) error {
	l <- e
	return nil
}

// run runs an engine until the test ends or stop is called.
func run(t *testing.T, k kernel.Kernel) (e *Engine, log lines, stop func()) {
	t.Helper()
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	log = make(lines, 1000)
	logger.AddHook(log)
	e = New(Options{
		Kernel: k, Owned: func(name string) bool { return strings.HasPrefix(name, "sksm-test-") },
		StartDelays: []time.Duration{0}, Interval: time.Hour, Log: logger,
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		e.Run(ctx)
	}()
	stop = func() {
		cancel()
		<-ended
	}
	t.Cleanup(stop)
	return e, log, stop
}

// waitMerged waits until containers have most of what they hold merged.
func (l lines) waitMerged(t *testing.T, holders ...*holder) {
	t.Helper()
	missing := map[string]bool{}
	for _, h := range holders {
		missing[h.ID] = true
	}
	deadline := time.After(time.Minute)
	for len(missing) > 0 {
		select {
		case e := <-l:
			if e.Message != "merged" {
				t.Errorf("logged %q %v", e.Message, e.Data)
			} else if bytes := e.Data["merged_bytes"].(uint64); bytes >= uint64(mostly*os.Getpagesize()) {
				delete(missing, e.Data["container_id"].(string))
			}
		case <-deadline:
			t.Fatalf("not merged: %v", missing)
		}
	}
}

// until polls, for what the kernel tells nobody.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("still not: %s", what)
		}
	}
}

func exists(t *testing.T, k kernel.Kernel, partition string) bool {
	t.Helper()
	names, err := k.Partitions()
	if err != nil {
		t.Fatal(err)
	}
	return slices.Contains(names, partition)
}

func TestVMPartitions(t *testing.T) {
	k := selectiveKSM(t)
	e, log, _ := run(t, k)
	a1, a2 := startHolder(t, "a1", "sksm-test-a"), startHolder(t, "a2", "sksm-test-a")
	b1, b2 := startHolder(t, "b1", "sksm-test-b"), startHolder(t, "b2", "sksm-test-b")
	as, bs := []*holder{a1, a2}, []*holder{b1, b2}
	all := slices.Concat(as, bs)
	for _, h := range all {
		if err := e.Add(t.Context(), h.Container); err != nil {
			t.Fatal(err)
		}
	}
	apart(t, as, bs)
	for _, h := range all {
		e.Start(h.ID)
	}
	log.waitMerged(t, all...)

	for _, pair := range [][]*holder{as, bs} {
		if n := shared(t, pair[0], pair[1]); n < mostly {
			t.Errorf("%s and %s share %d pages, want %d or more", pair[0].ID, pair[1].ID, n, mostly)
		}
	}
	apart(t, as, bs)
	if c, err := k.Counters("sksm-test-a"); err != nil || c.Sharing < uint64(mostly) || c.Shared < uint64(mostly) {
		t.Errorf("counters are %+v, %v", c, err)
	}
	for _, h := range all {
		h.ask(t, "check", "same")
	}

	// Writing parts what was merged, for the writer alone.
	a1.ask(t, "write", "written")
	if n := shared(t, a1, a2); n != 0 {
		t.Errorf("a1 has written to all of its pages, and shares %d", n)
	}
	a2.ask(t, "check", "same")

	// A container that leaves is unmerged; those that stay are not.
	e.Stop(b1.ID)
	until(t, "b1 is unmerged", func() bool { return shared(t, b1, b2) == 0 })
	if !exists(t, k, "sksm-test-b") {
		t.Error("a partition with a member is gone")
	}
	e.Stop(b2.ID)
	until(t, "partition b is removed", func() bool { return !exists(t, k, "sksm-test-b") })
	e.Stop(a1.ID)
	e.Stop(a2.ID)
	until(t, "partition a is removed", func() bool { return !exists(t, k, "sksm-test-a") })
	for i, h := range all {
		h.ask(t, "check", "same")
		for _, other := range all[:i] {
			if n := shared(t, h, other); n != 0 {
				t.Errorf("%s and %s still share %d pages", h.ID, other.ID, n)
			}
		}
	}
}

// An engine takes over what one before it left.
func TestVMRestart(t *testing.T) {
	k := selectiveKSM(t)
	e, log, stop := run(t, k)
	a1, a2 := startHolder(t, "a1", "sksm-test-a"), startHolder(t, "a2", "sksm-test-a")
	for _, h := range []*holder{a1, a2} {
		if err := e.Add(t.Context(), h.Container); err != nil {
			t.Fatal(err)
		}
		e.Start(h.ID)
	}
	log.waitMerged(t, a1, a2)
	stop()
	if n := shared(t, a1, a2); n < mostly {
		t.Errorf("after the engine's end %d pages are merged, want %d or more", n, mostly)
	}
	for _, name := range []string{"sksm-test-orphan", "theirs"} {
		if err := k.AddPartition(name); err != nil {
			t.Fatal(err)
		}
	}
	defer k.RemovePartition("theirs")

	e, log, _ = run(t, k)
	if err := e.Reconcile(nil, []Container{a1.Container, a2.Container}); err != nil {
		t.Fatal(err)
	}
	until(t, "orphan is removed", func() bool { return !exists(t, k, "sksm-test-orphan") })
	log.waitMerged(t, a1, a2)
	if !exists(t, k, "theirs") {
		t.Error("a partition of others was removed")
	}
	if err := e.Reconcile(nil, nil); err != nil {
		t.Fatal(err)
	}
	until(t, "partition is removed", func() bool { return !exists(t, k, "sksm-test-a") })
	if n := shared(t, a1, a2); n != 0 {
		t.Errorf("%d pages are still merged", n)
	}
}

func TestVMErrors(t *testing.T) {
	k := selectiveKSM(t)
	h := startHolder(t, "e", "sksm-test-e")
	for _, name := range []string{"sksm-test-e", "sksm-test-f"} {
		if err := k.AddPartition(name); err != nil {
			t.Fatal(err)
		}
		defer k.RemovePartition(name)
	}
	gone := exec.Command("/proc/self/exe", "-test.run=^$")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	held := kernel.Range{Start: h.address, End: h.address + holderSize}
	ctx := t.Context()
	for name, tc := range map[string]struct {
		err, want error
	}{
		"add twice":           {k.AddPartition("sksm-test-e"), kernel.ErrPartitionExists},
		"remove nothing":      {k.RemovePartition("sksm-test-none"), kernel.ErrNoPartition},
		"merge in nothing":    {k.Merge(ctx, "sksm-test-none", h.pid, held), kernel.ErrNoPartition},
		"merge nobody":        {k.Merge(ctx, "sksm-test-e", gone.Process.Pid, held), kernel.ErrNoProcess},
		"unmerge nobody":      {k.Unmerge(ctx, "sksm-test-e", gone.Process.Pid), kernel.ErrNoProcess},
		"unmerge in nothing":  {k.Unmerge(ctx, "sksm-test-none", h.pid), kernel.ErrNoPartition},
		"merge":               {k.Merge(ctx, "sksm-test-e", h.pid, held), nil},
		"merge a kernel task": {k.Merge(ctx, "sksm-test-e", 2, held), kernel.ErrNoProcess},
	} {
		if !errors.Is(tc.err, tc.want) {
			t.Errorf("%s: %v, want %v", name, tc.err, tc.want)
		}
	}
	if err := k.Merge(ctx, "sksm-test-f", h.pid, held); !errors.Is(err, kernel.ErrBusy) {
		t.Errorf("merge in a second partition: %v", err)
	}
	if err := k.Unmerge(ctx, "sksm-test-e", h.pid); err != nil {
		t.Error(err)
	}
	h.ask(t, "check", "same")
}
