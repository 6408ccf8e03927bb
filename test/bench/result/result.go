// Package result is what a run of the benchmarks has measured: samples as they come, and
// the figures that they are summarized in.
package result

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"
)

// A Sample is one value of a figure.
type Sample struct {
	// Figure is the name of one, Case what it was measured on, and Variant what did the
	// work.
	Figure  string `json:"figure"`
	Case    string `json:"case"`
	Variant string `json:"variant"`
	// X is where the case is on the axis of the figure's chart.
	X     float64 `json:"x,omitempty"`
	Value float64 `json:"value"`
	// Over is that it was given up: the value would be more than this.
	Over bool `json:"over,omitempty"`
	// Kernel is the release that ran, and CPU the model as the kernel calls it.
	Kernel string `json:"kernel"`
	CPU    string `json:"cpu"`
	// Turn is which of the runs that alternate it is of.
	Turn int `json:"turn"`
}

// A Figure is what samples of one name have in common.
type Figure struct {
	Name, Title string
	// Unit is that of the values. It is empty if they are mere numbers.
	Unit string
	// Case or Variant is what others are compared with: a ratio is of the medians of one
	// turn. Both are empty if there is nothing to compare with.
	Case, Variant string
	// Axis is what X is. A figure without it has bars.
	Axis string
	// Log is that axes are logarithmic, and bars.
	Log bool
	// Limit is what no median may be above, or no ratio if OfRatio; zero is no limit.
	Limit   float64
	OfRatio bool
	// Short are the cases, or variants, that a short table has, and all of them if it is nil.
	Short []string
}

// Spread is how values lie.
type Spread struct {
	N      int     `json:"n"`
	Median float64 `json:"median"`
	// Q1 and Q3 are the quartiles, interpolated.
	Q1    float64 `json:"q1"`
	Q3    float64 `json:"q3"`
	Least float64 `json:"least"`
	Most  float64 `json:"most"`
}

// Ratio is a result next to another one.
type Ratio struct {
	// Of is the case or the variant that it is a ratio of.
	Of string `json:"of"`
	Spread
}

// A Result is what all samples of one kind come to.
type Result struct {
	Figure  string  `json:"figure"`
	Title   string  `json:"title"`
	Case    string  `json:"case"`
	Variant string  `json:"variant"`
	Unit    string  `json:"unit"`
	X       float64 `json:"x,omitempty"`
	Spread
	// Over is how many of the values are only what they would at least be.
	Over   int    `json:"over,omitempty"`
	Ratio  *Ratio `json:"ratio,omitempty"`
	Kernel string `json:"kernel"`
	CPU    string `json:"cpu"`
}

// An Output is what a command has printed.
type Output struct {
	Name string `json:"name"`
	Text string `json:"text"`
}

// A Line is what a measurement prints: one of these.
type Line struct {
	Sample *Sample `json:"sample,omitempty"`
	Output *Output `json:"output,omitempty"`
}

// Machine is where a run was.
type Machine struct {
	CPU    string `json:"cpu"`
	CPUs   int    `json:"cpus"`
	MiB    int    `json:"memory_mib"`
	Kernel string `json:"kernel"`
}

// Report is a run.
type Report struct {
	Date time.Time `json:"date"`
	// Took is in seconds.
	Took    float64  `json:"took_s"`
	Command string   `json:"command"`
	Quick   bool     `json:"quick"`
	Commit  string   `json:"commit"`
	Machine Machine  `json:"machine"`
	Results []Result `json:"results"`
	Outputs []Output `json:"outputs,omitempty"`
}

// spread panics if there are no values.
func spread(values []float64) Spread {
	v := slices.Sorted(slices.Values(values))
	quantile := func(q float64) float64 {
		at := q * float64(len(v)-1)
		i := int(at)
		if i == len(v)-1 {
			return v[i]
		}
		return v[i] + (at-float64(i))*(v[i+1]-v[i])
	}
	return Spread{N: len(v), Median: quantile(0.5), Q1: quantile(0.25), Q3: quantile(0.75), Least: v[0], Most: v[len(v)-1]}
}

// Summarize returns a result for all samples of the same, in the order of the figures, then
// of cases and then of variants, as they first come. A sample of no figure is an error.
func Summarize(figures []Figure, samples []Sample) ([]Result, error) {
	for _, s := range samples {
		if !slices.ContainsFunc(figures, func(f Figure) bool { return f.Name == s.Figure }) {
			return nil, fmt.Errorf("there is no figure %q", s.Figure)
		}
	}
	var results []Result
	for _, f := range figures {
		of := where(samples, func(s Sample) bool { return s.Figure == f.Name })
		for len(of) > 0 {
			first := of[0]
			if len(results) > 0 {
				// Another variant of the same case, if there is one.
				last := results[len(results)-1]
				i := slices.IndexFunc(of, func(s Sample) bool { return s.Figure == last.Figure && s.Case == last.Case })
				first = of[max(i, 0)]
			}
			alike := func(s Sample) bool {
				return s.Case == first.Case && s.Variant == first.Variant && s.Kernel == first.Kernel
			}
			same := where(of, alike)
			of = slices.DeleteFunc(of, alike)
			r := Result{
				Figure: f.Name, Title: f.Title, Case: first.Case, Variant: first.Variant, Unit: f.Unit, X: first.X,
				Spread: spread(values(same)), Kernel: first.Kernel, CPU: first.CPU,
			}
			for _, s := range same {
				if s.Over {
					r.Over++
				}
			}
			r.Ratio = f.ratio(same, where(samples, func(s Sample) bool { return s.Figure == f.Name }))
			results = append(results, r)
		}
	}
	return results, nil
}

// ratio compares samples of the same with what the figure says, of the same turn, and of
// the same kernel if that has it.
func (f Figure) ratio(same, all []Sample) *Ratio {
	first, of := same[0], f.Variant
	base := func(s Sample) bool { return s.Case == first.Case && s.Variant == f.Variant }
	if f.Case != "" {
		of = f.Case
		base = func(s Sample) bool { return s.Case == f.Case && s.Variant == first.Variant }
	}
	if of == "" || base(first) {
		return nil
	}
	bases := where(all, base)
	if ofKernel := where(bases, func(s Sample) bool { return s.Kernel == first.Kernel }); len(ofKernel) > 0 {
		bases = ofKernel
	}
	var ratios []float64
	for _, s := range same {
		with := where(bases, func(b Sample) bool { return b.Turn == s.Turn })
		if len(with) == 0 {
			continue
		}
		if m := spread(values(with)).Median; m > 0 {
			ratios = append(ratios, s.Value/m)
		}
	}
	if len(ratios) == 0 {
		return nil
	}
	return &Ratio{Of: of, Spread: spread(ratios)}
}

func where(samples []Sample, match func(Sample) bool) []Sample {
	return slices.DeleteFunc(slices.Clone(samples), func(s Sample) bool { return !match(s) })
}

func values(samples []Sample) []float64 {
	var all []float64
	for _, s := range samples {
		all = append(all, s.Value)
	}
	return all
}

// Above names the results that are above the limits of their figures.
func Above(figures []Figure, results []Result) []string {
	var above []string
	for _, f := range figures {
		for _, r := range results {
			is := r.Median
			if f.OfRatio {
				if r.Ratio == nil {
					continue
				}
				is = r.Ratio.Median
			}
			if r.Figure == f.Name && f.Limit > 0 && is > f.Limit {
				above = append(above, fmt.Sprintf("%s, %s, %s: %s, may be %s", f.Title, r.Case, r.Variant, number(is), number(f.Limit)))
			}
		}
	}
	return above
}

// Read reads a report.
func Read(path string) (Report, error) {
	var r Report
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	if err != nil {
		return r, fmt.Errorf("read results: %w", err)
	}
	return r, nil
}

// Write writes a report.
func (r Report) Write(path string) error {
	data, err := json.MarshalIndent(r, "", "\t")
	if err == nil {
		err = os.WriteFile(path, append(data, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("write results: %w", err)
	}
	return nil
}
