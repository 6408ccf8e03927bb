package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/bench/result"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/kernel/actor"
	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
)

// guest measures in the VM.
type guest struct {
	size
	stage     *actor.Stage
	bin       string // the directory of all programs
	selective bool   // the kernel has partitions

	like result.Sample // all samples are
	out  *json.Encoder
}

// parts are what can be measured in the VM.
var parts = map[string]func(*guest, context.Context) error{
	"merge":      (*guest).merge,
	"partitions": (*guest).partitioned,
	"memory":     (*guest).sized,
	"again":      (*guest).repeated,
	"estimate":   (*guest).estimated,
	"stall":      (*guest).stalled,
	"start":      (*guest).started,
	"watch":      (*guest).watched,
	"advisor":    (*guest).watchedAdvisor,
	"programs":   (*guest).saved,
	"runtime":    (*guest).runtime,
	"node":       (*guest).node,
	"outputs":    (*guest).outputs,
	native:       (*guest).runtimeNative,
}

func measure(ctx context.Context, quick bool, names []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// Actors end with the thread that has started them.
	runtime.LockOSThread()
	g, err := newGuest(sizes(quick), filepath.Dir(self), os.Stdout)
	if err != nil {
		return err
	}
	defer g.stage.Close()
	// What fails is told, and keeps nothing from being measured.
	var errs []error
	for _, name := range names {
		part, known := parts[name]
		if !known {
			return fmt.Errorf("there is no part %q", name)
		}
		began := time.Now()
		if err := part(g, ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
		fmt.Fprintf(os.Stderr, "        %-10s %4.0f s\n", name, time.Since(began).Seconds())
	}
	return errors.Join(errs...)
}

// newGuest measures with the programs of a directory, and writes lines to out.
func newGuest(s size, bin string, out io.Writer) (g *guest, err error) {
	g = &guest{size: s, bin: bin, selective: partition.Supported(), out: json.NewEncoder(out)}
	if g.like.Kernel, err = kernelRelease(); err != nil {
		return nil, err
	}
	if g.like.CPU, err = cpuModel(); err != nil {
		return nil, err
	}
	g.stage, err = actor.OpenStage(filepath.Join(bin, "actor"))
	return g, err
}

// sample tells of one value.
func (g *guest) sample(s result.Sample) error {
	s.Kernel, s.CPU = g.like.Kernel, g.like.CPU
	return g.out.Encode(result.Line{Sample: &s})
}

// output tells of what a command has printed.
func (g *guest) output(name, text string) error {
	return g.out.Encode(result.Line{Output: &result.Output{Name: name, Text: text}})
}

// took tells how long something took, as wall and as CPU time, for each unit of it.
func (g *guest) took(figure string, s result.Sample, t times, unit float64) error {
	s.Figure, s.Value = figure+"-wall", t.wall.Seconds()/unit
	err := g.sample(s)
	s.Figure, s.Value = figure+"-cpu", t.cpu.Seconds()/unit
	return errors.Join(err, g.sample(s))
}

// times are what something took.
type times struct{ wall, cpu time.Duration }

// pagesIn are those of so many MiB.
func pagesIn(mib int) int { return mib << 20 / actor.PageSize }

// A crowd is processes with the same number of pages, of which the first are equal in all.
// Their memory is at the same address.
type crowd struct {
	actors       []*actor.Actor
	start        uint64
	pages, equal int // of each
	fresh        int // seeds used
}

// saving is how many pages are saved once they are merged.
func (c *crowd) saving() int { return c.equal * (len(c.actors) - 1) }

// crowd starts processes.
func (g *guest) crowd(ctx context.Context, processes, pages, equal int) (_ *crowd, err error) {
	c := &crowd{pages: pages, equal: equal}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.kill())
		}
	}()
	for len(c.actors) < processes {
		var a *actor.Actor
		if len(c.actors) == 0 {
			a, err = g.stage.Start(ctx, unix.SysProcAttr{})
		} else {
			a, err = c.actors[0].Fork(ctx)
		}
		if err != nil {
			return nil, err
		}
		c.actors = append(c.actors, a)
	}
	for i, a := range c.actors {
		// Seed 1 is that of all, and no other is that of two.
		at, err := a.Ask("map %d %d %d", pages, pages, i+2)
		if err != nil {
			return nil, err
		}
		if c.start != 0 && uint64(at) != c.start {
			return nil, fmt.Errorf("memory is at %#x in one process and at %#x in another", c.start, at)
		}
		c.start = uint64(at)
		if _, err := a.Ask("write 0 %d 1", equal); err != nil {
			return nil, err
		}
		if _, err := a.Ask("syscall %d %d %d %d", unix.SYS_MADVISE, at, pages*actor.PageSize, unix.MADV_MERGEABLE); err != nil {
			return nil, err
		}
	}
	c.fresh = processes + 2
	return c, nil
}

// change writes to a part of all pages, evenly, so that those that were equal are so again.
func (c *crowd) change(percent int) error {
	const block = 8 // pages
	c.fresh++
	for _, a := range c.actors {
		for at := 0; at+block <= c.pages; at += block * 100 / percent {
			seed := c.fresh
			if at >= c.equal {
				seed = c.fresh*1000 + a.Pid
			}
			if _, err := a.Ask("write %d %d %d", at, block, seed); err != nil {
				return err
			}
		}
	}
	return nil
}

// kill ends the processes, after it has had them check their memory.
func (c *crowd) kill() error {
	var errs []error
	for _, a := range c.actors {
		_, err := a.Ask("check")
		errs = append(errs, err, a.Kill())
	}
	return errors.Join(errs...)
}

// clock is a CPU's or a thread's: see clock_getcpuclockid(3).
func clock(id int32) time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(id, &t); err != nil {
		panic(err) // of a thread that runs
	}
	return time.Duration(t.Nano())
}

// clockOf is the clock of the CPU time of a process, as the scheduler has it.
func clockOf(pid int) int32 {
	const scheduler = 2
	return int32(^pid)<<3 | scheduler
}

// byRequest runs f, and returns what it took of this thread.
func byRequest(f func() error) (times, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	began, cpu := time.Now(), clock(unix.CLOCK_THREAD_CPUTIME_ID)
	err := f()
	return times{time.Since(began), clock(unix.CLOCK_THREAD_CPUTIME_ID) - cpu}, err
}

// mergeIn merges the memory of some processes in a partition.
func (c *crowd) mergeIn(partition string, actors ...*actor.Actor) error {
	for _, a := range actors {
		end := c.start + uint64(c.pages*actor.PageSize)
		if err := ksm.Write(partition+"/trigger_merge", "%d %x %x", a.Pid, c.start, end); err != nil {
			return err
		}
	}
	return nil
}

// withPartition calls f while there is a partition.
func withPartition(name string, f func() error) (err error) {
	if err := partition.Add(name); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, partition.Remove(name)) }()
	return f()
}

// saves returns an error unless a partition saves as much as it must.
func saves(name string, want int) error {
	got, err := partition.Counter(name, "pages_sharing")
	if err == nil && got != want {
		err = fmt.Errorf("partition %s saves %d pages, not %d", name, got, want)
	}
	return err
}
