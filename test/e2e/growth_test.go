package e2e_test

import (
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/test/e2e/plugin"
)

// metricsPort is where a plugin is asked for metrics.
const metricsPort = ":9720"

// footprint is what a plugin has of the machine.
type footprint struct {
	goroutines, descriptors int
	memory                  int // its own, present or swapped, in KiB
}

// growth are looks at one plugin that has the same to do each time.
type growth []footprint

// fewest is how many looks it takes to tell growth from a start.
const fewest = 8

// measure looks at a plugin for long enough to see it between two merges.
func measure(t *testing.T, p *plugin.Process) footprint {
	t.Helper()
	const looks, pause = 5, 400 * time.Millisecond
	least := footprint{math.MaxInt, math.MaxInt, math.MaxInt}
	for range looks {
		least.goroutines = min(least.goroutines, goroutines(t))
		least.descriptors = min(least.descriptors, descriptors(t, p.PID()))
		least.memory = min(least.memory, ownMemory(t, p.PID()))
		sleep(t.Context(), pause)
	}
	return least
}

// check returns an error if all looks of the last quarter have found more than all of the
// second, and not just a little: what is kept of each time adds up. In the first a plugin
// may still become warm.
func (g growth) check() error {
	if len(g) < fewest {
		return fmt.Errorf("%d looks are too few, of %d", len(g), fewest)
	}
	// Something may be under way at each look of a quarter, and a heap is of a size with
	// some play.
	one := func(most int) int { return most + 1 }
	heap := func(most int) int { return most * 6 / 5 }
	quarter := len(g) / 4
	before, after := g[quarter:2*quarter], g[len(g)-quarter:]
	var errs []error
	for _, what := range []struct {
		name  string
		of    func(footprint) int
		limit func(most int) int
	}{
		{"goroutines", func(f footprint) int { return f.goroutines }, one},
		{"descriptors", func(f footprint) int { return f.descriptors }, one},
		{"KiB of memory", func(f footprint) int { return f.memory }, heap},
	} {
		order := func(a, b footprint) int { return what.of(a) - what.of(b) }
		most, least := what.of(slices.MaxFunc(before, order)), what.of(slices.MinFunc(after, order))
		if least > what.limit(most) {
			errs = append(errs, fmt.Errorf("%d %s, and at most %d before", least, what.name, most))
		}
	}
	return errors.Join(errs...)
}

// What is kept is found, and what comes and goes is not.
func TestGrowth(t *testing.T) {
	for name, tc := range map[string]struct {
		at    func(look int) footprint
		grows bool
	}{
		"steady":          {func(int) footprint { return footprint{31, 16, 6000} }, false},
		"becomes warm":    {func(i int) footprint { return footprint{31, 16, 6000 + 500*min(i, 3)} }, false},
		"comes and goes":  {func(i int) footprint { return footprint{31 + i%2, 16 + i%3, 6000 + 200*(i%2)} }, false},
		"just at the end": {func(i int) footprint { return footprint{30 + i/6%2, 16, 6000} }, false},
		"keeps goroutine": {func(i int) footprint { return footprint{31 + i, 16, 6000} }, true},
		"every other one": {func(i int) footprint { return footprint{31, 16 + i/2, 6000} }, true},
		"keeps memory":    {func(i int) footprint { return footprint{31, 16, 6000 + 700*i} }, true},
	} {
		for _, looks := range []int{fewest, 45} {
			var g growth
			for i := range looks {
				g = append(g, tc.at(i))
			}
			if err := g.check(); (err != nil) != tc.grows {
				t.Errorf("%s, %d looks: %v", name, looks, err)
			}
		}
	}
	if err := make(growth, fewest-1).check(); err == nil {
		t.Error("a few looks tell enough")
	}
}

func goroutines(t *testing.T) int {
	t.Helper()
	n, err := value(scrape(t, metricsPort), "go_goroutines")
	if err != nil {
		t.Fatal(err)
	}
	return int(n)
}

func descriptors(t *testing.T, pid int) int {
	t.Helper()
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// ownMemory is a process's anonymous memory, in KiB.
func ownMemory(t *testing.T, pid int) int {
	t.Helper()
	n, err := fields(fmt.Sprintf("/proc/%d/status", pid), "RssAnon", "VmSwap")
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// fields adds up numbers that a file of /proc has behind names and colons.
func fields(path string, names ...string) (sum int, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	found := 0
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(line, ":")
		if !slices.Contains(names, name) {
			continue
		}
		n, err := strconv.Atoi(strings.Fields(value)[0])
		if err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
		sum += n
		found++
	}
	if found != len(names) {
		return 0, fmt.Errorf("%s has not all of %q", path, names)
	}
	return sum, nil
}
