package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Spread is the median of several times, the least and the greatest.
type Spread struct {
	Median time.Duration `json:"median_ns"`
	Least  time.Duration `json:"least_ns"`
	Most   time.Duration `json:"most_ns"`
}

func spread(times []time.Duration) Spread {
	times = slices.Sorted(slices.Values(times))
	n := len(times)
	return Spread{Median: (times[(n-1)/2] + times[n/2]) / 2, Least: times[0], Most: times[n-1]}
}

func (s Spread) String() string {
	return fmt.Sprintf("%s\t(%s to %s)", seconds(s.Median), seconds(s.Least), seconds(s.Most))
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.3f", d.Seconds()) }

// Result is what all rounds of a measurement come to.
type Result struct {
	Workload Workload `json:"workload"`
	What     string   `json:"what"`
	Rounds   int      `json:"rounds"`
	Wall     Spread   `json:"wall"`
	CPU      Spread   `json:"cpu"`
}

// compare prints the table of the samples in files, and writes it as JSON to
// out, if that is not empty.
func compare(w io.Writer, out string, files []string) error {
	var samples []Sample
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		var some []Sample
		if err := json.Unmarshal(data, &some); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		samples = append(samples, some...)
	}
	results := summarize(samples)
	if out != "" {
		data, err := json.MarshalIndent(results, "", "\t")
		if err != nil {
			return err
		}
		if err := os.WriteFile(out, append(data, '\n'), 0o644); err != nil {
			return err
		}
	}
	return tell(w, results)
}

// tell prints the table of the results, and returns an error for what is not as promised.
func tell(w io.Writer, results []Result) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "\t\twall, s\t\tCPU, s\t\trounds")
	for _, r := range results {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%d\n", r.Workload, r.What, r.Wall, r.CPU, r.Rounds)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	return judge(w, results)
}

// summarize returns a result for all samples of the same, in the order in
// which they first come.
func summarize(samples []Sample) []Result {
	var results []Result
	for _, s := range samples {
		same := func(workload Workload, what string) bool { return s.Workload == workload && s.What == what }
		if slices.ContainsFunc(results, func(r Result) bool { return same(r.Workload, r.What) }) {
			continue
		}
		var wall, cpu []time.Duration
		for _, other := range samples {
			if same(other.Workload, other.What) {
				wall, cpu = append(wall, other.Wall), append(cpu, other.CPU)
			}
		}
		results = append(results, Result{s.Workload, s.What, len(wall), spread(wall), spread(cpu)})
	}
	return results
}

// judge compares the medians: a merge on request with the best that ksmd does,
// and a second one with the first.
func judge(w io.Writer, results []Result) error {
	var errs []error
	for _, workload := range workloads {
		var first, again, best *Result
		for i, r := range results {
			switch {
			case r.Workload != workload:
			case r.What == request:
				first = &results[i]
			case r.What == requestAgain:
				again = &results[i]
			case strings.HasPrefix(r.What, daemon) && (best == nil || r.Wall.Median < best.Wall.Median):
				best = &results[i]
			}
		}
		if first == nil || again == nil || best == nil {
			errs = append(errs, fmt.Errorf("%s: not measured on both kernels", workload))
			continue
		}
		for _, promise := range []struct {
			what      string
			got, than time.Duration
			most      float64
		}{
			{"wall time, of ksmd's", first.Wall.Median, best.Wall.Median, 1.0 / 2},
			{"CPU time, of ksmd's", first.CPU.Median, best.CPU.Median, 1.0 / 2},
			{"a second merge's wall time, of the first's", again.Wall.Median, first.Wall.Median, 1.0 / 10},
		} {
			share := float64(promise.got) / float64(promise.than)
			fmt.Fprintf(w, "%s: %s: %.2f, promised %.2f\n", workload, promise.what, share, promise.most)
			if share > promise.most {
				errs = append(errs, fmt.Errorf("%s: %s: %.2f, promised %.2f", workload, promise.what, share, promise.most))
			}
		}
	}
	return errors.Join(errs...)
}
