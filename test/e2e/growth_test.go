package e2e_test

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

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

// measure looks at a plugin for long enough to see it between two merges.
func measure(t *testing.T, p *plugin.Process) footprint {
	t.Helper()
	const looks = 5
	var all []footprint
	for range looks {
		all = append(all, footprint{goroutines(t), descriptors(t, p.PID()), ownMemory(t, p.PID())})
	}
	least := func(of func(footprint) int) int {
		return of(slices.MinFunc(all, func(a, b footprint) int { return of(a) - of(b) }))
	}
	return footprint{
		goroutines:  least(func(f footprint) int { return f.goroutines }),
		descriptors: least(func(f footprint) int { return f.descriptors }),
		memory:      least(func(f footprint) int { return f.memory }),
	}
}

// want fails the test if all looks of the second half have found more than any of the
// first: what is kept of each time adds up. A heap comes to its size only after a while.
func (g growth) want(t *testing.T) {
	t.Helper()
	const heap = 1.2
	first, second := g[:len(g)/2], g[len(g)/2:]
	for _, what := range []struct {
		name  string
		of    func(footprint) int
		slack float64
	}{
		{"goroutines", func(f footprint) int { return f.goroutines }, 1},
		{"descriptors", func(f footprint) int { return f.descriptors }, 1},
		{"KiB of memory", func(f footprint) int { return f.memory }, heap},
	} {
		order := func(a, b footprint) int { return what.of(a) - what.of(b) }
		most, least := what.of(slices.MaxFunc(first, order)), what.of(slices.MinFunc(second, order))
		t.Logf("the plugin had up to %d %s, and at least %d in the second half of %d looks", most, what.name, least, len(g))
		if float64(least) > float64(most)*what.slack {
			t.Errorf("the plugin has grown: %d %s, %d at most before", least, what.name, most)
		}
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
