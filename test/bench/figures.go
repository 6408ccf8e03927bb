package main

import (
	"fmt"
	"time"

	"github.com/selective-ksm/selective-ksm/test/bench/result"
)

// What does the work.
const (
	onRequest = "merge on request"
	product   = "selective-ksm"
	nothing   = "no merging"

	withDaemon    = "with the daemon"
	withoutDaemon = "without it"

	byDefault = "ksmd by default"
	flatOut   = "ksmd flat out"
	byAdvisor = "ksmd, scan-time advisor"
)

// Cases and variants that others are compared with.
const (
	firstMerge   = "first merge"
	onePartition = "1 partition"
	reading      = "estimate"
	idlePlugin   = "an idle plugin"
	emptyHook    = "/bin/true"
	anonymous    = "anonymous memory"
)

// Limits.
const (
	maxAnswer    = 50   // ms
	maxSlower    = 1.05 // of what the runtime takes
	maxRound     = 1000 // ms
	maxReconcile = 2    // s
	maxResident  = 40   // MiB
	maxIdle      = 0.5  // % of a CPU
	maxRead      = 6    // MiB/GiB
)

// size is how much is measured.
type size struct {
	turns   int    // of what the kernels are compared in
	repeats int    // of what is compared in other ways
	guest   string // the VM's memory

	merge     int // MiB
	processes []int
	equal     []int // % of all pages
	rounds    int

	partitions []int
	pairs      int           // of processes in these
	memory     []int         // MiB
	again      int           // MiB
	interval   time.Duration // of the engine that merges that
	stall      time.Duration
	start      int           // MiB, of all containers
	window     time.Duration // from the start on
	idleFrom   time.Duration // in it
	pods       int           // of four containers
	calm       time.Duration // until Go has given back what the first took: longer where it is emulated
	quiet      time.Duration // between rounds over them
	programs   []program
	replicas   int // of each program: so many pods of two, in each of two namespaces
	starts     int // of containers with each plugin, in the VM
	counts     int // of Go's benchmarks
	shown      int // MiB of each container whose merging commands print
}

func sizes(quick bool) size {
	if quick {
		return size{
			turns: 1, repeats: 1, guest: "3G", merge: 16, processes: []int{2, 8}, equal: []int{0, 50, 100}, rounds: 1,
			partitions: []int{1, 16}, pairs: 16, memory: []int{16, 64}, again: 16, interval: 5 * time.Second, stall: 2 * time.Second,
			start: 32, window: 20 * time.Second, idleFrom: 15 * time.Second, pods: 25, calm: 2 * time.Second, quiet: 20 * time.Second, programs: programs, replicas: 1, starts: 8, counts: 1, shown: 16,
		}
	}
	return size{
		turns: 2, repeats: 3, guest: "6500M", merge: 32, processes: []int{2, 8, 32}, equal: []int{0, 10, 50, 100}, rounds: 2,
		partitions: []int{1, 4, 16, 64, 256}, pairs: 256, memory: []int{64, 256, 1024, 4096}, again: 64, interval: 5 * time.Second, stall: 5 * time.Second,
		start: 128, window: 10 * time.Minute, idleFrom: 9 * time.Minute, pods: 250, calm: 3 * time.Minute, quiet: 30 * time.Second, programs: programs, replicas: 2, starts: 96, counts: 3, shown: 64,
	}
}

// shortly writes minutes or seconds.
func shortly(d time.Duration) string {
	if d < time.Minute {
		return fmt.Sprintf("%.0f s", d.Seconds())
	}
	return fmt.Sprintf("%.0f min", d.Minutes())
}

// Processes and shares where the other is on the axis.
const (
	someProcesses = 8
	someEqual     = 50 // %
)

// figuresOf are all figures, in the order of the table.
func figuresOf(quick bool) []result.Figure {
	s := sizes(quick)
	slower := maxSlower
	if quick {
		slower = 0 // too few are started to tell
	}
	return []result.Figure{
		{
			Name: "equal-wall", Unit: "s/GiB", Variant: flatOut, Axis: "equal pages, %", Short: []string{"50 % equal"},
			Title: fmt.Sprintf("1. Time to merge %d MiB of %d processes", s.merge, someProcesses),
		},
		{
			Name: "equal-cpu", Unit: "s/GiB", Variant: flatOut, Axis: "equal pages, %", Short: []string{"50 % equal"},
			Title: fmt.Sprintf("1. CPU time to merge %d MiB of %d processes", s.merge, someProcesses),
		},
		{
			Name: "processes-wall", Unit: "s/GiB", Variant: flatOut, Axis: "processes", Short: []string{},
			Title: fmt.Sprintf("1. Time to merge %d MiB, %d %% equal", s.merge, someEqual),
		},
		{
			Name: "processes-cpu", Unit: "s/GiB", Variant: flatOut, Axis: "processes", Short: []string{},
			Title: fmt.Sprintf("1. CPU time to merge %d MiB, %d %% equal", s.merge, someEqual),
		},
		{
			Name: "saving", Unit: "s", Variant: byDefault,
			Title: "2. Time from the start to 90 % of the reachable saving",
		},
		{
			Name: "saving-cpu", Unit: "s", Variant: byDefault,
			Title: fmt.Sprintf("2. CPU time in the first %s", shortly(s.window)),
		},
		{
			Name: "idle-cpu", Unit: "% of a CPU", Variant: byDefault,
			Title: fmt.Sprintf("2. CPU in the last %s of that, between two merges", shortly(s.window-s.idleFrom)),
		},
		{
			Name: "partitions", Unit: "s", Case: onePartition, Axis: "partitions", Log: true, Short: []string{onePartition, fmt.Sprint(s.partitions[len(s.partitions)-1], " partitions")},
			Title: fmt.Sprintf("3. CPU time to merge %d MiB of %d processes", s.merge, 2*s.pairs),
		},
		{
			Name: "memory", Unit: "s", Case: fmt.Sprint(s.memory[0], " MiB"), Axis: "MiB", Log: true, Short: []string{fmt.Sprint(s.memory[0], " MiB"), fmt.Sprint(s.memory[len(s.memory)-1], " MiB")},
			Title: "3. CPU time to merge memory of 4 processes, 50 % equal",
		},
		{Name: "growth", Title: "3. Exponent with which that CPU time grows"},
		{
			Name: "again-wall", Unit: "s", Case: firstMerge, Short: []string{},
			Title: fmt.Sprintf("4. Time to merge %d MiB of 4 processes again", s.again),
		},
		{
			Name: "again-cpu", Unit: "s", Case: firstMerge, Short: []string{firstMerge, "unchanged", "1 % changed"},
			Title: fmt.Sprintf("4. CPU time to merge %d MiB of 4 processes again", s.again),
		},
		{
			Name: "stall", Unit: "µs", Variant: nothing, Log: true, Short: []string{"mmap, p99", "write, p99"},
			Title: "5. Latency in a process while it is merged, or read, without a pause",
		},
		{
			Name: "create-native", Unit: "ms", Variant: idlePlugin, Limit: slower, OfRatio: true,
			Title: "6. What containerd takes for a container, on the machine itself",
		},
		{
			Name: "create", Unit: "ms", Variant: idlePlugin,
			Title: "6. What containerd takes to create and start a container, in the VM",
		},
		{Name: "answer", Unit: "ms", Limit: maxAnswer, Title: "6. The plugin's slowest answer to the runtime"},
		{Name: "hook", Unit: "ms", Case: emptyHook, Title: "6. What a hook takes"},
		{Name: "reconcile", Unit: "s", Limit: maxReconcile, Title: fmt.Sprintf("6. Start beside %d containers, until they have partitions", s.pods*containers)},
		{Name: "resident", Unit: "MiB", Limit: maxResident, Title: fmt.Sprintf("6. Resident memory with %d containers", s.pods*containers)},
		{Name: "idle-vm", Unit: "% of a CPU", Title: fmt.Sprintf("6. CPU with %d containers between two rounds, in the VM", s.pods*containers)},
		{Name: "idle", Unit: "% of a CPU", Limit: maxIdle, Title: "6. CPU between two rounds, on the machine itself"},
		{Name: "pass", Unit: "s", Case: firstMerge, Title: fmt.Sprintf("6. CPU time of a round over %d containers, in the VM", s.pods*containers)},
		{Name: "round", Unit: "ms", Limit: maxRound, Title: "6. A round that changes nothing, on the machine itself"},
		{
			Name: "estimate", Unit: "s/GiB", Variant: reading, Short: []string{"50 % equal"},
			Title: fmt.Sprintf("7. CPU time next to an estimate, %d MiB of %d processes", s.merge, someProcesses),
		},
		{Name: "read", Unit: "s/GiB", Variant: reading, Title: "7. CPU time next to an estimate, on the machine itself"},
		{Name: "read-memory", Unit: "MiB/GiB", Limit: maxRead, Title: "7. Memory that an estimate takes, on the machine itself"},
		{
			Name: "programs", Unit: "MiB", Variant: anonymous, Short: []string{anonymous, "by container", "by pod", "by namespace", "by namespace, estimated", "by namespace, freed", "the whole node, by ksmd"},
			Title: fmt.Sprintf("8. Saved of %d containers of a program: 2 in a pod, %d in a namespace", 4*s.replicas, 2*s.replicas),
		},
	}
}
