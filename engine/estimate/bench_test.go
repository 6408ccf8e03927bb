package estimate

import (
	"runtime"
	"testing"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest"
	"github.com/selective-ksm/selective-ksm/hooks/inventory"
)

// BenchmarkRead says what it costs to look at memory once, for each GiB, with nothing
// left out of the sample.
func BenchmarkRead(b *testing.B) {
	needRoot(b)
	const held = 128 << 20 >> 12
	var pids []int
	for range 4 {
		pids = append(pids, kerneltest.Start(b, held).PID)
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
}

// memoryPerGiB is the most that an estimate may take of its own for each GiB read, in
// bytes: 2 MiB are the hashes.
const memoryPerGiB = 4 << 20

// What an estimate takes of memory grows by the hashes alone.
func TestMemory(t *testing.T) {
	needRoot(t)
	const held = 64 << 20 >> 12
	var pids []int
	for range 8 {
		pids = append(pids, kerneltest.Start(t, held).PID)
	}
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
	few, before := used(1)
	many, after := used(8)
	perGiB := (float64(after) - float64(before)) / float64(many-few) * (1 << 30)
	t.Logf("%.2f MiB for each GiB read", perGiB/(1<<20))
	if perGiB > memoryPerGiB {
		t.Errorf("%.2f MiB for each GiB read, at most %d", perGiB/(1<<20), memoryPerGiB>>20)
	}
}
