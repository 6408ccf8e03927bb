package estimate

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/frame"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest"
	"github.com/selective-ksm/selective-ksm/engine/memory"
	"github.com/selective-ksm/selective-ksm/engine/process"
	"github.com/selective-ksm/selective-ksm/hooks/inventory"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

func TestMain(m *testing.M) { kerneltest.Main(m) }

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		missing.Skip(t, "not root: the kernel hides the numbers of physical pages")
	}
}

// small is how many pages the programs of the tests have besides those that they hold,
// and more.
const small = 4096

func near(t *testing.T, what string, got, want, off uint64) {
	t.Helper()
	if got+off < want || got > want+off {
		t.Errorf("%s: got %d pages, want %d", what, got, want)
	}
}

// Four processes hold the same: two are of one pod, one is of another pod of its
// namespace, and one is of another namespace.
func TestPolicies(t *testing.T) {
	needRoot(t)
	const held = 2 * small
	var (
		processes []*kerneltest.Process
		pids      []int
	)
	for range 4 {
		p := kerneltest.Start(t, held)
		p.Do(t, "change")
		processes, pids = append(processes, p), append(pids, p.PID)
	}
	all, err := inventory.Processes(pids...)
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range []config.Sandbox{{ID: "a", Namespace: "shop"}, {ID: "a", Namespace: "shop"}, {ID: "b", Namespace: "shop"}, {ID: "c", Namespace: "bank"}} {
		all.Containers[i].Sandbox = s
		all.Containers[i].Partition = []string{"x", "y", "x", "x"}[i]
	}
	all.Containers[2].Annotations = map[string]string{config.AnnotationPartition: "group:web"}
	all.Engine = true
	// Besides, the programs have equal pages of their own, above all if they look for races.
	apart, err := Run(t.Context(), all, Options{Config: config.Default(), Rate: 1})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		p.Do(t, "write")
	}
	for _, rate := range []float64{1, 1. / 8} {
		var pages [3]uint64
		r, err := Run(t.Context(), all, Options{Config: config.Default(), Rate: rate, Interval: 10 * time.Millisecond,
			Progress: func(look int, n uint64) { pages[look] += n }})
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range []struct {
			policy     string
			partitions int
			saves      uint64
		}{{"container", 4, 0}, {"pod", 3, held}, {"group", 3, held}, {"namespace", 3, held}, {"running engine", 2, 2 * held}, {"node", 1, 3 * held}} {
			// A group that is named is narrower than the namespace.
			p := r.Policies[i]
			if p.Policy != want.policy || p.Partitions != want.partitions {
				t.Errorf("policy %s of %d partitions, want %s of %d", p.Policy, p.Partitions, want.policy, want.partitions)
			}
			off := uint64(small/2) + 2*p.Error/pageSize
			near(t, want.policy, (p.Saved+p.Volatile)/pageSize, apart.Policies[i].Saved/pageSize+want.saves, off)
			near(t, "what isolation costs by "+want.policy, p.IsolationCosts/pageSize, apart.Policies[i].IsolationCosts/pageSize+3*held-want.saves, 2*off)
			// Where next to nothing is saved, the sample may have none of it.
			if p.Error > 0 && rate == 1 || p.Error == 0 && rate < 1 && want.saves > 0 {
				t.Errorf("%s: error %d at rate %v", p.Policy, p.Error, rate)
			}
		}
		if r.Rate != rate {
			t.Errorf("rate %v, want %v", r.Rate, rate)
		}
		if r.Offered/pageSize < 4*held || r.Merged != 0 || pages[1] != r.Offered/pageSize || pages[2] == 0 {
			t.Errorf("offered %d pages of %d, %d merged; progress %v", r.Offered/pageSize, 4*held, r.Merged/pageSize, pages)
		}
		if r.FirstMerge.CPUSeconds <= 0 || r.FirstMerge.Seconds < r.FirstMerge.CPUSeconds || r.Own.MemoryBytes == 0 {
			t.Errorf("cost %+v of %+v", r.FirstMerge, r.Own)
		}
	}
}

// What changes between the looks is told apart, and saves nothing for sure; so are zeroes that
// were written, and huge pages.
func TestTellsApart(t *testing.T) {
	needRoot(t)
	quiet, busy, empty := kerneltest.Start(t, small), kerneltest.Start(t, small), kerneltest.Start(t, small)
	empty.Do(t, "zeroes")
	empty.Do(t, "huge")
	huge := anonHuge(t, empty.PID)
	all, err := inventory.Processes(quiet.PID, busy.PID, empty.PID)
	if err != nil {
		t.Fatal(err)
	}
	changed := false
	r, err := Run(t.Context(), all, Options{Config: config.Default(), Rate: 1, Interval: time.Millisecond, Progress: func(look int, _ uint64) {
		if look == 2 && !changed { // the first has been looked at again
			changed = true
			busy.Do(t, "change")
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	const off = small / 4
	near(t, "volatile", r.Volatile/pageSize, small, off)
	near(t, "volatile of the busy one", r.Containers[1].Volatile/pageSize, small, off)
	near(t, "volatile of the quiet one", r.Containers[0].Volatile/pageSize, 0, off)
	near(t, "saved if nothing changed", r.Policies[len(r.Policies)-1].Volatile/pageSize, small, off)
	// Go has some of its own.
	own := r.Containers[0].WrittenZero / pageSize
	near(t, "written zeroes", r.WrittenZero/pageSize, 3*own+small, off)
	near(t, "written zeroes of the last", r.Containers[2].WrittenZero/pageSize, own+small, off)
	if r.Huge < huge || r.Containers[2].Huge != huge {
		t.Errorf("%d bytes are in huge pages, %d of the last, want %d", r.Huge, r.Containers[2].Huge, huge)
	}
	if enabled, err := os.ReadFile("/sys/kernel/mm/transparent_hugepage/enabled"); err == nil && !strings.Contains(string(enabled), "[never]") && huge == 0 {
		t.Error("there is no huge page, though there can be")
	}
}

// anonHuge is how much of the memory of a process is in huge pages, in bytes.
func anonHuge(t *testing.T, pid int) uint64 {
	t.Helper()
	rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(rollup)) {
		if value, ok := strings.CutPrefix(line, "AnonHugePages:"); ok {
			kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib << 10
		}
	}
	return 0
}

// What a first merge takes within the budgets is what the tighter one allows: what it has at
// once, and the rest as it comes in.
func TestCost(t *testing.T) {
	for _, tc := range []struct {
		whole, each float64
		cpu, want   float64
	}{
		{0.05, 0.05, 0.25, 2},
		{0.05, 0.05, 1, 100}, // 3 s at once, 5 s at 5 %
		{0.1, 0.05, 1, 20},   // half of it in each: 1 s at 5 %
		{2, 1, 1, 8},         // no more than it takes
		{1, 0.01, 1, 340},
	} {
		c := config.Default()
		c.Budget, c.PartitionBudget, c.BudgetWindow = tc.whole, tc.each, time.Minute
		e := estimate{Options: Options{Config: c}, cpu: time.Duration(tc.cpu * float64(time.Second))}
		for _, id := range []string{"a", "b"} {
			e.containers = append(e.containers, inventory.Container{Container: engine.Container{ID: id}, Sandbox: config.Sandbox{ID: id}})
			e.report.Containers = append(e.report.Containers, Container{Offered: pageSize})
		}
		e.cost()
		if got := e.report.FirstMerge; math.Abs(got.CPUSeconds-byKsmd*tc.cpu) > 1e-9 || math.Abs(got.Seconds-tc.want) > 1e-9 {
			t.Errorf("%+v: got %+v", tc, got)
		}
	}
}

// Containers that policy leaves out are in no policy's savings.
func TestLeftOut(t *testing.T) {
	needRoot(t)
	all, err := inventory.Processes(kerneltest.Start(t, small).PID, kerneltest.Start(t, small).PID)
	if err != nil {
		t.Fatal(err)
	}
	all.Containers[1].Sandbox.Namespace = "kube-system"
	r, err := Run(t.Context(), all, Options{Config: config.Default(), Rate: 1})
	if err != nil {
		t.Fatal(err)
	}
	if c := r.Containers[1]; c.LeftOut == "" || c.Offered != 0 {
		t.Errorf("%+v", c)
	}
	all.Containers = all.Containers[:1]
	alone, err := Run(t.Context(), all, Options{Config: config.Default(), Rate: 1})
	if err != nil {
		t.Fatal(err)
	}
	last := len(r.Policies) - 1
	near(t, "the whole node", r.Policies[last].Saved/pageSize, alone.Policies[last].Saved/pageSize, small/4)
	if n := r.Policies[last].Partitions; n != 1 {
		t.Errorf("the whole node has %d partitions", n)
	}
	if ns := r.Policies[3]; ns.Policy != "namespace" || ns.Partitions != 0 || ns.Unknown == "" {
		t.Errorf("without a namespace: %+v", ns)
	}
}

func first(t *testing.T, r *reader, pid int) (*held, counts) {
	t.Helper()
	h, _, n, err := r.first(t.Context(), pid, memory.Options{Any: true, Exact: true, Merged: true}, func(uint64) {})
	if err != nil {
		t.Fatal(err)
	}
	return h, n
}

func testReader(t testing.TB, mask uint64) *reader {
	t.Helper()
	needRoot(t)
	flags, err := frame.OpenFlags()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { flags.Close() })
	return newReader(flags, rand.Uint64(), mask)
}

// What is written between the looks is volatile, whatever the sample.
func TestVolatile(t *testing.T) {
	for _, mask := range []uint64{0, 7} {
		r := testReader(t, mask)
		quiet, busy := kerneltest.Start(t, 2*small), kerneltest.Start(t, 2*small)
		q, _ := first(t, r, quiet.PID)
		b, _ := first(t, r, busy.PID)
		before := slices.Clone(q.hashes)
		busy.Do(t, "change")
		for _, h := range []*held{q, b} {
			if err := r.second(t.Context(), h); err != nil {
				t.Fatal(err)
			}
		}
		sampled := 2 * small / (int(mask) + 1)
		if changed := len(q.hashes) - q.stable; changed > sampled/4 {
			t.Errorf("mask %d: of a quiet process's %d pages %d changed", mask, len(q.hashes), changed)
		}
		if changed := len(b.hashes) - b.stable; changed < sampled*3/4 {
			t.Errorf("mask %d: of a busy process's %d pages %d changed, of which it wrote %d", mask, len(b.hashes), changed, sampled)
		}
		// Parting them loses none.
		slices.Sort(before)
		slices.Sort(q.hashes)
		if !slices.Equal(before, q.hashes) {
			t.Errorf("mask %d: other hashes after the second look", mask)
		}
	}
}

// One that ends between the looks keeps nothing.
func TestGoneBetweenLooks(t *testing.T) {
	r := testReader(t, 0)
	p := kerneltest.Start(t, small)
	h, _ := first(t, r, p.PID)
	p.Kill()
	if err := r.second(t.Context(), h); err != nil || h.stable != 0 || len(h.hashes) == 0 {
		t.Errorf("%d of %d hashes are stable, %v", h.stable, len(h.hashes), err)
	}
	if _, _, _, err := r.first(t.Context(), h.pid, memory.Options{}, func(uint64) {}); !process.Gone(err) {
		t.Errorf("first look at a process that is gone: %v", err)
	}
}

// Pages that two processes have by fork are one page.
func TestForked(t *testing.T) {
	r := testReader(t, 0)
	// The subshell has the variable of its parent, by fork.
	cmd := exec.Command("sh", "-c", `x=$(head -c 6000000 /dev/urandom | base64 -w 0); (read y; echo "$x" >/dev/null) <&3 & echo $!; read y <&4`)
	var ends [2]*os.File
	for i := range ends {
		read, write, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, read)
		ends[i] = write
		defer read.Close()
		defer write.Close()
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var line [32]byte
	n, err := out.Read(line[:])
	if err != nil {
		t.Fatal(err)
	}
	child := 0
	for _, c := range line[:n] {
		if c >= '0' && c <= '9' {
			child = child*10 + int(c-'0')
		}
	}
	_, parents := first(t, r, cmd.Process.Pid)
	_, childs := first(t, r, child)
	// Nor did reading part them.
	again := testReader(t, 0)
	first(t, again, cmd.Process.Pid)
	if _, n := first(t, again, child); n != childs {
		t.Errorf("at first the child had %+v, then %+v", childs, n)
	}
	for _, end := range ends {
		end.Close()
	}
	// read ends with 1 at the end of its input.
	cmd.Wait()
	const pages = 8000000 / 4096
	if parents.read < pages || childs.read > pages/4 || parents.merged+childs.merged > 0 {
		t.Errorf("the parent has %d pages, the child %d more, %d are merged", parents.read, childs.read, parents.merged+childs.merged)
	}
}

// Counting is right, whatever is in the lists.
func TestCount(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		lists := make([][]uint64, r.IntN(9))
		n := map[uint64]uint64{}
		var want counted
		for i := range lists {
			for range r.IntN(50) {
				h := r.Uint64N(1 + r.Uint64N(100))
				lists[i] = append(lists[i], h)
				n[h]++
			}
			slices.Sort(lists[i])
		}
		for h, k := range n {
			want.pages += k
			if h == zero {
				want.zeros = k
				continue
			}
			want.saved += k - 1
			want.squares += float64(k-1) * float64(k-1)
		}
		if got := count(lists); got != want {
			t.Fatalf("seed %d: got %+v, want %+v", seed, got, want)
		}
	}
}

// A sample is off by no more than is said, as often as is said: 95 in 100 times.
func TestSampleBound(t *testing.T) {
	const rate, runs = 16, 400
	r := rand.New(rand.NewPCG(1, 2))
	within, sum, truth := 0, 0.0, 0.0
	for range runs {
		var kept []uint64
		saved := uint64(0)
		for i := range 5000 {
			copies := 1 + i%4
			saved += uint64(copies - 1)
			if hash := r.Uint64() | 1; hash>>1%rate == 0 {
				for range copies {
					kept = append(kept, hash)
				}
			}
		}
		slices.Sort(kept)
		got, variance := count([][]uint64{kept}).saving(rate)
		truth = float64(saved * pageSize)
		sum += got
		if d := got - truth; d <= bound(variance) && -d <= bound(variance) {
			within++
		}
	}
	if within < runs*92/100 || within == runs {
		t.Errorf("%d of %d estimates are within the bound", within, runs)
	}
	if mean := sum / runs; mean < truth*.98 || mean > truth*1.02 {
		t.Errorf("on average %v, want %v", mean, truth)
	}
}

func TestFrames(t *testing.T) {
	f := frames{}
	for _, n := range []uint64{0, 7, 8, 1 << 15, 1<<15 + 7, 1 << 39} {
		if f.add(n) || !f.add(n) || f.add(n+1<<40) {
			t.Errorf("frame %#x", n)
		}
	}
}

func TestCancelled(t *testing.T) {
	needRoot(t)
	all, err := inventory.Processes(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	began := time.Now()
	_, err = Run(ctx, all, Options{Config: config.Default(), Rate: 1, Interval: time.Hour, Progress: func(int, uint64) { cancel() }})
	if !errors.Is(err, context.Canceled) || time.Since(began) > time.Minute {
		t.Errorf("after %s: %v", time.Since(began), err)
	}
	for _, rate := range []float64{0, -1, 1.5} {
		if _, err := Run(t.Context(), all, Options{Config: config.Default(), Rate: rate}); err == nil {
			t.Errorf("rate %v is taken", rate)
		}
	}
}
