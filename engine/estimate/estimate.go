// Package estimate says what merging would save, before anything is merged: it reads
// the memory that a merge would be offered, and counts equal pages by hash. It changes
// nothing and stops no process.
//
// Each page is known by 64 bits of its xxHash, with a seed that is another at each run,
// so that no tenant can make pages that collide. Of n pages, n²/2⁶⁵ are expected to be
// taken for equal that are not: of a TiB less than one in a hundred.
package estimate

import (
	"cmp"
	"context"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine/frame"
	"github.com/selective-ksm/selective-ksm/engine/memory"
	"github.com/selective-ksm/selective-ksm/engine/process"
	"github.com/selective-ksm/selective-ksm/hooks/inventory"
)

// Options say what to estimate.
type Options struct {
	// Config is the policy: which containers are merged, and what of their memory.
	Config config.Config
	// Interval is the time between two looks. Zero is that there is one only, and what
	// changes is not known.
	Interval time.Duration
	// Rate is which part of all contents is kept for counting, from [MinRate] to 1. It is rounded down to a power of a half. All memory is read, whatever it is: a
	// smaller rate takes less memory, and a shorter second look.
	Rate float64
	// Progress, if it is not nil, is told of pages as they are read, at most twice for
	// each. It is called often.
	Progress func(look int, pages uint64)
}

// MinRate is the least [Options.Rate].
const MinRate = 1e-6

// Run looks at containers. A container, or a process, that goes away meanwhile is left
// out. Errors are that of ctx, [frame.ErrHidden], and those of reading for another
// reason than that a process is gone.
func Run(ctx context.Context, all inventory.Inventory, o Options) (Report, error) {
	flags, err := frame.OpenFlags()
	if err != nil {
		return Report{}, err
	}
	defer flags.Close()
	if !(o.Rate >= MinRate && o.Rate <= 1) {
		return Report{}, fmt.Errorf("rate %v is not from %v to 1", o.Rate, MinRate)
	}
	shift := bits.Len64(uint64(1/o.Rate - 1e-9))
	e := &estimate{
		Options: o,
		reader:  newReader(flags, rand.Uint64(), 1<<shift-1),
		rate:    float64(uint64(1) << shift),
		report:  Report{At: time.Now().UTC(), IntervalSeconds: o.Interval.Seconds(), Rate: 1 / float64(uint64(1)<<shift), Engine: all.Engine, Missing: all.Missing},
	}
	if err := e.looks(ctx, all.Containers); err != nil {
		return Report{}, err
	}
	e.policies(all)
	e.cost()
	return e.report, nil
}

// estimate is one run.
type estimate struct {
	Options
	reader *reader
	rate   float64
	report Report

	// containers are those that were read, and held what is remembered of their
	// processes.
	containers []inventory.Container
	held       []*held
	lookedAt   []time.Time // at each of them
	cpu        time.Duration
}

// looks reads the memory of all containers, and reads it again.
func (e *estimate) looks(ctx context.Context, all []inventory.Container) error {
	began, cpu := time.Now(), cpuTime()
	for _, c := range all {
		if c.Pause {
			continue
		}
		if err := e.first(ctx, c); err != nil {
			return err
		}
	}
	e.cpu = cpuTime() - cpu
	e.report.Own.ReadSeconds = time.Since(began).Seconds()
	for i, h := range e.held {
		h.stable = len(h.hashes)
		if e.Interval == 0 {
			h.runs = nil
			continue
		}
		select {
		case <-time.After(e.Interval - time.Since(e.lookedAt[i])):
		case <-ctx.Done():
			return ctx.Err()
		}
		h.stable = 0
		if err := e.reader.second(ctx, h); err != nil {
			return err
		}
		e.tell(2, uint64(len(h.hashes)))
	}
	e.report.Own.CPUSeconds = (cpuTime() - cpu).Seconds()
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	e.report.Own.MemoryBytes = memory.HeapInuse + memory.StackInuse
	for _, h := range e.held {
		slices.Sort(h.hashes[:h.stable])
		slices.Sort(h.hashes[h.stable:])
		e.report.Containers[h.container].Volatile += uint64(float64(len(h.hashes)-h.stable)*e.rate) * pageSize
	}
	return ctx.Err()
}

func (e *estimate) tell(look int, pages uint64) {
	if e.Progress != nil {
		e.Progress(look, pages)
	}
}

// first looks at the processes of a container.
func (e *estimate) first(ctx context.Context, c inventory.Container) error {
	r := Container{ID: c.ID, Name: c.Name, Pod: c.Pod, Namespace: c.Namespace, Partition: c.Partition}
	a := c.Assign(e.Config)
	if r.LeftOut = a.Reason; a.Reason != "" {
		e.report.Containers = append(e.report.Containers, r)
		e.containers = append(e.containers, c)
		return nil
	}
	o := memory.Options{Secrets: a.Secrets, Zero: e.Config.ZeroPages, Exact: true, Any: true, Merged: true}
	pids, err := c.Pids()
	if process.Gone(err) {
		return nil
	} else if err != nil {
		return fmt.Errorf("container %s: %w", c, err)
	}
	for _, pid := range pids {
		h, offer, n, err := e.reader.first(ctx, pid, o, func(pages uint64) { e.tell(1, pages) })
		if process.Gone(err) {
			continue
		} else if err != nil {
			return fmt.Errorf("container %s: process %d: %w", c, pid, err)
		}
		h.container = len(e.report.Containers)
		e.held = append(e.held, h)
		e.lookedAt = append(e.lookedAt, time.Now())
		r.Processes++
		r.Offered += n.read * pageSize
		r.Zero += offer.Zero
		r.WrittenZero += n.zeros * pageSize
		r.Huge += offer.Huge
		r.Merged += n.merged * pageSize
		e.report.SavedNow += (n.merged - n.frames) * pageSize
	}
	e.report.Containers = append(e.report.Containers, r)
	e.containers = append(e.containers, c)
	return nil
}

// node is the policy that isolates nobody.
const node = "node"

// engines is what the engine that runs has been told.
const engines = "running engine"

// policies counts what each policy saves.
func (e *estimate) policies(all inventory.Inventory) {
	by := map[string]func(i int) (partition, reason string){}
	var names []string
	for _, scope := range []config.Scope{config.ScopeContainer, config.ScopePod, config.ScopeGroup, config.ScopeNamespace} {
		policy := e.Config
		policy.PartitionBy = scope
		names = append(names, string(scope))
		by[string(scope)] = func(i int) (string, string) {
			a := e.containers[i].Assign(policy)
			return a.Partition, a.Reason
		}
	}
	if all.Engine {
		names = append(names, engines)
		by[engines] = func(i int) (string, string) { return e.containers[i].Partition, "" }
	}
	names = append(names, node)
	by[node] = func(int) (string, string) { return node, "" }
	for _, name := range names {
		e.report.Policies = append(e.report.Policies, e.policy(name, by[name]))
	}
	whole := e.report.Policies[len(names)-1].Saved
	for i := range e.report.Policies {
		p := &e.report.Policies[i]
		p.IsolationCosts = whole - min(whole, p.Saved)
	}
}

// policy counts what containers save that are merged in the partitions they are given.
func (e *estimate) policy(name string, of func(i int) (partition, reason string)) Policy {
	p := Policy{Policy: name}
	partitions := map[string][]*held{}
	for _, h := range e.held {
		partition, reason := of(h.container)
		if partition == "" {
			p.Unknown = cmp.Or(p.Unknown, reason)
			continue
		}
		partitions[partition] = append(partitions[partition], h)
	}
	p.Partitions = len(partitions)
	var saved, withVolatile, variance float64
	for _, members := range partitions {
		var stable, whole [][]uint64
		for _, h := range members {
			stable = append(stable, h.hashes[:h.stable])
			whole = append(whole, h.hashes[:h.stable], h.hashes[h.stable:])
		}
		s, v := count(stable).saving(e.rate)
		saved, variance = saved+s, variance+v
		s, _ = count(whole).saving(e.rate)
		withVolatile += s
	}
	p.Saved, p.Error = uint64(saved), uint64(bound(variance))
	p.Volatile = uint64(max(0, withVolatile-saved))
	return p
}

// byKsmd is how many times as long as reading memory here it takes ksmd to merge it, as
// measured on a machine (make bench, 7). The series takes less (make bench, 1). It cannot be
// tried without merging.
const byKsmd = 8

// cost says what a first merge takes at most, by what it took to read the same memory.
func (e *estimate) cost() {
	for _, c := range e.report.Containers {
		e.report.Offered += c.Offered
		e.report.Zero += c.Zero
		e.report.WrittenZero += c.WrittenZero
		e.report.Huge += c.Huge
		e.report.Merged += c.Merged
		e.report.Volatile += c.Volatile
	}
	cpu := byKsmd * e.cpu.Seconds()
	e.report.FirstMerge = Cost{CPUSeconds: cpu, Seconds: spending(cpu, e.Config.Budget, e.Config.BudgetWindow)}
	partitions := map[string]uint64{}
	for i, c := range e.report.Containers {
		partitions[e.containers[i].Assign(e.Config).Partition] += c.Offered
	}
	for _, offered := range partitions {
		part := cpu * float64(offered) / float64(max(1, e.report.Offered))
		e.report.FirstMerge.Seconds = max(e.report.FirstMerge.Seconds, spending(part, e.Config.PartitionBudget, e.Config.BudgetWindow))
	}
}

// spending is how many seconds it takes to spend some of CPU time within a budget: what that
// has is spent at once, and the rest as it comes in.
func spending(cpu, share float64, window time.Duration) float64 {
	at := share * window.Seconds()
	if cpu <= at {
		return cpu
	}
	return max(cpu, (cpu-at)/share)
}

// cpuTime is what the threads of this process have used.
func cpuTime() time.Duration {
	var u unix.Rusage
	// It fails for a bad argument only.
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
