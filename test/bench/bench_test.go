package main

import (
	"bytes"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/test/bench/result"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

// asVM has this program be what boots a VM, which only pretends to.
const asVM = "SELECTIVE_KSM_BENCH_AS_VM"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && slices.Contains([]string{"idle", "probe"}, os.Args[1]) {
		main()
		return
	}
	if os.Getenv(asVM) != "" {
		pretend(os.Args)
		return
	}
	os.Exit(m.Run())
}

// pretend prints what a VM would: a merge that takes longer without the series. It fails
// where that is the second to be measured.
func pretend(args []string) {
	s := result.Sample{Figure: "saving", Case: "all", Variant: product, Value: 1, Kernel: args[2]}
	if strings.Contains(args[2], stock) {
		s.Variant, s.Value = byDefault, 4
	}
	if err := json.NewEncoder(os.Stdout).Encode(result.Line{Sample: &s}); err != nil || slices.Contains(args, "again") {
		os.Exit(1)
	}
}

// The runner boots each kernel, makes table, JSON and charts, also of what was measured
// before something failed, and then says so.
func TestRunner(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(asVM, "1")
	for only, fails := range map[string]bool{"merge": false, "watch": false, "merge,again": true} {
		r := runner{quick: true, vm: self, out: t.TempDir(), only: only}
		if err := r.run(t.Context()); (err != nil) != fails {
			t.Errorf("%s: %v", only, err)
		}
		report, err := result.Read(filepath.Join(r.out, "results.json"))
		if err != nil {
			t.Fatal(err)
		}
		if len(report.Results) != 2 || report.Results[0].Ratio == nil || report.Results[0].Ratio.Median != 0.25 {
			t.Errorf("%s: results are %+v", only, report.Results)
		}
		for _, name := range []string{"results.txt", "saving.svg"} {
			if _, err := os.Stat(filepath.Join(r.out, name)); err != nil {
				t.Error(err)
			}
		}
	}
}

// tiny is as little as can be measured.
var tiny = size{
	merge: 2, processes: []int{2}, equal: []int{0, 100}, rounds: 1, partitions: []int{1, 4}, pairs: 4, memory: []int{2, 4},
	again: 2, interval: 2 * time.Second, stall: 100 * time.Millisecond, start: 4, window: 2 * time.Second, idleFrom: time.Second,
	pods: 2, quiet: 2 * time.Second, programs: programs[:1], replicas: 1, starts: 1, shown: 1,
}

// All that is measured in the VM can be, by the kernel that runs, and is of a figure.
func TestMeasure(t *testing.T) {
	if os.Getenv("SELECTIVE_KSM_VM") == "" {
		missing.Skip(t, "no machine of its own, as it is the one engine and sets ksmd: make test-vm and test-kernel run it in theirs, with SELECTIVE_KSM_VM")
	}
	runtime.LockOSThread()
	var out bytes.Buffer
	g, err := newGuest(tiny, "../../build/bin", &out)
	if err != nil {
		t.Fatal(err)
	}
	defer g.stage.Close()
	kernel := stock
	if g.selective {
		kernel = selective
	}
	for _, b := range slices.Concat(turn, watch, repeat, once) {
		for _, part := range b.parts {
			if b.kernel != kernel {
				continue
			}
			t.Run(part, func(t *testing.T) {
				out.Reset()
				if err := parts[part](g, t.Context()); err != nil {
					t.Fatal(err)
				}
				checkSamples(t, &out)
			})
		}
	}
}

func checkSamples(t *testing.T, out *bytes.Buffer) {
	t.Helper()
	var samples []result.Sample
	outputs := 0
	for lines := json.NewDecoder(out); lines.More(); {
		var l result.Line
		if err := lines.Decode(&l); err != nil {
			t.Fatal(err)
		}
		if l.Sample == nil {
			if l.Output == nil || l.Output.Name == "" || l.Output.Text == "" {
				t.Errorf("%+v", l.Output)
			}
			outputs++
			continue
		}
		s := *l.Sample
		if s.Case == "" || s.Variant == "" || s.Kernel == "" || math.IsNaN(s.Value) || s.Value < 0 && s.Figure != "growth" || s.Over {
			t.Errorf("%+v", s)
		}
		samples = append(samples, s)
	}
	if results, err := result.Summarize(figuresOf(false), samples); err != nil || len(results)+outputs == 0 {
		t.Errorf("%d results of %d samples: %v", len(results), len(samples), err)
	}
}

func TestExponent(t *testing.T) {
	for _, want := range []float64{-1, 0, 0.5, 1, 2} {
		var x, y []float64
		for _, v := range []float64{1, 4, 16, 256} {
			x, y = append(x, v), append(y, 3*math.Pow(v, want))
		}
		if got := exponent(x, y); math.Abs(got-want) > 1e-9 {
			t.Errorf("got %v, want %v", got, want)
		}
	}
}

func TestParse(t *testing.T) {
	samples, err := parse(`goos: linux
BenchmarkAnswers-2   	     100	  22391034 ns/op	         3.125 ms/slowest
BenchmarkAnswers-2   	     100	  22391034 ns/op	         4.5 ms/slowest
BenchmarkRound-2     	       5	 250000000 ns/op
PASS
`, map[string]result.Sample{
		"Answers ms/slowest": {Figure: "answer", Value: 1},
		"Round ns/op":        {Figure: "round", Value: 1e-6},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []struct {
		figure string
		value  float64
		turn   int
	}{{"answer", 3.125, 0}, {"answer", 4.5, 1}, {"round", 250, 0}}
	if len(samples) != len(want) {
		t.Fatalf("%+v", samples)
	}
	for i, w := range want {
		if s := samples[i]; s.Figure != w.figure || math.Abs(s.Value-w.value) > 1e-9 || s.Turn != w.turn || s.Kernel == "" {
			t.Errorf("got %+v, want %+v", s, w)
		}
	}
}

// The README's table, and what it shows of commands, are of the run whose results are in
// testdata.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	report, err := result.Read(filepath.Join("testdata", "results.json"))
	if err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	if err := report.Table(&table, figuresOf(report.Quick), true); err != nil {
		t.Fatal(err)
	}
	shown := map[string]string{"table": table.String()}
	for _, o := range report.Outputs {
		shown[o.Name] = o.Text
	}
	for _, name := range []string{"table", "demo", "status", "estimate", "log"} {
		if text := shown[name]; text == "" || !strings.Contains(string(readme), "```\n"+text+"```\n") {
			t.Errorf("the README has not this %s:\n%s", name, text)
		}
	}
}

// A line of the log is folded where a field ends.
func TestFold(t *testing.T) {
	long := strings.Repeat("x", result.Width)
	for line, want := range map[string]string{
		`{"a":"b"}`: `{"a":"b"}` + "\n",
		`{"a":"` + long[:70] + `","b":1,"c":[2,3]}`: `{"a":"` + long[:70] + `",` + "\n" + ` "b":1,"c":[2,3]}` + "\n",
		`{"a":1,"b":"` + long + `","c":2}`:          `{"a":1,` + "\n" + ` "b":"` + long + `",` + "\n" + ` "c":2}` + "\n",
	} {
		if got := fold(line); got != want {
			t.Errorf("got\n%swant\n%s", got, want)
		}
	}
}

// Every figure has a title and a name of its own, and compares with one thing at most.
func TestFigures(t *testing.T) {
	for _, quick := range []bool{false, true} {
		seen := map[string]bool{}
		for _, f := range figuresOf(quick) {
			if f.Title == "" || seen[f.Name] || f.Case != "" && f.Variant != "" {
				t.Errorf("%+v", f)
			}
			seen[f.Name] = true
		}
	}
}
