package estimate

import (
	"runtime"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest/running"
	"github.com/selective-ksm/selective-ksm/hooks/inventory"
)

// What the benchmarks look at: processes, and pages of each.
const benchProcesses, benchPages = 4, 128 << 20 >> 12

// BenchmarkMerge says what a first merge of the same memory costs, half of it equal, by the
// kernel that runs.
func BenchmarkMerge(b *testing.B) {
	const partition = "sksm-test-estimate"
	k := running.Open(b, partition)
	var pids []int
	for i := range benchProcesses {
		p := kerneltest.Start(b, benchPages)
		if i >= benchProcesses/2 {
			p.Do(b, "change")
		}
		pids = append(pids, p.PID)
		running.OptIn(b, k, partition, p)
	}
	var cpu time.Duration
	for b.Loop() {
		cpu = merge(b, k, partition, pids)
	}
	if b.N > 1 {
		b.Fatal("the first is one: -benchtime 1x")
	}
	if cpu <= 0 {
		b.Fatal("somebody else has ksmd run")
	}
	gib := float64(benchProcesses*benchPages*pageSize) / (1 << 30)
	b.ReportMetric(cpu.Seconds()/gib, "cpu-s/GiB")
}

// BenchmarkRead says what it costs to look at memory once, for each GiB, with nothing
// left out of the sample.
func BenchmarkRead(b *testing.B) {
	needRoot(b)
	var pids []int
	for range benchProcesses {
		pids = append(pids, kerneltest.Start(b, benchPages).PID)
	}
	all, err := inventory.Processes(pids...)
	if err != nil {
		b.Fatal(err)
	}
	var r Report
	for b.Loop() {
		if r, err = Run(b.Context(), all, Options{Config: config.Default(), Rate: 1}); err != nil {
			b.Fatal(err)
		}
	}
	gib := float64(r.Offered) / (1 << 30)
	b.ReportMetric(r.Own.CPUSeconds/gib, "cpu-s/GiB")
	b.ReportMetric(memoryPerGiB(b, 8, pids), "MiB/GiB")
}

// maxPerGiB is the most that an estimate may take of its own for each GiB read, in MiB: 2
// are the hashes, and Go lets garbage be as much, or twice that.
const maxPerGiB = 6

// memoryPerGiB is what it takes more to look at all of some processes than at the first, in
// MiB for each GiB: the mean of some runs, as what is in use has garbage, too.
func memoryPerGiB(t testing.TB, runs int, pids []int) float64 {
	t.Helper()
	used := func(n int) (offered, used uint64) {
		t.Helper()
		all, err := inventory.Processes(pids[:n]...)
		if err != nil {
			t.Fatal(err)
		}
		runtime.GC()
		r, err := Run(t.Context(), all, Options{Config: config.Default(), Rate: 1})
		if err != nil {
			t.Fatal(err)
		}
		return r.Offered, r.Own.MemoryBytes
	}
	var sum float64
	for range runs {
		few, before := used(1)
		many, after := used(len(pids))
		sum += (float64(after) - float64(before)) / float64(many-few) * (1 << 10)
	}
	return sum / float64(runs)
}

// What an estimate takes of memory grows by the hashes alone.
func TestMemory(t *testing.T) {
	needRoot(t)
	const held = 64 << 20 >> 12
	var pids []int
	for range 8 {
		pids = append(pids, kerneltest.Start(t, held).PID)
	}
	if is := memoryPerGiB(t, 1, pids); is > maxPerGiB {
		t.Errorf("%.2f MiB for each GiB read, at most %d", is, maxPerGiB)
	}
}
