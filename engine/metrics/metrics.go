// Package metrics tells Prometheus what an engine has and does. All of it is made of the
// engine's report when somebody asks, so that there are never metrics of partitions that
// are gone.
//
// What a partition saves and when it is merged tells of what is in it. So the metrics are
// for those only who may know.
package metrics

import (
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// prefix is that of all names.
const prefix = "selective_ksm_"

// Engine is what is asked.
type Engine interface {
	Report() control.Report
}

// Metrics are a [prometheus.Collector]. Its methods may be called concurrently.
type Metrics struct {
	engine  Engine
	ignored *prometheus.CounterVec
}

// New makes the metrics of an engine. Annotations are those whose values may be wrong.
func New(e Engine, annotations []string) *Metrics {
	m := &Metrics{engine: e, ignored: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: prefix + "annotations_ignored_total",
		Help: "Annotations of pods whose value did not count, by the annotation's key.",
	}, []string{"annotation"})}
	for _, annotation := range annotations {
		m.ignored.WithLabelValues(annotation)
	}
	return m
}

// Ignored counts an annotation whose value does not count.
func (m *Metrics) Ignored(annotation string) { m.ignored.WithLabelValues(annotation).Inc() }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prefix+name, help, labels, nil)
}

var (
	info = desc("info", "The program, the kernel, and how that is asked; always 1.", "version", "kernel", "interface")

	partitions  = desc("partitions", "Partitions that there are.")
	held        = desc("partitions_held", "Partitions that somebody has had unmerged.")
	backingOff  = desc("partitions_backing_off", "Partitions that wait before what has failed is tried again.")
	containers  = desc("containers", "Containers that are known, merged or not.")
	skipped     = desc("containers_skipped", "Containers that are not merged, or not all of them, by the kind of reason.", "reason")
	pages       = desc("pages", "Pages, by what they are: shared are those that others are merged into, saved those that are merged into them, unmerged those that were offered and found no equal.", "state")
	savedBytes  = desc("saved_bytes", "Memory that merging saves.")
	cpu         = desc("cpu_seconds_total", "CPU time that merging took.")
	waiting     = desc("turns_waiting", "Turns of the CPU budget that are waited for.")
	running     = desc("turns_running", "Turns of the CPU budget that are under way.")
	failures    = desc("errors_total", "Refusals by the kernel or the system, by the name of the error's number.", "errno")
	mergesTook  = desc("merge_duration_seconds", "How long merges of a partition took that were not broken off, with their waits for the CPU budget.")
	scrapeTook  = desc("report_duration_seconds", "How long it took to ask the engine and the kernel for these metrics.")
	ofPartition = struct {
		containers, pages, savedBytes, offeredBytes, scanned, cpu, waiting, backoff, failures, mergesTook, last, next *prometheus.Desc
	}{
		containers:   desc("partition_containers", "Containers of a partition.", "partition"),
		pages:        desc("partition_pages", "Pages of a partition, by what they are; as selective_ksm_pages.", "partition", "state"),
		savedBytes:   desc("partition_saved_bytes", "Memory that merging saves in a partition.", "partition"),
		offeredBytes: desc("partition_offered_bytes", "Memory that the containers of a partition offered at their last merge.", "partition"),
		scanned:      desc("partition_pages_scanned_total", "Pages that the kernel has looked at in a partition.", "partition"),
		cpu:          desc("partition_cpu_seconds_total", "CPU time that the merging of a partition took.", "partition"),
		waiting:      desc("partition_turns_waiting", "Turns of the CPU budget that a partition waits for.", "partition"),
		backoff:      desc("partition_backoff_seconds", "How long a partition waits after a failure; 0 after none.", "partition"),
		failures:     desc("partition_errors_total", "Refusals for a partition, by the name of the error's number.", "partition", "errno"),
		mergesTook:   desc("partition_merge_duration_seconds", "How long merges of a partition took; as selective_ksm_merge_duration_seconds.", "partition"),
		last:         desc("partition_last_merge_timestamp_seconds", "When a merge of a partition last came to its end.", "partition"),
		next:         desc("partition_next_merge_timestamp_seconds", "When a partition is merged next by its interval.", "partition"),
	}
)

// Describe implements [prometheus.Collector]. It tells nothing, so that nothing that is
// collected is checked against it: what there is depends on the kernel.
func (m *Metrics) Describe(chan<- *prometheus.Desc) {}

// Collect implements [prometheus.Collector].
func (m *Metrics) Collect(to chan<- prometheus.Metric) {
	began := time.Now()
	r := m.engine.Report()
	c := collection{to}
	c.gauge(scrapeTook, time.Since(began).Seconds())
	c.gauge(info, 1, r.Version, r.Kernel, r.Interface)
	m.ignored.Collect(to)

	var all kernel.Counters
	known := r.Machine != nil
	if known {
		all = *r.Machine
	}
	var holds, backoffs, members int
	reasons := map[engine.Cause]int{}
	for _, p := range r.Partitions {
		c.partition(p)
		members += len(p.Containers)
		if p.Hold != engine.HoldNot {
			holds++
		}
		if p.Retry > 0 {
			backoffs++
		}
		for _, one := range p.Containers {
			if one.Cause != "" {
				reasons[one.Cause]++
			}
		}
		if p.Counters != nil {
			known = true
			all.Shared += p.Counters.Shared
			all.Sharing += p.Counters.Sharing
			all.Unshared += p.Counters.Unshared
		}
	}
	for _, one := range r.Outside {
		reasons[one.Cause]++
	}
	for _, cause := range engine.Causes {
		c.gauge(skipped, float64(reasons[cause]), string(cause))
	}
	c.gauge(partitions, float64(len(r.Partitions)))
	c.gauge(held, float64(holds))
	c.gauge(backingOff, float64(backoffs))
	c.gauge(containers, float64(members+len(r.Outside)))
	c.gauge(waiting, float64(r.Waiting))
	c.gauge(running, float64(r.Running))
	if known || len(r.Partitions) == 0 {
		c.counters(pages, savedBytes, all)
	}
	c.work(r.Work, cpu, failures, mergesTook)
}

// collection is where metrics go.
type collection struct{ to chan<- prometheus.Metric }

func (c collection) gauge(d *prometheus.Desc, value float64, labels ...string) {
	c.to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
}

func (c collection) counter(d *prometheus.Desc, value float64, labels ...string) {
	c.to <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, value, labels...)
}

func (c collection) partition(p engine.PartitionStatus) {
	of := &ofPartition
	c.gauge(of.containers, float64(len(p.Containers)), p.Name)
	var offered uint64
	for _, one := range p.Containers {
		offered += one.Result.Offered
	}
	c.gauge(of.offeredBytes, float64(offered), p.Name)
	waits := 0.0
	if p.Waiting {
		waits = 1
	}
	c.gauge(of.waiting, waits, p.Name)
	c.gauge(of.backoff, p.Retry.Seconds(), p.Name)
	for d, at := range map[*prometheus.Desc]time.Time{of.last: p.Last, of.next: p.Next} {
		if !at.IsZero() {
			c.gauge(d, float64(at.UnixMilli())/1000, p.Name)
		}
	}
	if p.Counters != nil {
		c.counters(of.pages, of.savedBytes, *p.Counters, p.Name)
		c.counter(of.scanned, float64(p.Counters.Scanned), p.Name)
	}
	c.work(p.Work, of.cpu, of.failures, of.mergesTook, p.Name)
}

// counters are the kernel's, with more labels before the state's.
func (c collection) counters(pages, bytes *prometheus.Desc, n kernel.Counters, labels ...string) {
	for _, one := range []struct {
		state string
		pages uint64
	}{{"shared", n.Shared}, {"saved", n.Sharing}, {"unmerged", n.Unshared}} {
		c.gauge(pages, float64(one.pages), append(labels[:len(labels):len(labels)], one.state)...)
	}
	c.gauge(bytes, float64(n.Sharing)*float64(os.Getpagesize()), labels...)
}

func (c collection) work(w engine.Work, cpu, failures, took *prometheus.Desc, labels ...string) {
	c.counter(cpu, w.CPU.Seconds(), labels...)
	for errno, n := range w.Errors {
		c.counter(failures, float64(n), append(labels[:len(labels):len(labels)], errno)...)
	}
	within := map[float64]uint64{}
	for i, bound := range engine.Bounds {
		n := uint64(0)
		if i < len(w.Merges.Within) {
			n = w.Merges.Within[i]
		}
		within[bound.Seconds()] = n
	}
	c.to <- prometheus.MustNewConstHistogram(took, w.Merges.Count, w.Merges.Sum.Seconds(), within, labels...)
}
