package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine/estimate"
	"github.com/selective-ksm/selective-ksm/hooks/inventory"
	"github.com/selective-ksm/selective-ksm/test/bench/result"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
	"github.com/selective-ksm/selective-ksm/test/workload/memory"
)

// probeMiB is what each of the two processes has that are merged with one another.
const probeMiB = 32

// stalled measures what a process sees of being merged, time and again without a pause,
// which no engine does.
func (g *guest) stalled(ctx context.Context) error {
	for range g.rounds {
		if err := g.stalledBy(ctx, nothing, func() (func() error, error) { return func() error { return nil }, nil }); err != nil {
			return err
		}
		if err := g.stalledByEstimate(ctx); err != nil {
			return err
		}
		if g.selective {
			for _, r := range requests {
				if err := g.stalledOnRequest(ctx, r); err != nil {
					return err
				}
			}
			continue
		}
		d, err := findKsmd()
		if err != nil {
			return err
		}
		for _, m := range modes {
			err := g.stalledBy(ctx, m.name, func() (func() error, error) { return d.unmerge, d.start(m) })
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// stalledBy starts two processes with the same memory, has one measure itself while
// something goes on, which begin starts and its function ends, and tells of it.
func (g *guest) stalledBy(ctx context.Context, variant string, begin func() (end func() error, err error), give ...func(*prober)) (err error) {
	var probers []*prober
	defer func() {
		for _, p := range probers {
			err = errors.Join(err, p.stop())
		}
	}()
	for range 2 {
		p, err := startProber(ctx)
		if err != nil {
			return err
		}
		probers = append(probers, p)
		for _, f := range give {
			f(p)
		}
	}
	end, err := begin()
	if err != nil {
		return err
	}
	seen, err := probers[0].measure(g.size.stall)
	if err := errors.Join(err, end()); err != nil {
		return err
	}
	for _, s := range seen {
		s.Variant = variant
		if err := g.sample(s); err != nil {
			return err
		}
	}
	return nil
}

// stalledByEstimate has the memory read instead, which merges nothing.
func (g *guest) stalledByEstimate(ctx context.Context) error {
	var pids []int
	return g.stalledBy(ctx, reading, func() (func() error, error) {
		all, err := inventory.Processes(pids...)
		if err != nil {
			return nil, err
		}
		return again(ctx, func(ctx context.Context) error {
			_, err := estimate.Run(ctx, all, estimate.Options{Config: config.Default(), Rate: 1})
			return cmp.Or(err, ctx.Err())
		}), nil
	}, func(p *prober) { pids = append(pids, p.cmd.Process.Pid) })
}

// again has something done again and again until the function that it returns is called.
func again(ctx context.Context, do func(context.Context) error) (end func() error) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		var err error
		for err == nil {
			err = do(ctx)
		}
		done <- err
	}()
	return func() error {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	}
}

// chunk is how much is asked for at a time, as the engine does, in bytes.
const chunk = 16 << 20

// A request is one for a merge, again and again.
type request struct {
	variant string
	batch   int // pages under one hold of the locks; zero is the kernel's own number
	pause   int // after each request, in times of what it took
}

// The last is as the engine does it, which takes 5 % of a CPU unless it is told otherwise.
var requests = []request{
	{variant: onRequest}, {variant: "on request, by 32 pages", batch: 32}, {variant: "on request, 5 % of a CPU", pause: 19},
}

func (g *guest) stalledOnRequest(ctx context.Context, r request) error {
	return withPartition(partitionName, func() error {
		if r.batch > 0 {
			if err := ksm.Write(partitionName+"/pages_to_scan", "%d", r.batch); err != nil {
				return err
			}
		}
		var probers []*prober
		merge := func(ctx context.Context, pause int) error {
			for _, p := range probers {
				for at := p.Start; at < p.End; at += chunk {
					began := time.Now()
					err := ksm.Write(partitionName+"/trigger_merge", "%d %x %x", p.cmd.Process.Pid, at, min(at+chunk, p.End))
					if err == nil {
						err = wait(ctx, time.Duration(pause)*time.Since(began))
					}
					if err != nil {
						return err
					}
				}
			}
			return ctx.Err()
		}
		return g.stalledBy(ctx, r.variant, func() (func() error, error) {
			if err := merge(ctx, 0); err != nil {
				return nil, err
			}
			saved, err := partition.Counter(partitionName, "pages_sharing")
			if err != nil || saved == 0 {
				return nil, errors.Join(errors.New("nothing was merged"), err)
			}
			return again(ctx, func(ctx context.Context) error { return merge(ctx, r.pause) }), nil
		}, func(p *prober) { probers = append(probers, p) })
	})
}

// prober is a process that measures itself.
type prober struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder

	hello
}

// hello is what it says of its memory.
type hello struct{ Start, End uint64 }

func startProber(ctx context.Context) (*prober, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &prober{cmd: exec.CommandContext(ctx, self, "probe", "-mib", strconv.Itoa(probeMiB))}
	// It is not to be interrupted by its own runtime.
	p.cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1")
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = json.NewDecoder(out)
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	if err := p.out.Decode(&p.hello); err != nil {
		return nil, errors.Join(fmt.Errorf("probe: %w", err), p.stop())
	}
	return p, nil
}

// measure has it measure for a time, and returns what it saw.
func (p *prober) measure(d time.Duration) (seen []result.Sample, err error) {
	if _, err := fmt.Fprintln(p.in, d); err != nil {
		return nil, err
	}
	if err := p.out.Decode(&seen); err != nil {
		return nil, fmt.Errorf("probe: %w", err)
	}
	return seen, nil
}

// stop has it check its memory, and end.
func (p *prober) stop() error {
	return errors.Join(p.in.Close(), p.cmd.Wait())
}

// probe is the process. It has memory that can be merged, and measures as often as its
// standard input has a line with a duration.
func probe(mib int) error {
	runtime.LockOSThread()
	debug.SetGCPercent(-1)
	pages := mib << 20 / memory.PageSize
	data, err := memory.Map(pages, pages, 1, false)
	if err != nil {
		return err
	}
	var h hello
	h.Start, h.End = data.Range()
	if _, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(h.Start), uintptr(h.End-h.Start), unix.MADV_MERGEABLE); errno != 0 {
		return fmt.Errorf("madvise: %w", errno)
	}
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(h); err != nil {
		return err
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		d, err := time.ParseDuration(lines.Text())
		if err != nil {
			return err
		}
		seen, err := look(h, pages, d)
		if err != nil {
			return err
		}
		if err := out.Encode(seen); err != nil {
			return err
		}
	}
	if _, err := data.Check(); err != nil {
		return err
	}
	return lines.Err()
}

// look writes to pages, maps memory, and faults it in, for a time, and tells how long each
// took. A write does not change a page, so that it can be merged again.
func look(h hello, pages int, d time.Duration) ([]result.Sample, error) {
	const most = 1 << 20 // of each
	var mmaps, faults, writes = make([]time.Duration, 0, most), make([]time.Duration, 0, most), make([]time.Duration, 0, most)
	pick := rand.New(rand.NewPCG(1, 2))
	size := uintptr(memory.PageSize)
	for began := time.Now(); time.Since(began) < d && len(mmaps) < most; {
		t := time.Now()
		at, _, errno := unix.Syscall6(unix.SYS_MMAP, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, ^uintptr(0), 0)
		if errno != 0 {
			return nil, fmt.Errorf("mmap: %w", errno)
		}
		mmaps = append(mmaps, time.Since(t))

		fresh := word(at)
		t = time.Now()
		*fresh = 1
		faults = append(faults, time.Since(t))
		if _, _, errno := unix.Syscall(unix.SYS_MUNMAP, at, size, 0); errno != 0 {
			return nil, fmt.Errorf("munmap: %w", errno)
		}

		held := word(uintptr(h.Start) + uintptr(pick.IntN(pages))*size)
		value := *held
		t = time.Now()
		*held = value
		writes = append(writes, time.Since(t))
	}
	var seen []result.Sample
	for _, of := range []struct {
		what string
		took []time.Duration
	}{{"page fault", faults}, {"mmap", mmaps}, {"write", writes}} {
		slices.Sort(of.took)
		for _, q := range []struct {
			name string
			at   float64
		}{{"p50", 0.5}, {"p99", 0.99}, {"max", 1}} {
			took := of.took[int(q.at*float64(len(of.took)-1))]
			seen = append(seen, result.Sample{Figure: "stall", Case: of.what + ", " + q.name, Value: float64(took.Nanoseconds()) / 1000})
		}
	}
	return seen, nil
}

// word is the one at an address of memory that is not Go's.
func word(at uintptr) *uint64 { return *(**uint64)(unsafe.Pointer(&at)) }
