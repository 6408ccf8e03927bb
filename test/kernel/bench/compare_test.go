package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// samples are three rounds of all that is measured, in which ksmd takes so
// many milliseconds with each of its settings.
func samples(once, again, slow, fast int) []Sample {
	var all []Sample
	for _, w := range workloads {
		for what, ms := range map[string]int{
			request: once, requestAgain: again, daemon + "1000": slow, daemon + "100000": fast,
		} {
			for _, off := range []int{1, 0, 10} {
				d := time.Duration(ms+off) * time.Millisecond
				all = append(all, Sample{w, what, d, d})
			}
		}
	}
	return all
}

func TestCompare(t *testing.T) {
	for _, c := range []struct {
		what    string
		samples []Sample
		fails   string // part of the error, none if empty
	}{
		{"as promised", samples(999, 98, 5000, 2000), ""},
		{"no faster than half of the best setting", samples(1100, 10, 5000, 2000), "wall time, of ksmd's: 0.55"},
		{"a second merge that is slow", samples(999, 120, 5000, 2000), "of the first's: 0.12"},
		{"one kernel only", slices.DeleteFunc(samples(999, 98, 5000, 2000), func(s Sample) bool {
			return strings.HasPrefix(s.What, daemon)
		}), "not measured on both kernels"},
	} {
		file := filepath.Join(t.TempDir(), "samples.json")
		data, err := json.Marshal(c.samples)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, data, 0o644); err != nil {
			t.Fatal(err)
		}
		var table strings.Builder
		err = compare(&table, "", []string{file})
		switch {
		case c.fails == "" && err != nil:
			t.Errorf("%s: %v", c.what, err)
		case c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)):
			t.Errorf("%s: error %v, want %q in it", c.what, err, c.fails)
		case c.fails == "" && !strings.Contains(table.String(), "1.000    (0.999 to 1.009)"):
			t.Errorf("%s: no median and spread in\n%s", c.what, table.String())
		}
	}
}

// The table in the kernel's README is that of a run whose results are in testdata.
func TestReadme(t *testing.T) {
	data, err := os.ReadFile("testdata/kernel.json")
	if err != nil {
		t.Fatal(err)
	}
	var results []Result
	if err := json.Unmarshal(data, &results); err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	if err := tell(&table, results); err != nil {
		t.Error(err)
	}
	readme, err := os.ReadFile("../../../kernel/README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(readme), "```\n"+table.String()+"```\n") {
		t.Errorf("the README has not this table:\n%s", table.String())
	}
}
