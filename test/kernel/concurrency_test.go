package kernel_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/actor"
	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
)

func isAny(err error, targets ...error) bool {
	for _, target := range targets {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// A writer is a process that writes to one file, and can be killed meanwhile.
type writer struct {
	t      *testing.T
	cmd    *exec.Cmd
	exited chan struct{}
	err    error // what the shell said; valid after exited
}

// writeApart has a process of its own write to a file.
func writeApart(t *testing.T, file, format string, args ...any) *writer {
	t.Helper()
	// The shell writes the line at once, and begins when it has said so.
	w := &writer{t: t, cmd: exec.Command("sh", "-c", `echo; echo "$1" >"$2"`, "sh", fmt.Sprintf(format, args...), ksm.Root+"/"+file),
		exited: make(chan struct{})}
	var complaint strings.Builder
	w.cmd.Stderr = &complaint
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Error(err)
	}
	go func() {
		defer close(w.exited)
		if w.err = w.cmd.Wait(); w.err != nil && complaint.Len() > 0 {
			w.err = errors.New(strings.TrimSpace(complaint.String()))
		}
	}()
	t.Cleanup(func() { w.kill() })
	return w
}

// kill kills the process, and returns how long it took to die.
func (w *writer) kill() time.Duration {
	w.t.Helper()
	began := time.Now()
	// It fails only if it has ended.
	_ = w.cmd.Process.Kill()
	<-w.exited
	return time.Since(began)
}

func (w *writer) running() bool {
	select {
	case <-w.exited:
		return false
	default:
		return true
	}
}

// slow makes a partition's calls last: so many batches of a page, with a pause
// after each.
func slow(t *testing.T, partition string, milliseconds int) {
	t.Helper()
	for file, value := range map[string]int{"pages_to_scan": 1, "sleep_millisecs": milliseconds} {
		if err := ksm.Write(partition+"/"+file, "%d", value); err != nil {
			t.Fatal(err)
		}
	}
}

// slowMerge begins a merge that lasts until it is killed.
func slowMerge(t *testing.T, partition string, p *process) *writer {
	t.Helper()
	slow(t, partition, 50)
	w := writeApart(t, partition+"/trigger_merge", "%d %x %x", p.Pid, p.start, p.end)
	eventually(t, func() error {
		if counter(t, partition+"/pages_scanned") < 2 {
			return errors.New("the merge does not begin")
		}
		return nil
	})
	return w
}

// A merge that takes long stops neither those in other partitions, nor its own
// partition's files, nor the process.
func TestLongMergeStopsNobody(t *testing.T) {
	const n = 8192 // nearly seven minutes of pauses
	a, b := partition(t, "a"), partition(t, "b")
	p := holding(t, n, 1)
	long := slowMerge(t, a, p)

	q, r := holding(t, n, 1), holding(t, n, 1)
	q.mergeAll(b)
	r.mergeAll(b)
	if got := counter(t, b+"/pages_sharing"); got != n {
		t.Errorf("%d pages merged in the other partition, want %d", got, n)
	}
	p.ask("write 0 %d 2", n/4)
	p.ask("check")
	p.ask("move")
	if err := p.merge(a, 0, 1); err != nil {
		t.Errorf("a second merge in the partition: %v", err)
	}
	counter(t, a+"/pages_shared")
	c := partition(t, "c")
	if err := ksm.Write("control/remove_partition", "%s", c); err != nil {
		t.Error(err)
	}
	if !long.running() {
		t.Fatalf("the long merge is over: %v", long.err)
	}
	if took := long.kill(); took > 10*time.Second {
		t.Errorf("a killed merge went on for %s", took)
	}
}

// A merge that does not pause holds no lock for longer than a batch either:
// others get on in its partition, in another one, and in its process.
func TestLocksAreHeldForABatch(t *testing.T) {
	const n = 32768
	a, b := partition(t, "a"), partition(t, "b")
	p, q, r := holding(t, n, 1), holding(t, 8, 1), holding(t, 8, 1)
	w := writeApart(t, a+"/trigger_merge", "%d %x %x", p.Pid, p.start, p.end)
	before, times := counter(t, a+"/pages_scanned"), 0
	for ; w.running(); times++ {
		for partition, small := range map[string]*process{a: q, b: r} {
			if err := small.merge(partition, 0, 8); err != nil {
				t.Fatal(err)
			}
		}
		p.syscall(unix.SYS_MPROTECT, p.start, actor.PageSize, unix.PROT_READ|unix.PROT_WRITE)
	}
	if w.err != nil {
		t.Fatal(w.err)
	}
	if scanned := counter(t, a+"/pages_scanned") - before; scanned < n/2 {
		t.Errorf("%d pages of %d were left to merge when others came", scanned, n)
	}
	const least = 3
	if times < least {
		t.Errorf("others got on %d times during a merge of %d pages, want %d", times, n, least)
	}
}

// Who is killed in a merge ends at the end of the batch, and the partition is
// as good as before.
func TestKilledMergeStops(t *testing.T) {
	const n = 4096
	a := partition(t, "a")
	p, q := holding(t, n, 1), holding(t, n, 1)
	w := slowMerge(t, a, p)
	if took := w.kill(); took > 10*time.Second {
		t.Errorf("a killed merge went on for %s", took)
	}
	if got := counter(t, a+"/pages_scanned"); got > n/2 {
		t.Errorf("%d pages looked at when the caller was killed", got)
	}
	// The pause itself ends, too.
	slow(t, a, 1<<30)
	before := counter(t, a+"/pages_scanned")
	w = writeApart(t, a+"/trigger_merge", "%d %x %x", q.Pid, q.start, q.end)
	eventually(t, func() error {
		if counter(t, a+"/pages_scanned") == before {
			return errors.New("the merge does not begin")
		}
		return nil
	})
	if took := w.kill(); took > 10*time.Second {
		t.Errorf("a killed merge paused for %s", took)
	}
	for file, value := range map[string]int{"pages_to_scan": 512, "sleep_millisecs": 0} {
		if err := ksm.Write(a+"/"+file, "%d", value); err != nil {
			t.Fatal(err)
		}
	}
	p.mergeAll(a)
	q.mergeAll(a)
	if got := counter(t, a+"/pages_sharing"); got != n {
		t.Errorf("%d pages merged after that, want %d", got, n)
	}
	wantCounters(t, a, p, q)
	p.ask("check")
	q.ask("check")
}

// While a partition is being removed nobody may come in or go elsewhere; if the
// remover is killed, it stays.
func TestRemovalUnderWay(t *testing.T) {
	wantFeature(t, addProcess)
	wantFeature(t, syscalls)
	// So much that the removal takes long enough to look at it.
	const n = 16384
	a, b := partition(t, "a"), partition(t, "b")
	var all []*process
	for range 4 {
		p := start(t)
		p.hold(n, 64, 1)
		p.mergeAll(a)
		all = append(all, p)
	}
	last := all[len(all)-1]
	r := holding(t, 16, 1)
	if err := ksm.Write(a+"/pages_to_scan", "1"); err != nil {
		t.Fatal(err)
	}
	w := writeApart(t, "control/remove_partition", "%s", a)
	eventually(t, func() error {
		if err := ksm.Write(a+"/trigger_merge", "%d 1000 2000", last.Pid); !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("merge into a partition that is being removed: %v, want %v", err, unix.ENOENT)
		}
		return nil
	})
	wantErr(t, "merge another process", r.merge(a, 0, 1), unix.ENOENT)
	wantErr(t, "add a process", r.add(a), unix.ENOENT)
	wantErr(t, "open it", openErr(a, 0), unix.ENOENT)
	wantErr(t, "remove it once more", ksm.Write("control/remove_partition", "%s", a), unix.EBUSY)
	wantErr(t, "merge one of its processes elsewhere", last.merge(b, 0, n), unix.EBUSY)
	// Who makes it anew waits until it is gone, but not when killed.
	maker := startUnmergeable(t)
	if err := maker.Tell("open %d %d %s", ksm.OpenNumber, unix.O_CREAT, a); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", maker.Pid))
		if err == nil && !strings.HasPrefix(string(data), fmt.Sprintf("%d ", ksm.OpenNumber)) {
			err = fmt.Errorf("ksm_open does not wait: %s", data)
		}
		return err
	})
	maker.kill()
	if !w.running() {
		t.Fatalf("the removal is over: %v", w.err)
	}
	if took := w.kill(); took > 10*time.Second {
		t.Errorf("a killed removal went on for %s", took)
	}
	wantHere(t, a)
	if err := ksm.Write(a+"/pages_to_scan", "512"); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "merge into it again", r.merge(a, 0, 16), nil)
	for _, p := range all {
		p.ask("check")
	}
	wantErr(t, "remove it then", ksm.Write("control/remove_partition", "%s", a), nil)
	if mappings, _ := ksmPages(t, append(all, r)...); mappings != 0 {
		t.Errorf("%d ksm pages of a removed partition", mappings)
	}
}
