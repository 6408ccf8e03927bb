// Package stress_test puts the kernel under stress: families of processes that
// do to their memory whatever a process can, each family in a partition of its
// own and all with the same data, while they are merged, unmerged, bound, let
// go, swapped, moved and killed, and the partitions come and go.
//
// All along no physical page may be in two families, and no process may find
// another thing in its memory than it wrote; when all are gone the kernel must
// have kept nothing of it. What the kernel itself finds wrong, the VM tells.
//
//	make stress STRESS=30m
package stress_test

import (
	"context"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

var (
	length  = flag.Duration("length", 20*time.Second, "how long the stress lasts")
	seed    = flag.Uint64("seed", 0, "seed of all that is random, 0 for another one each time")
	program = flag.String("actor", "../../../build/bin/actor", "`program` of the processes")
)

// What is left when the time is over must end in this time, and so must every
// call that is under way. It is long, since an emulated kernel that checks
// itself is slow.
const patience = 10 * time.Minute

const (
	familyCount     = 3
	rootsOfFamily   = 2
	disturbersOfOne = 2
)

func TestStress(t *testing.T) {
	if _, err := os.Stat(filepath.Join(ksm.Root, "control/add_partition")); err != nil {
		missing.Skip(t, "this kernel has no Selective KSM (%v); make test boots one that has", err)
	}
	if *seed == 0 {
		*seed = rand.Uint64()
	}
	t.Logf("seed %#x, to be given with -seed, for %s", *seed, *length)
	path, err := filepath.Abs(*program)
	if err != nil {
		t.Fatal(err)
	}
	wantFeatures(t)
	prepareMachine(t)
	before := kernelObjects(t)

	hangs := time.AfterFunc(*length+2*patience, func() { panic("the stress does not end") })
	defer hangs.Stop()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := &stress{t: t, program: path}
	for i := range familyCount {
		s.families = append(s.families, newFamily(t, s, i))
	}
	var roots, others sync.WaitGroup
	for i, f := range s.families {
		for j := range rootsOfFamily {
			roots.Go(func() { f.keepRoot(ctx, s.random(1, i, j)) })
		}
		for j := range disturbersOfOne {
			others.Go(func() { f.disturb(ctx, s.random(2, i, j)) })
		}
	}
	others.Go(func() { s.shakeMachine(ctx, s.random(3, 0, 0)) })
	others.Go(func() { s.watchBorders(ctx) })
	s.last(*length)
	cancel()
	others.Wait()
	// Nobody but the processes themselves is left to change anything.
	s.lookAtRest()
	for _, f := range s.families {
		f.end()
	}
	roots.Wait()
	for _, f := range s.families {
		f.wantEmpty()
	}
	s.report()
	wantNothingLeft(t, before)
}

// stress is one run.
type stress struct {
	t       *testing.T
	program string
	// still is held for writing while the kernel is to be left alone.
	still    sync.RWMutex
	families []*family

	looks, looksAtRest, inDoubt atomic.Int64
	mostSaved                   atomic.Int64
}

// last returns when the time is over. On a machine that is so slow that not all
// has been done by then, it gives it more, but not for ever.
func (s *stress) last(length time.Duration) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for began := time.Now(); ; <-tick.C {
		past := time.Since(began)
		if past >= length && (len(s.missed()) == 0 || past >= length+patience || s.t.Failed()) {
			return
		}
	}
}

// missed says what has not been done. A run that did not get to something has
// shown nothing of it.
func (s *stress) missed() []string {
	var missed []string
	if s.mostSaved.Load() == 0 {
		missed = append(missed, "save a page")
	}
	if s.looks.Load() == 0 {
		missed = append(missed, "look at the borders")
	}
	for _, d := range disturbances {
		if done, _ := s.count(d.name); done == 0 {
			missed = append(missed, d.name)
		}
	}
	return missed
}

// count says how often a disturbance was done, and how often refused.
func (s *stress) count(disturbance string) (done, refused int64) {
	for _, f := range s.families {
		done += f.done[disturbance].Load()
		refused += f.refused[disturbance].Load()
	}
	return done, refused
}

// random returns a generator of its own for each who needs one.
func (s *stress) random(what uint64, i, j int) *rand.Rand {
	return rand.New(rand.NewPCG(*seed, what<<32|uint64(i)<<16|uint64(j)))
}

// report says what was done, and fails the test if that is not all.
func (s *stress) report() {
	s.t.Logf("%d looks at the borders, %d of them at processes that stood still; %d pages had moved when looked at again",
		s.looks.Load(), s.looksAtRest.Load(), s.inDoubt.Load())
	s.t.Logf("a partition saved %d pages at most", s.mostSaved.Load())
	for _, d := range disturbances {
		done, refused := s.count(d.name)
		s.t.Logf("%-28s %6d done, %6d refused", d.name, done, refused)
	}
	if missed := s.missed(); len(missed) > 0 {
		s.t.Errorf("never done: %s", strings.Join(missed, ", "))
	}
}

// wantFeatures fails on a kernel that lacks what is to be put under stress.
func wantFeatures(t *testing.T) {
	t.Helper()
	features, err := ksm.Features()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"range_merge", "unmerge_range", "partition_counters", "add_process", "syscalls=467,468"} {
		if !slices.Contains(features, f) {
			t.Fatalf("this kernel lacks the feature %s, it has %v", f, features)
		}
	}
	if runtime.NumCPU() < 2 {
		t.Fatal("one CPU is not enough to run two things at once")
	}
}
