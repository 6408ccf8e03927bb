package result

import (
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

var figures = []Figure{
	{Name: "wall", Title: "Time to merge", Unit: "s/GiB", Variant: "other", Limit: 0.5, OfRatio: true, Short: []string{"2 processes"}},
	{Name: "again", Title: "Again", Unit: "s", Case: "first"},
	{Name: "growth", Title: "Growth", Limit: 2},
}

// samples are of two kernels, of which each has its turn twice. The machine is half as fast
// in the second.
func samples() []Sample {
	var all []Sample
	cases := []string{"2 processes", "8 processes"}
	for turn, slow := range []float64{1, 2} {
		for _, kase := range cases {
			for _, noise := range []float64{0, 0.1} {
				all = append(all, Sample{Figure: "wall", Case: kase, Variant: "ours", Value: slow * (1 + noise), Turn: turn, Kernel: "a", CPU: "emulated"})
			}
		}
		for _, kase := range cases {
			all = append(all, Sample{Figure: "wall", Case: kase, Variant: "other", Value: slow * 4, Turn: turn, Kernel: "b", CPU: "emulated", Over: turn == 1})
		}
		for _, kernel := range []string{"a", "b"} {
			for kase, v := range map[string]float64{"first": 10, "second": 1} {
				if kernel == "b" {
					v *= v
				}
				all = append(all, Sample{Figure: "again", Case: kase, Variant: "ours", Value: slow * v, Turn: turn, Kernel: kernel, CPU: "emulated"})
			}
		}
		all = append(all, Sample{Figure: "growth", Case: "with memory", Variant: "ours", Value: 1, Turn: turn, Kernel: "a", CPU: "emulated"})
	}
	return all
}

func summary(t *testing.T) []Result {
	t.Helper()
	results, err := Summarize(figures, samples())
	if err != nil {
		t.Fatal(err)
	}
	return results
}

func find(t *testing.T, results []Result, figure, kase, variant, kernel string) Result {
	t.Helper()
	i := slices.IndexFunc(results, func(r Result) bool {
		return r.Figure == figure && r.Case == kase && r.Variant == variant && r.Kernel == kernel
	})
	if i < 0 {
		t.Fatalf("no result %s, %s, %s, %s", figure, kase, variant, kernel)
	}
	return results[i]
}

func TestSummarize(t *testing.T) {
	results := summary(t)
	ours := find(t, results, "wall", "2 processes", "ours", "a")
	if ours.N != 4 || ours.Median != 1.55 || ours.Least != 1 || ours.Most != 2.2 || ours.Unit != "s/GiB" || ours.Over != 0 {
		t.Errorf("%+v", ours)
	}
	// What comes of turns is compared with what was measured in the same.
	if r := ours.Ratio; r == nil || r.Of != "other" || r.N != 4 || r.Least != 0.25 || r.Most != 0.275 {
		t.Errorf("ratio %+v", r)
	}
	if other := find(t, results, "wall", "8 processes", "other", "b"); other.Over != 1 || other.Ratio != nil {
		t.Errorf("%+v", other)
	}
	// A kernel is compared with itself if it can be.
	for kernel, want := range map[string]float64{"a": 0.1, "b": 0.01} {
		if r := find(t, results, "again", "second", "ours", kernel).Ratio; r == nil || r.Of != "first" || r.Median != want {
			t.Errorf("kernel %s: ratio %+v, want %v", kernel, r, want)
		}
	}
	// What a case has of other kernels comes next to it.
	for i, kase := range []string{"2 processes", "2 processes", "8 processes", "8 processes"} {
		if results[i].Case != kase {
			t.Errorf("result %d is of %s, not of %s", i, results[i].Case, kase)
		}
	}
	if _, err := Summarize(figures, []Sample{{Figure: "unknown"}}); err == nil {
		t.Error("a sample of no figure is none that is missed")
	}
}

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   Spread
	}{
		{[]float64{3}, Spread{1, 3, 3, 3, 3, 3}},
		{[]float64{4, 1, 3, 2, 5}, Spread{5, 3, 2, 4, 1, 5}},
		{[]float64{2, 1}, Spread{2, 1.5, 1.25, 1.75, 1, 2}},
	} {
		if got := spread(c.values); got != c.want {
			t.Errorf("%v: got %+v, want %+v", c.values, got, c.want)
		}
	}
}

func TestAbove(t *testing.T) {
	results := summary(t)
	if above := Above(figures, results); len(above) > 0 {
		t.Errorf("above the limit: %q", above)
	}
	low := slices.Clone(figures)
	low[0].Limit, low[2].Limit = 0.2, 0.9
	if above := Above(low, results); len(above) != 3 || !strings.Contains(above[2], "Growth") {
		t.Errorf("above the limit: %q", above)
	}
}

// A report is what was written, and its table fits.
func TestReport(t *testing.T) {
	path := filepath.Join(t.TempDir(), "results.json")
	r := Report{
		Date: time.Unix(1e9, 0).UTC(), Took: 1, Command: "make bench", Commit: strings.Repeat("a", 12),
		Machine: Machine{CPU: "a CPU", CPUs: 2, MiB: 1, Kernel: "6.12"}, Results: summary(t),
	}
	if err := r.Write(path); err != nil {
		t.Fatal(err)
	}
	again, err := Read(path)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(again, r) {
		t.Errorf("read %+v, written was %+v", again, r)
	}
	var whole, short strings.Builder
	if err := again.Table(&whole, figures, false); err != nil {
		t.Fatal(err)
	}
	if err := again.Table(&short, figures, true); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(whole.String()) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > Width {
			t.Errorf("%d columns: %q", n, line)
		}
	}
	for _, want := range []string{"9 September 2001, make bench, aaaaaaaaaaaa\n", "a VM of it: emulated, Linux a\na VM of it: emulated, Linux b\n\nTime to merge, s/GiB\n", "of other\n", "8 processes\n", "0.263 (0.25-0.275)", ">6 (5-7)"} {
		if !strings.Contains(whole.String(), want) {
			t.Errorf("%q is not in\n%s", want, whole.String())
		}
	}
	if strings.Contains(short.String(), "8 processes") || !strings.Contains(short.String(), "2 processes") {
		t.Errorf("the short table is\n%s", short.String())
	}
}

// What others are compared with is 1, and what has nothing to be compared with is not.
func TestCompared(t *testing.T) {
	ours := func(s Sample) bool { return s.Figure == "wall" && s.Variant == "ours" }
	for _, tc := range []struct {
		samples []Sample
		ours    string
	}{
		{where(samples(), func(s Sample) bool { return s.Figure == "wall" }), "0.263 (0.25-0.275)"},
		{where(samples(), ours), "-"},
	} {
		results, err := Summarize(figures, tc.samples)
		if err != nil {
			t.Fatal(err)
		}
		var table strings.Builder
		if err := (Report{Results: results}).Table(&table, figures, false); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(table.String()) {
			if strings.HasPrefix(line, "    other") && !strings.HasSuffix(line, " 1\n") || strings.HasPrefix(line, "    ours") && !strings.HasSuffix(line, " "+tc.ours+"\n") {
				t.Errorf("%q, want ours to be %s", line, tc.ours)
			}
		}
	}
}
