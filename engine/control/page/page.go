// Package page draws one HTML page of what was saved, what could be, and what it cost. The
// page has all that it needs in it: no network is asked for anything.
package page

import (
	"bytes"
	"cmp"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/engine/estimate"
)

// Data is what there is to show. Any part may be missing.
type Data struct {
	// Statuses are those of an engine, from one or more times.
	Statuses []Status
	// Estimate is that of selective-ksm estimate.
	Estimate *estimate.Report
	// Bench are measurements, in the order of their table.
	Bench []Measured
}

// Status is what an engine had.
type Status struct {
	At         time.Time
	Partitions []Partition
}

// Saved is what all partitions saved, in bytes.
func (s Status) Saved() uint64 {
	var sum uint64
	for _, p := range s.Partitions {
		sum += p.Saved
	}
	return sum
}

// Partition is what a partition had. Sizes are in bytes.
type Partition struct {
	Name string
	// Containers are the names of its members.
	Containers             []string
	Offered, Merged, Saved uint64
	// Spent is the CPU time that merging it took.
	Spent time.Duration
}

// Measured is a number of a benchmark: the median, and in the note how it lies and compares.
type Measured struct{ What, Value, Note string }

// ErrForm says that a file is of another form than the one that it was given for.
var ErrForm = errors.New("it is of another form")

// ReadStatus reads what selective-ksm status -json tells, with -watch once or more often.
// Errors match [ErrForm].
func ReadStatus(data []byte) ([]Status, error) {
	var all []Status
	for told := json.NewDecoder(bytes.NewReader(data)); ; {
		var report control.Report
		err := told.Decode(&report)
		if errors.Is(err, io.EOF) && len(all) > 0 {
			return all, nil
		}
		if err == nil && report.Partitions == nil {
			err = errors.New("no partitions")
		}
		if err != nil {
			return nil, fmt.Errorf("%w: give it what selective-ksm status -json tells: %w", ErrForm, err)
		}
		all = append(all, statusOf(report))
	}
}

func statusOf(report control.Report) Status {
	s := Status{At: report.At}
	for _, from := range report.Partitions {
		p := Partition{Name: from.Name, Spent: from.Work.CPU}
		for _, c := range from.Containers {
			p.Containers = append(p.Containers, c.Path())
			p.Offered += c.Result.Offered
			p.Merged += c.Result.Merged
			p.Saved += c.Result.Saved
		}
		s.Partitions = append(s.Partitions, p)
	}
	return s
}

// ReadEstimate reads what selective-ksm estimate -json writes. Errors match [ErrForm].
func ReadEstimate(data []byte) (*estimate.Report, error) {
	var r estimate.Report
	if err := json.Unmarshal(data, &r); err != nil || len(r.Policies) == 0 {
		return nil, fmt.Errorf("%w: give it what selective-ksm estimate -json writes: %w", ErrForm, cmp.Or(err, errors.New("no policies")))
	}
	return &r, nil
}

// ReadBench reads the results.json of make bench. Errors match [ErrForm].
func ReadBench(data []byte) ([]Measured, error) {
	type spread struct {
		N              int
		Median, Q1, Q3 float64
	}
	var report struct {
		Results []struct {
			Title, Case, Variant, Unit string
			spread
			Over  int
			Ratio *struct {
				Of string
				spread
			}
		}
	}
	err := json.Unmarshal(data, &report)
	if err == nil && len(report.Results) == 0 {
		err = errors.New("no results")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: give it the results.json of make bench: %w", ErrForm, err)
	}
	var found []Measured
	for _, r := range report.Results {
		m := Measured{
			What:  r.Title + ": " + r.Case + ": " + r.Variant,
			Value: strings.TrimSpace(fmt.Sprintf("%.3g %s", r.Median, r.Unit)),
			Note:  fmt.Sprintf("%.3g to %.3g, n = %d", r.Q1, r.Q3, r.N),
		}
		if r.Over > 0 {
			m.Value = "over " + m.Value
		}
		if r.Ratio != nil {
			m.Note += fmt.Sprintf("; %.3g of %s", r.Ratio.Median, r.Ratio.Of)
		}
		found = append(found, m)
	}
	return found, nil
}

//go:embed page.html
var text string

var page = template.Must(template.New("page").Funcs(template.FuncMap{"size": Size, "seconds": seconds, "when": when, "inverse": func(f float64) float64 { return 1 / f }}).Parse(text))

// Write writes the page.
func Write(w io.Writer, d Data) error {
	slices.SortStableFunc(d.Statuses, func(a, b Status) int { return a.At.Compare(b.At) })
	v := view{Data: d, Made: time.Now().UTC()}
	if n := len(d.Statuses); n > 0 {
		last := d.Statuses[n-1]
		v.Last = &last
		v.ByPartition = byPartition(last)
		for _, p := range last.Partitions {
			v.Spent += p.Spent
			v.Offered += p.Offered
		}
	}
	if len(d.Statuses) > 1 {
		v.OverTime = overTime(d.Statuses)
	}
	if d.Estimate != nil {
		v.ByPolicy = byPolicy(d.Estimate)
	}
	return page.Execute(w, v)
}

// view is what the page is made of.
type view struct {
	Data
	Made    time.Time
	Last    *Status // the latest
	Spent   time.Duration
	Offered uint64

	ByPartition, ByPolicy []bar
	OverTime              *line
}

// Size is a number of bytes for people.
func Size(bytes uint64) string {
	const mib = 1 << 20
	switch {
	case bytes >= 10<<30:
		return fmt.Sprintf("%.1f GiB", float64(bytes)/(1<<30))
	case bytes >= 10*mib || bytes == 0:
		return fmt.Sprintf("%d MiB", (bytes+mib/2)/mib)
	}
	return fmt.Sprintf("%.1f MiB", float64(bytes)/mib)
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.3g s", d.Seconds()) }

func when(t time.Time) string {
	if t.IsZero() {
		return "at a time that is not known"
	}
	return t.UTC().Format("2 January 2006, 15:04:05 UTC")
}
