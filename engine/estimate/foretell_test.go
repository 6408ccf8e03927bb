package estimate

import (
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest/running"
	"github.com/selective-ksm/selective-ksm/engine/memory"
	"github.com/selective-ksm/selective-ksm/hooks/inventory"
)

// merge merges processes, and returns the CPU time that it took.
func merge(t testing.TB, k kernel.Kernel, partition string, pids []int) time.Duration {
	t.Helper()
	began := cpuTime()
	for _, pid := range pids {
		offer, err := memory.Find(t.Context(), pid, memory.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range offer.Ranges {
			if err := k.Merge(t.Context(), partition, pid, r); err != nil {
				t.Fatal(err)
			}
		}
	}
	kernels, err := k.Settle(t.Context(), partition)
	if err != nil {
		t.Fatal(err)
	}
	return cpuTime() - began + kernels
}

// What is foretold is what the kernel then counts, of pages that are equal and pages that
// are not. Afterwards the same is foretold, and found to be saved already.
func TestForetold(t *testing.T) {
	const partition, held, tries = "sksm-test-estimate", 4096, 10
	k := running.Open(t, partition)
	var pids []int
	for i := range 3 {
		p := kerneltest.Start(t, held)
		if i == 2 {
			p.Do(t, "change")
		}
		pids = append(pids, p.PID)
		running.OptIn(t, k, partition, p)
	}
	all, err := inventory.Processes(pids...)
	if err != nil {
		t.Fatal(err)
	}
	look := func() (saves uint64, r Report) {
		t.Helper()
		r, err := Run(t.Context(), all, Options{Config: config.Default(), Rate: 1})
		if err != nil {
			t.Fatal(err)
		}
		return r.Policies[len(r.Policies)-1].Saved, r
	}
	foretold, r := look()
	if r.Merged != 0 || foretold < held*pageSize {
		t.Fatalf("%d bytes are foretold, %d merged before the merge", foretold, r.Merged)
	}
	within5 := func(a, b uint64) bool { return a*20 <= b*21 && b*20 <= a*21 }
	var saved uint64
	var cpu time.Duration
	// KSM leaves pages that it finds busy for the next time.
	for try := 0; try < tries && !within5(foretold, saved); try++ {
		took := merge(t, k, partition, pids)
		c, err := k.Counters(partition)
		if err != nil {
			t.Fatal(err)
		}
		if try == 0 {
			cpu = took
		}
		saved = c.Sharing * pageSize
	}
	t.Logf("foretold %d pages, %d are saved; the first merge took %.1f times the CPU time of reading",
		foretold/pageSize, saved/pageSize, cpu.Seconds()/r.Own.CPUSeconds)
	if !within5(foretold, saved) {
		t.Errorf("foretold %d pages, %d are saved", foretold/pageSize, saved/pageSize)
	}
	again, r := look()
	if !within5(again, saved) || !within5(r.SavedNow, saved) || r.Merged <= r.SavedNow {
		t.Errorf("%d pages are saved; then %d are foretold, %d seen to be saved and %d merged", saved/pageSize, again/pageSize, r.SavedNow/pageSize, r.Merged/pageSize)
	}
}
