package kernel_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/actor"
	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
	"github.com/selective-ksm/selective-ksm/test/kernel/swap"
	"github.com/selective-ksm/selective-ksm/test/pages"
)

// madvise advises on all that the process holds.
func (p *process) madvise(advice int) {
	p.t.Helper()
	p.syscall(unix.SYS_MADVISE, p.start, p.end-p.start, advice)
}

// move moves what the process holds to another address.
func (p *process) move() {
	p.t.Helper()
	size := p.end - p.start
	p.start = uint64(p.ask("move"))
	p.end = p.start + size
}

// wantCandidates compares the candidates with the pages that there are.
func wantCandidates(t *testing.T, partition string, processes ...*process) {
	t.Helper()
	live := 0
	for _, p := range processes {
		all, err := pages.All(p.Pid)
		if err != nil {
			t.Fatal(err)
		}
		live += len(all)
	}
	if got := counter(t, partition+"/pages_unshared"); got > live {
		t.Errorf("partition %s: %d candidates, and its processes have %d pages", partition, got, live)
	}
}

// What is gone is not a candidate any more, though no merge has come by since.
func TestCandidatesGoWithTheirPages(t *testing.T) {
	const n = 8192
	a := partition(t, "a")
	for what, drop := range map[string]func(p *process){
		"munmap":           func(p *process) { p.ask("unmap") },
		"MADV_DONTNEED":    func(p *process) { p.madvise(unix.MADV_DONTNEED) },
		"MADV_UNMERGEABLE": func(p *process) { p.optIn(false) },
		"exit":             func(p *process) { p.kill() },
		"exec": func(p *process) {
			if err := p.Exec(t.Context()); err != nil {
				t.Fatal(err)
			}
		},
	} {
		p := holding(t, n, 1)
		p.mergeAll(a)
		if got := counter(t, a+"/pages_unshared"); got != n {
			t.Errorf("%d candidates of %d pages", got, n)
		}
		drop(p)
		if what == "exit" {
			wantCandidates(t, a)
		} else {
			wantCandidates(t, a, p)
			p.kill()
		}
	}
}

// Merged pages that were swapped out come back as they were, and into the same
// partition.
func TestSwap(t *testing.T) {
	const n = 1024
	needsKernel(t)
	if err := swap.Make(); err != nil {
		t.Fatal(err)
	}
	a, b := partition(t, "a"), partition(t, "b")
	group := cgroup(t)
	var all []*process
	for range 4 {
		p := start(t)
		if err := ksm.WriteFile(group+"/cgroup.procs", fmt.Append(nil, p.Pid)); err != nil {
			t.Fatal(err)
		}
		p.hold(n, n, 1)
		all = append(all, p)
	}
	inA, inB := all[:2], all[2:]
	for i := range inA {
		inA[i].mergeAll(a)
		inB[i].mergeAll(b)
	}
	// MADV_PAGEOUT leaves out what several processes map.
	out := func() {
		t.Helper()
		eventually(t, func() error {
			err := ksm.WriteFile(group+"/memory.reclaim", fmt.Append(nil, len(all)*n*actor.PageSize))
			if err != nil && !isAny(err, unix.EAGAIN, unix.EINTR) {
				t.Fatal(err)
			}
			present := 0
			for _, p := range all {
				present += len(p.pages())
			}
			if present > len(all)*n/10 {
				return fmt.Errorf("%d of %d pages are still in memory", present, len(all)*n)
			}
			return nil
		})
	}
	out()
	in := func() {
		for _, p := range all {
			p.ask("check")
		}
		wantCounters(t, a, inA...)
		wantCounters(t, b, inB...)
		wantApart(t, inA, inB)
	}
	in()
	out()
	// What is in the swap can be merged when it is back, and meanwhile.
	for i := range inA {
		inA[i].mergeAll(a)
		inB[i].mergeAll(b)
	}
	in()
	for i := range inA {
		inA[i].mergeAll(a)
		inB[i].mergeAll(b)
	}
	if got := counter(t, a+"/pages_sharing"); got < n*95/100 {
		t.Errorf("%d of %d pages merged after they came back", got, n)
	}
	in()
	// A partition that goes, or a process that leaves it, while its pages are
	// in the swap.
	out()
	if err := ksm.Write("control/remove_partition", "%s", a); err != nil {
		t.Fatal(err)
	}
	in2 := func() {
		for _, p := range all {
			p.ask("check")
		}
	}
	in2()
	if mappings, _ := ksmPages(t, inA...); mappings != 0 {
		t.Errorf("%d ksm pages came back from swap into a partition that is gone", mappings)
	}
	out()
	if err := inB[0].remove(b); err != nil {
		t.Fatal(err)
	}
	in2()
	if mappings, _ := ksmPages(t, inB[0]); mappings != 0 {
		t.Errorf("%d ksm pages came back from swap into a process that has left", mappings)
	}
	wantCounters(t, b, inB[1])
	// What has opted out may get a merged page back that another one has already.
	out()
	if err := inB[0].add(b); err != nil {
		t.Fatal(err)
	}
	inB[0].mergeAll(b)
	inB[1].mergeAll(b)
	out()
	inB[1].ask("check")
	inB[0].optIn(false)
	in2()
	if err := inB[0].remove(b); err != nil {
		t.Fatal(err)
	}
	if mappings, _ := ksmPages(t, inB[0]); mappings != 0 {
		t.Errorf("%d ksm pages that came back from swap stay in a process that has left", mappings)
	}
	wantCounters(t, b, inB[1])
	out()
	if err := swap.Off(); err != nil {
		t.Fatal(err)
	}
	in2()
	if err := swap.On(); err != nil {
		t.Fatal(err)
	}
}

// poke changes what is in a page of the process.
func (p *process) poke(page int, contents []byte) {
	p.t.Helper()
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", p.Pid), os.O_WRONLY, 0)
	if err != nil {
		p.t.Fatal(err)
	}
	defer mem.Close()
	if _, err := mem.WriteAt(contents, int64(p.start)+int64(page*actor.PageSize)); err != nil {
		p.t.Fatal(err)
	}
}

// collision returns contents that have the checksum of a page of zeroes, by one
// sign or the other, whatever its seed is: the second change undoes in a lane of
// XXH64 what the first has done to it.
func collision(sign uint64) []byte {
	const prime1, prime2 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F
	inverse := uint64(1) // of prime2
	for range 6 {
		inverse *= 2 - prime2*inverse
	}
	contents := make([]byte, actor.PageSize)
	binary.LittleEndian.PutUint64(contents, inverse<<63)
	binary.LittleEndian.PutUint64(contents[4*8:], sign*(prime1<<30&math.MaxUint64)*inverse)
	return contents
}

// A merged page whose checksum is that of others does not keep them from merging.
func TestCollision(t *testing.T) {
	a := partition(t, "a")
	var first, second []*process
	for range 2 {
		p := holding(t, 2, 1)
		p.poke(0, collision(1))
		p.poke(1, collision(math.MaxUint64))
		first = append(first, p)
		p = holding(t, 1, 1)
		p.poke(0, make([]byte, actor.PageSize))
		second = append(second, p)
	}
	for _, two := range [][]*process{first, second, first, second} {
		for _, p := range two {
			p.mergeAll(a)
		}
		if merged, err := pages.Merged(two[0].pages(), two[1].pages()); err != nil || merged != len(two[0].pages()) {
			t.Errorf("%d of %d pages merged, %v", merged, len(two[0].pages()), err)
		}
	}
	wantCounters(t, a, slices.Concat(first, second)...)
}

// cgroup makes a control group for the time of the test.
func cgroup(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/sys/fs/cgroup", "test-")
	if err != nil {
		t.Fatal(err)
	}
	// It is empty when the processes that were started in it are killed, which
	// is done before this.
	t.Cleanup(func() { eventually(t, func() error { return os.Remove(dir) }) })
	return dir
}

// wantApart fails the test if a physical page is in processes of both.
func wantApart(t *testing.T, inA, inB []*process) {
	t.Helper()
	for _, p := range inA {
		for _, q := range inB {
			if common := pages.Common(pages.ByFrame(p.pages()), pages.ByFrame(q.pages())); len(common) > 0 {
				t.Errorf("%d physical pages in two partitions", len(common))
			}
		}
	}
}

// A page that is pinned for long, as for direct I/O, is not what its equals wait
// for: they merge with each other.
func TestPinnedCandidate(t *testing.T) {
	const n = 16
	a := partition(t, "a")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	pinned := startAs(t, unix.SysProcAttr{}, w)
	pinned.optIn(true)
	pinned.hold(n+1, n+1, 1)
	vector := make([]byte, 16)
	binary.NativeEndian.PutUint64(vector, pinned.start)
	binary.NativeEndian.PutUint64(vector[8:], n*actor.PageSize)
	pinned.poke(n, vector)
	const firstFile = 3
	at := pinned.start + n*actor.PageSize
	if sent := pinned.syscall(unix.SYS_VMSPLICE, firstFile, at, 1, 0); sent != n*actor.PageSize {
		t.Fatalf("%d bytes are pinned, want %d", sent, n*actor.PageSize)
	}

	p, q := holding(t, n, 1), holding(t, n, 1)
	for _, s := range []*process{pinned, p, q} {
		s.mergeAll(a)
	}
	if merged, err := pages.Merged(p.pages(), q.pages()); err != nil || merged != n {
		t.Errorf("%d of %d pages merged beside those that are pinned, %v", merged, n, err)
	}
	if merged, err := pages.Merged(p.pages(), pinned.pages()[:n]); err != nil || merged != 0 {
		t.Errorf("%d pinned pages merged, %v", merged, err)
	}
	wantCounters(t, a, pinned, p, q)
	if _, err := io.ReadFull(r, make([]byte, n*actor.PageSize)); err != nil {
		t.Fatal(err)
	}
	pinned.mergeAll(a)
	if merged, err := pages.Merged(p.pages(), pinned.pages()[:n]); err != nil || merged != n {
		t.Errorf("%d of %d pages merged that are not pinned any more, %v", merged, n, err)
	}
}

func TestMove(t *testing.T) {
	const n = 512
	a := partition(t, "a")
	p, q := holding(t, n, 1), holding(t, n, 1)
	for range 3 {
		p.mergeAll(a)
		q.mergeAll(a)
		if got := counter(t, a+"/pages_sharing"); got != n {
			t.Errorf("%d pages merged, want %d", got, n)
		}
		wantCounters(t, a, p, q)
		p.move()
		wantCounters(t, a, p, q)
		p.ask("check")
		// What was known of the old place is not taken for the new one.
		p.ask("write 0 %d 2", n/2)
		wantCounters(t, a, p, q)
		p.mergeAll(a)
		p.ask("write 0 %d 1", n/2)
		p.ask("check")
		q.ask("check")
	}
}

// A huge page is split where it has equals, and made anew when asked for.
func TestHugePages(t *testing.T) {
	const (
		n        = 4096
		collapse = 25 // MADV_COLLAPSE
	)
	a, b := partition(t, "a"), partition(t, "b")
	inA := []*process{holding(t, n, 1), holding(t, n, 1)}
	inB := []*process{holding(t, n, 1), holding(t, n, 1)}
	for range 2 {
		for i := range inA {
			inA[i].mergeAll(a)
			inB[i].mergeAll(b)
		}
		for _, partition := range []string{a, b} {
			if got := counter(t, partition+"/pages_sharing"); got < n*95/100 {
				t.Errorf("%d of %d pages merged", got, n)
			}
		}
		wantApart(t, inA, inB)
		for _, p := range append(inA[:2:2], inB...) {
			const huge = 512 * actor.PageSize
			start := (p.start + huge - 1) &^ (huge - 1)
			// It may have better things to do than to collapse.
			_, _ = p.trySyscall(unix.SYS_MADVISE, start, (p.end-start)&^(huge-1), collapse)
			p.ask("check")
		}
		wantCounters(t, a, inA...)
		wantCounters(t, b, inB...)
		wantApart(t, inA, inB)
	}
}

// Whatever happens, in whatever order: the counters are what the page tables
// say, the partitions have no page in common, and no data changes.
func TestCountersAfterAnySequence(t *testing.T) {
	wantFeature(t, addProcess)
	if err := swap.Make(); err != nil {
		t.Fatal(err)
	}
	const n, distinct, steps, sequences = 192, 48, 60, 6
	const seed = 20261125
	for sequence := range sequences {
		t.Logf("seed %d, sequence %d", seed, sequence)
		r := rand.New(rand.NewPCG(seed, uint64(sequence)))
		names := []string{partition(t, "a"), partition(t, "b")}
		members := make(map[string][]*process)
		for _, name := range names {
			for range 2 {
				p := startUnmergeable(t)
				p.hold(n, distinct, 1)
				if err := p.add(name); err != nil {
					t.Fatal(err)
				}
				members[name] = append(members[name], p)
			}
		}
		for step := range steps {
			name := names[r.IntN(2)]
			at := r.IntN(len(members[name]))
			p := members[name][at]
			first := r.IntN(n)
			count := 1 + r.IntN(n-first)
			var err error
			what := ""
			switch r.IntN(14) {
			case 0, 1, 2:
				what, err = "merge", p.merge(name, first, count)
			case 3:
				what = "merge all"
				for _, q := range members[name] {
					q.mergeAll(name)
				}
			case 4:
				what = "unmerge"
				from := p.start + uint64(first*actor.PageSize)
				err = ksm.Write(name+"/trigger_unmerge", "%d %x %x", p.Pid, from, from+uint64(count*actor.PageSize))
			case 5, 6:
				what = "write"
				p.ask("write %d %d %d", first, count, 1+r.IntN(3))
			case 7:
				if what = "fork"; len(members[name]) < 5 {
					members[name] = append(members[name], p.fork())
				}
			case 8:
				if what = "kill"; len(members[name]) > 2 {
					p.kill()
					members[name] = append(members[name][:at:at], members[name][at+1:]...)
				}
			case 9:
				what = "move"
				p.move()
			case 10:
				what = "map anew"
				p.ask("unmap")
				p.hold(n, distinct, 1)
			case 11:
				what = "opt out and in"
				p.optIn(false)
				p.optIn(true)
			case 12:
				what = "page out"
				p.madvise(unix.MADV_PAGEOUT)
			case 13:
				what = "remove and add"
				if err = p.remove(name); err == nil {
					err = p.add(name)
				}
			}
			if err != nil {
				t.Fatalf("step %d: %s: %v", step, what, err)
			}
			for _, name := range names {
				wantCounters(t, name, members[name]...)
			}
			wantApart(t, members[names[0]], members[names[1]])
			if t.Failed() {
				t.Fatalf("step %d of sequence %d: %s", step, sequence, what)
			}
		}
		for _, name := range names {
			wantCandidates(t, name, members[name]...)
			for _, p := range members[name] {
				p.ask("check")
			}
			if err := ksm.Write("control/remove_partition", "%s", name); err != nil {
				t.Fatal(err)
			}
			if mappings, _ := ksmPages(t, members[name]...); mappings != 0 {
				t.Errorf("%d ksm pages of a partition that is gone", mappings)
			}
			for _, p := range members[name] {
				p.ask("check")
				p.kill()
			}
		}
	}
}
