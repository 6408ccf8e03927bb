package variants_test

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/selective-ksm/selective-ksm/test/vm"
)

// ksmSelftests are the runs of the kernel's selftests of KSM, those of
// tools/testing/selftests/mm/run_vmtests.sh.
var ksmSelftests = []string{
	"ksm_tests -H -s 100",
	"ksm_tests -P -s 100",
	"ksm_tests -M -p 10",
	"ksm_tests -U",
	"ksm_tests -Z -p 10 -z 0",
	"ksm_tests -Z -p 10 -z 1",
	"ksm_tests -N -m 1",
	"ksm_tests -N -m 0",
	"ksm_functional_tests",
}

// With the option off, the series must change nothing: what the kernel's own
// tests find is the same as without it.
func TestOptionOffIsAsStock(t *testing.T) {
	// The same programs for both: those of the kernel without the series.
	programs := built(t, "kernel/stock/selftests")
	var stock, off []string
	// On a busy machine a selftest may fail that counts ksmd's scans. What is the
	// series' doing fails each time.
	const rounds = 3
	for round := 1; ; round++ {
		stock = selftests(t, "stock", programs, ksmSelftests)
		off = selftests(t, "option-off", programs, ksmSelftests)
		if slices.Equal(stock, off) {
			break
		}
		report := t.Logf
		if round == rounds {
			report = t.Errorf
		}
		report("round %d: the kernel's selftests find on stock:\n%s\nand with the series and the option off:\n%s",
			round, strings.Join(stock, "\n"), strings.Join(off, "\n"))
		if round == rounds {
			break
		}
	}
	if !slices.ContainsFunc(stock, func(line string) bool { return strings.HasPrefix(line, "ok ") && !skip.MatchString(line) }) {
		t.Errorf("not one of the kernel's selftests passes on stock:\n%s", strings.Join(stock, "\n"))
	}
}

// The selftests that the series brings.
func TestSelftestsOfTheSeries(t *testing.T) {
	stock := entries(t, built(t, "kernel/stock/selftests"))
	programs := built(t, "kernel/selective-ksm/selftests")
	for _, name := range entries(t, programs) {
		if slices.Contains(stock, name) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			for _, line := range selftests(t, "selective-ksm", programs, []string{name}) {
				if strings.HasPrefix(line, "not ok ") || strings.HasPrefix(line, "Bail out!") || skip.MatchString(line) {
					t.Error(line)
				}
			}
		})
	}
}

func entries(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range list {
		names = append(names, entry.Name())
	}
	return names
}

// The lines of KTAP, the form of the tests' results, that count. See
// Documentation/dev-tools/ktap.rst.
var (
	result = regexp.MustCompile(`^(ok|not ok|Bail out!|[0-9]+\.\.[0-9]+)\b`)
	skip   = regexp.MustCompile(`# SKIP\b`)
)

// selftests runs commands in the directory programs on a variant with two NUMA
// nodes, and returns the results, after each command's name and status.
func selftests(t *testing.T, name, programs string, commands []string) []string {
	t.Helper()
	var script strings.Builder
	// With smart scan, pages that were not equal to another are left out of some
	// scans, each of its own. Whether two of them meet within the few scans that
	// ksm_tests waits for is then a matter of luck.
	script.WriteString("test ! -f /sys/kernel/mm/ksm/smart_scan || echo 0 >/sys/kernel/mm/ksm/smart_scan\n")
	for _, command := range commands {
		fmt.Fprintf(&script, "./%s; echo \"%s: status $?\"\n", command, command)
	}
	cfg := variant(t, name)
	cfg.KernelArgs = "numa=fake=2"
	cfg.Dir = programs
	var output bytes.Buffer
	cfg.Stdout, cfg.Stderr = &output, &output
	if err := vm.Run(t.Context(), cfg, "sh", "-c", script.String()); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, output.String())
	}
	t.Logf("%s:\n%s", name, output.String())
	var results []string
	lines := bufio.NewScanner(&output)
	for lines.Scan() {
		line := lines.Text()
		if result.MatchString(line) || strings.Contains(line, ": status ") {
			results = append(results, line)
		}
	}
	return results
}
