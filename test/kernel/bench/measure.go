package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/actor"
	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
)

// A Workload is processes that all hold the same memory, no two pages of it
// equal, and no page compressible.
type Workload struct {
	Processes int `json:"processes"`
	Pages     int `json:"pages"`
}

func (w Workload) String() string {
	return fmt.Sprintf("%d of %d MiB", w.Processes, w.Pages*actor.PageSize>>20)
}

// workloads are those that the kernel series promises times for.
var workloads = []Workload{{2, 64 << 20 / actor.PageSize}, {8, 32 << 20 / actor.PageSize}}

// What is measured: one merge, until all that can be is merged.
const (
	request      = "merge on request"
	requestAgain = "the same again"
	daemon       = "ksmd, pages_to_scan " // and a number
)

// A Sample is one round of what is measured.
type Sample struct {
	Workload Workload      `json:"workload"`
	What     string        `json:"what"`
	Wall     time.Duration `json:"wall_ns"`
	// CPU is the time of the thread that asks for the merge, or of ksmd.
	CPU time.Duration `json:"cpu_ns"`
}

// patience is for ksmd to merge all. A kernel that takes so long hangs.
const patience = 5 * time.Minute

func measure(ctx context.Context, program string, rounds int) ([]Sample, error) {
	stage, err := actor.OpenStage(program)
	if err != nil {
		return nil, err
	}
	defer stage.Close()
	_, err = os.Stat(filepath.Join(ksm.Root, "control/add_partition"))
	selective := err == nil

	var all []Sample
	for range rounds {
		for _, w := range workloads {
			if selective {
				samples, err := withActors(ctx, stage, w, onRequest)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", w, err)
				}
				all = append(all, samples...)
				continue
			}
			for _, batch := range []int{1000, 100000} {
				samples, err := withActors(ctx, stage, w, func(w Workload, _ []*actor.Actor, _ uint64) ([]Sample, error) {
					return byDaemon(w, batch)
				})
				if err != nil {
					return nil, fmt.Errorf("%s: %w", w, err)
				}
				all = append(all, samples...)
			}
		}
	}
	return all, nil
}

// withActors calls f with the processes of a workload, whose memory begins at
// start in each.
func withActors(ctx context.Context, stage *actor.Stage, w Workload,
	f func(w Workload, actors []*actor.Actor, start uint64) ([]Sample, error),
) (samples []Sample, err error) {
	var actors []*actor.Actor
	defer func() {
		for _, a := range actors {
			err = errors.Join(err, a.Kill())
		}
	}()
	// Forked processes have their memory at the same address.
	for len(actors) < w.Processes {
		var a *actor.Actor
		if len(actors) == 0 {
			a, err = stage.Start(ctx, unix.SysProcAttr{})
		} else {
			a, err = actors[0].Fork(ctx)
		}
		if err != nil {
			return nil, err
		}
		actors = append(actors, a)
	}
	var start int64
	for _, a := range actors {
		at, err := a.Ask("map %d %d 1", w.Pages, w.Pages)
		if err != nil {
			return nil, err
		}
		if start != 0 && at != start {
			return nil, fmt.Errorf("memory is at %#x in one process and at %#x in another", start, at)
		}
		start = at
		if _, err := a.Ask("syscall %d %d %d %d", unix.SYS_MADVISE, start, w.Pages*actor.PageSize, unix.MADV_MERGEABLE); err != nil {
			return nil, err
		}
	}
	samples, err = f(w, actors, uint64(start))
	for _, a := range actors {
		if _, checkErr := a.Ask("check"); err == nil {
			err = checkErr
		}
	}
	return samples, err
}

const partition = "bench"

func onRequest(w Workload, actors []*actor.Actor, start uint64) (samples []Sample, err error) {
	if err := ksm.Write("control/add_partition", "%s", partition); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, ksm.Write("control/remove_partition", "%s", partition)) }()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for _, what := range []string{request, requestAgain} {
		began, cpuBegan := time.Now(), cpuTime(unix.CLOCK_THREAD_CPUTIME_ID)
		for _, a := range actors {
			err := ksm.Write(partition+"/trigger_merge", "%d %x %x", a.Pid, start, start+uint64(w.Pages*actor.PageSize))
			if err != nil {
				return nil, err
			}
		}
		samples = append(samples, Sample{w, what, time.Since(began), cpuTime(unix.CLOCK_THREAD_CPUTIME_ID) - cpuBegan})
	}
	sharing, err := ksm.Counter(partition + "/pages_sharing")
	if want := w.Pages * (w.Processes - 1); err == nil && sharing != want {
		err = fmt.Errorf("%d pages sharing after the merge, not %d", sharing, want)
	}
	return samples, err
}

func byDaemon(w Workload, batch int) ([]Sample, error) {
	ksmd, err := ksmdClock()
	if err != nil {
		return nil, err
	}
	for _, knob := range []struct {
		file  string
		value int
	}{{"run", 0}, {"pages_to_scan", batch}, {"sleep_millisecs", 0}, {"smart_scan", 0}} {
		if err := ksm.Write(knob.file, "%d", knob.value); err != nil {
			return nil, err
		}
	}
	began, cpuBegan := time.Now(), cpuTime(ksmd)
	if err := ksm.Write("run", "1"); err != nil {
		return nil, err
	}
	// It says when it is done in no other way.
	poll := time.NewTicker(time.Millisecond)
	defer poll.Stop()
	want := w.Pages * (w.Processes - 1)
	for {
		sharing, err := ksm.Counter("pages_sharing")
		if err != nil {
			return nil, err
		}
		if sharing == want {
			break
		}
		if time.Since(began) > patience {
			return nil, fmt.Errorf("ksmd has merged %d pages of %d in %s", sharing, want, patience)
		}
		<-poll.C
	}
	sample := Sample{w, daemon + strconv.Itoa(batch), time.Since(began), cpuTime(ksmd) - cpuBegan}
	// The next round is to find nothing of this one.
	return []Sample{sample}, ksm.Write("run", "2")
}

func cpuTime(clock int32) time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(clock, &t); err != nil {
		panic(err) // the clock of a thread that runs
	}
	return time.Duration(t.Nano())
}

// ksmdClock is the clock of the CPU time of ksmd, as clock_getcpuclockid(3)
// makes one from a pid.
func ksmdClock() (int32, error) {
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		comm, err := os.ReadFile(name)
		if err != nil || strings.TrimSpace(string(comm)) != "ksmd" {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		const schedulerClock = 2
		return int32(^pid)<<3 | schedulerClock, err
	}
	return 0, errors.New("there is no ksmd")
}
