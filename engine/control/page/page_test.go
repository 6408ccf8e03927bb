package page

import (
	"encoding/json"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/engine/estimate"
)

// report is what an engine tells.
func report(at time.Time, saved uint64) control.Report {
	of := func(name string, saved uint64) engine.ContainerStatus {
		return engine.ContainerStatus{
			Container: engine.Container{Name: name, Pod: "pod-1", Namespace: "shop"},
			Result:    engine.Result{Offered: 2 * saved, Merged: saved, Saved: saved},
		}
	}
	return control.Report{Report: engine.Report{At: at, Partitions: []engine.PartitionStatus{
		{
			Name: "sksm-pod-1", Work: engine.Work{CPU: 2 * time.Second},
			Containers: []engine.ContainerStatus{of("web", saved), of("<script>", 2*saved)},
		},
		{Name: "sksm-pod-2", Containers: []engine.ContainerStatus{of("worker", 12*saved)}},
	}}}
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestReadStatus(t *testing.T) {
	const mib = 1 << 20
	at := time.Unix(1, 0).UTC()
	first, second := encode(t, report(at, mib)), encode(t, report(at.Add(time.Second), 2*mib))
	all, err := ReadStatus(slices.Concat(first, []byte("\n"), second))
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 2 || all[0].Saved() != 15*mib || all[1].Saved() != 30*mib || len(all[0].Partitions) != 2 || !all[0].At.Equal(at) {
		t.Fatalf("%+v", all)
	}
	if p := all[0].Partitions[0]; p.Offered != 6*mib || p.Merged != 3*mib || p.Spent != 2*time.Second || p.Containers[0] != "shop/pod-1/web" {
		t.Errorf("%+v", p)
	}
	// Files are kept, and read by another version.
	kept, err := ReadStatus([]byte(`{"at": "1970-01-01T00:00:01Z", "partitions": [
		{"name": "sksm-pod-1", "work": {"cpu_ns": 2000000000}, "containers": [
			{"namespace": "shop", "pod": "pod-1", "name": "web", "last_merge": {"offered_bytes": 2, "merged_bytes": 3, "saved_bytes": 4}}]}]}`))
	want := []Status{{At: at, Partitions: []Partition{
		{Name: "sksm-pod-1", Containers: []string{"shop/pod-1/web"}, Offered: 2, Merged: 3, Saved: 4, Spent: 2 * time.Second},
	}}}
	if err != nil || !reflect.DeepEqual(kept, want) {
		t.Errorf("got %+v, %v, want %+v", kept, err, want)
	}
	for _, bad := range []string{"", "7", "{}", "[7]", `{"policies": []}`, string(encode(t, report(at, mib))) + "{"} {
		if _, err := ReadStatus([]byte(bad)); !errors.Is(err, ErrForm) {
			t.Errorf("status %q: %v", bad, err)
		}
		if _, err := ReadEstimate([]byte(bad)); !errors.Is(err, ErrForm) {
			t.Errorf("estimate %q: %v", bad, err)
		}
	}
}

func TestReadBench(t *testing.T) {
	got, err := ReadBench([]byte(`{"date": "2026-01-02T03:04:05Z", "results": [
		{"figure": "f", "title": "Time", "case": "2 processes", "variant": "a", "unit": "s", "n": 5, "median": 1.23456, "q1": 1, "q3": 2,
		 "ratio": {"of": "b", "n": 5, "median": 0.25, "q1": 0.2, "q3": 0.3}},
		{"title": "Time", "case": "2 processes", "variant": "b", "n": 1, "median": 90, "q1": 90, "q3": 90, "over": 1}]}`))
	if err != nil {
		t.Fatal(err)
	}
	want := []Measured{
		{"Time: 2 processes: a", "1.23 s", "1 to 2, n = 5; 0.25 of b"},
		{"Time: 2 processes: b", "over 90", "90 to 90, n = 1"},
	}
	if !slices.Equal(got, want) {
		t.Fatalf("got %v, want %v", got, want)
	}
	for _, bad := range []string{"", "{}", `"text"`, `{"results": []}`} {
		if _, err := ReadBench([]byte(bad)); !errors.Is(err, ErrForm) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func written(t *testing.T, d Data) string {
	t.Helper()
	var b strings.Builder
	if err := Write(&b, d); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// The page has all that it was given, in the order of time, asks the network for nothing,
// and takes no name for markup.
func TestWrite(t *testing.T) {
	var d Data
	for _, saved := range []uint64{4 << 20, 1 << 20} {
		s, err := ReadStatus(encode(t, report(time.Unix(int64(saved), 0), saved)))
		if err != nil {
			t.Fatal(err)
		}
		d.Statuses = append(d.Statuses, s...)
	}
	d.Estimate = &estimate.Report{Rate: 1. / 16, IntervalSeconds: 5, Policies: []estimate.Policy{
		{Policy: "pod", Partitions: 2, Saved: 30 << 20, Volatile: 10 << 20, IsolationCosts: 50 << 20},
		{Policy: "namespace", Unknown: "nobody told"},
		{Policy: "node", Partitions: 1, Saved: 80 << 20},
	}}
	d.Bench = []Measured{{"a & b", "7", "n = 3"}}
	text := written(t, d)
	for _, want := range []string{"60 MiB", "shop/pod-1/web, &lt;script&gt;", `points="0.0,150.0 600.0,0.0"`, "nobody told", "50 MiB less than the whole node",
		"One in 16", "a &amp; b", "n = 3", `<rect class="bar" width="37.50"`, `width="12.50"`} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in the page:\n%s", want, text)
		}
	}
	for _, bad := range []string{"<script", "http:", "https:", "src=", "url(", "@import", "ZgotmplZ"} {
		if strings.Contains(text, bad) {
			t.Errorf("%q is in the page", bad)
		}
	}
	if text := written(t, Data{Bench: d.Bench}); strings.Contains(text, "By partition") || strings.Contains(text, "policy") {
		t.Error("what was not given is in the page")
	}
}

func TestTogether(t *testing.T) {
	for want, names := range map[string][]string{
		"a/b/c, d, a/e/d":                  {"a/b/c", "a/b/d", "a/e/d"},
		"x":                                {"x"},
		"a/b/1, 2, 3, 4, 5, 6, and 2 more": {"a/b/1", "a/b/2", "a/b/3", "a/b/4", "a/b/5", "a/b/6", "a/b/7", "a/b/8"},
	} {
		if got := together(names); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
