package metrics

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

const annotation = "merge.selective-ksm.dev"

// said is an engine that says one thing.
type said struct{ r control.Report }

func (s *said) Report() control.Report { return s.r }

// sample has each metric that there is.
func sample() *said {
	work := engine.Work{
		CPU:    1500 * time.Millisecond,
		Merges: engine.Durations{Count: 3, Sum: 4 * time.Second, Within: []uint64{0, 0, 1, 1, 2, 3, 3}},
		Errors: map[string]uint64{"EIO": 2},
	}
	return &said{control.Report{Version: "v1.2.3", Kernel: "6.12.58", Interface: "sysfs", Report: engine.Report{
		Partitions: []engine.PartitionStatus{
			{
				Name: "sksm-pod-1", Last: time.Unix(100, 0), Next: time.Unix(200, 0), Retry: 4 * time.Second, Waiting: true, Work: work,
				Counters: &kernel.Counters{Shared: 2, Sharing: 6, Unshared: 1, Scanned: 9},
				Containers: []engine.ContainerStatus{
					{Result: engine.Result{Offered: 8192}}, {Cause: engine.CauseNotMergeable, Result: engine.Result{Offered: 4096}},
				},
			},
			{Name: "sksm-pod-2", Hold: engine.HoldUnmerged, Counters: &kernel.Counters{Shared: 1, Sharing: 1}},
		},
		Outside: []engine.ContainerStatus{{Cause: engine.CausePolicy}},
		Work:    work, Waiting: 1, Running: 2,
	}}}
}

// The names and units are as Prometheus wants them, and each metric is described once.
func TestConventions(t *testing.T) {
	m := New(sample(), []string{annotation})
	problems, err := testutil.CollectAndLint(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(m)
	if _, err := registry.Gather(); err != nil {
		t.Error(err)
	}
}

func TestValues(t *testing.T) {
	s := sample()
	m := New(s, []string{annotation})
	m.Ignored(annotation)
	page := uint64(os.Getpagesize())
	want := fmt.Sprintf(`
# HELP selective_ksm_annotations_ignored_total Annotations of pods whose value did not count, by the annotation's key.
# TYPE selective_ksm_annotations_ignored_total counter
selective_ksm_annotations_ignored_total{annotation="merge.selective-ksm.dev"} 1
# HELP selective_ksm_containers Containers that are known, merged or not.
# TYPE selective_ksm_containers gauge
selective_ksm_containers 3
# HELP selective_ksm_containers_skipped Containers that are not merged, or not all of them, by the kind of reason.
# TYPE selective_ksm_containers_skipped gauge
selective_ksm_containers_skipped{reason="error"} 0
selective_ksm_containers_skipped{reason="held"} 0
selective_ksm_containers_skipped{reason="kept_out"} 0
selective_ksm_containers_skipped{reason="not_mergeable"} 1
selective_ksm_containers_skipped{reason="opt_in"} 0
selective_ksm_containers_skipped{reason="policy"} 1
selective_ksm_containers_skipped{reason="shared_space"} 0
# HELP selective_ksm_partition_backoff_seconds How long a partition waits after a failure; 0 after none.
# TYPE selective_ksm_partition_backoff_seconds gauge
selective_ksm_partition_backoff_seconds{partition="sksm-pod-1"} 4
selective_ksm_partition_backoff_seconds{partition="sksm-pod-2"} 0
# HELP selective_ksm_partition_errors_total Refusals for a partition, by the name of the error's number.
# TYPE selective_ksm_partition_errors_total counter
selective_ksm_partition_errors_total{errno="EIO",partition="sksm-pod-1"} 2
# HELP selective_ksm_partition_offered_bytes Memory that the containers of a partition offered at their last merge.
# TYPE selective_ksm_partition_offered_bytes gauge
selective_ksm_partition_offered_bytes{partition="sksm-pod-1"} 12288
selective_ksm_partition_offered_bytes{partition="sksm-pod-2"} 0
# HELP selective_ksm_merge_duration_seconds How long merges of a partition took that were not broken off, with their waits for the CPU budget.
# TYPE selective_ksm_merge_duration_seconds histogram
selective_ksm_merge_duration_seconds_bucket{le="0.005"} 0
selective_ksm_merge_duration_seconds_bucket{le="0.02"} 0
selective_ksm_merge_duration_seconds_bucket{le="0.1"} 1
selective_ksm_merge_duration_seconds_bucket{le="0.5"} 1
selective_ksm_merge_duration_seconds_bucket{le="2"} 2
selective_ksm_merge_duration_seconds_bucket{le="10"} 3
selective_ksm_merge_duration_seconds_bucket{le="60"} 3
selective_ksm_merge_duration_seconds_bucket{le="+Inf"} 3
selective_ksm_merge_duration_seconds_sum 4
selective_ksm_merge_duration_seconds_count 3
# HELP selective_ksm_pages Pages, by what they are: shared are those that others are merged into, saved those that are merged into them, unmerged those that were offered and found no equal.
# TYPE selective_ksm_pages gauge
selective_ksm_pages{state="saved"} 7
selective_ksm_pages{state="shared"} 3
selective_ksm_pages{state="unmerged"} 1
# HELP selective_ksm_saved_bytes Memory that merging saves.
# TYPE selective_ksm_saved_bytes gauge
selective_ksm_saved_bytes %d
`, 7*page)
	if err := testutil.CollectAndCompare(m, strings.NewReader(want),
		"selective_ksm_annotations_ignored_total", "selective_ksm_containers", "selective_ksm_containers_skipped",
		"selective_ksm_partition_backoff_seconds", "selective_ksm_partition_errors_total", "selective_ksm_partition_offered_bytes",
		"selective_ksm_merge_duration_seconds", "selective_ksm_pages", "selective_ksm_saved_bytes"); err != nil {
		t.Error(err)
	}

	// A partition that is gone leaves no metric.
	s.r.Partitions = s.r.Partitions[1:]
	for name, labels := range gathered(t, m) {
		if slices.Contains(labels, "sksm-pod-1") {
			t.Errorf("%s is still told of the partition", name)
		}
	}

	// Where the kernel does not count by partition, nothing is said that is not known.
	s.r.Partitions[0].Counters, s.r.Machine = nil, &kernel.Counters{Sharing: 5}
	if n := testutil.CollectAndCount(m, "selective_ksm_partition_pages", "selective_ksm_partition_saved_bytes"); n != 0 {
		t.Errorf("%d metrics of partitions that are not counted", n)
	}
	if n := testutil.CollectAndCount(m, "selective_ksm_pages"); n != 3 {
		t.Errorf("%d metrics of the machine's pages", n)
	}
}

// gathered are the names of all metrics, with all values of their labels.
func gathered(t *testing.T, m *Metrics) map[string][]string {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(m)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string][]string{}
	for _, f := range families {
		names[f.GetName()] = nil
		for _, one := range f.GetMetric() {
			for _, l := range one.GetLabel() {
				names[f.GetName()] = append(names[f.GetName()], l.GetValue())
			}
		}
	}
	return names
}

func TestServe(t *testing.T) {
	for address, loopback := range map[string]bool{":0": true, "127.0.0.1:0": true, "[::]:0": false, "0.0.0.0:0": false} {
		s, err := Listen(address, New(sample(), nil))
		if err != nil {
			t.Fatal(err)
		}
		if s.Loopback() != loopback {
			t.Errorf("%s listens at %v", address, s.Addr())
		}
		s.Close()
	}
	for _, address := range []string{"", "9720", "127.0.0.1", "127.0.0.1:http:x"} {
		if _, err := Listen(address, New(sample(), nil)); err == nil || !strings.Contains(err.Error(), "metrics address") {
			t.Errorf("%q: %v", address, err)
		}
	}

	s, err := Listen(":0", New(sample(), []string{annotation}))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for path, status := range map[string]int{Path: http.StatusOK, "/": http.StatusNotFound} {
		r, err := client.Get("http://" + s.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r.Body)
		r.Body.Close()
		if err != nil || r.StatusCode != status {
			t.Errorf("%s: %s, %v", path, r.Status, err)
		}
		if path != Path {
			continue
		}
		for _, want := range []string{
			`selective_ksm_info{interface="sysfs",kernel="6.12.58",version="v1.2.3"} 1`,
			`selective_ksm_partition_containers{partition="sksm-pod-1"} 2`, "process_cpu_seconds_total", "go_goroutines",
		} {
			if !strings.Contains(string(body), want) {
				t.Errorf("no %s in %s", want, body)
			}
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// all are the names under which Prometheus has the metrics.
func all(t *testing.T) []string {
	t.Helper()
	names := slices.Collect(maps.Keys(gathered(t, New(sample(), []string{annotation}))))
	for _, name := range slices.Clone(names) {
		if strings.HasSuffix(name, "_duration_seconds") {
			names = append(names, name+"_bucket", name+"_count", name+"_sum")
		}
	}
	return names
}
