package show

import (
	"strings"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

var now = time.Date(2026, 11, 25, 10, 0, 0, 0, time.UTC)

// sample is an engine with a bit of everything.
func sample() control.Report {
	of := func(pod, name string) engine.ContainerStatus {
		return engine.ContainerStatus{
			Container: engine.Container{
				ID: name + strings.Repeat("0", 60), Name: name, Pod: pod, Namespace: "default", SandboxID: pod,
				Because: "partitionBy of the configuration is pod",
			},
			Running: true,
			Result:  engine.Result{Offered: 65 << 20, Merged: 64 << 20, Saved: 32 << 20, Processes: 2, Took: 460 * time.Millisecond, At: now.Add(-3 * time.Second)},
		}
	}
	web, worker, slow, out := of("shop", "web"), of("shop", "worker"), of("bank", "slow"), of("root", "evil\x1b[2J")
	slow.Result, slow.OnDemand, slow.Interval = engine.Result{}, true, time.Minute
	worker.Reason, worker.Cause = "the kernel says that their memory is not mergeable: they joined by exec", engine.CauseNotMergeable
	out.Reason, out.Cause = "it is privileged, and pods.privileged of the configuration is false", engine.CausePolicy
	return control.Report{Version: "v0.0.0-20261125104131-74afb42786eb", Kernel: "6.12.58", Interface: "sysfs", Detail: "/sys/kernel/mm/ksm with add_process", Report: engine.Report{
		At: now, OptsIn: true, Settings: engine.Settings{Interval: 10 * time.Minute, MaxInterval: 80 * time.Minute},
		Partitions: []engine.PartitionStatus{
			{
				Name: "sksm-pod-8330a3166606ec17d86fb1", Last: now.Add(-3 * time.Second), Next: now.Add(597 * time.Second),
				Work: engine.Work{CPU: 126 * time.Millisecond}, Counters: &kernel.Counters{Shared: 8192, Sharing: 8193, Unshared: 256},
				Containers: []engine.ContainerStatus{web, worker},
			},
			{Name: "sksm-pod-9aee32768bf4a762e22778", Hold: engine.HoldUnmerged, Containers: []engine.ContainerStatus{slow}},
		},
		Outside: []engine.ContainerStatus{out},
		Work:    engine.Work{CPU: 930 * time.Millisecond},
	}}
}

const wantStatus = `selective-ksm v0.0.0-20261125104131-74afb42786eb on Linux 6.12.58, interface
    sysfs
4 containers in 2 partitions, 3 not merged; 32.0 MiB saved, 0.93 s of CPU spent

PARTITION                       PODS CTRS OFFERED  SHARED   SAVED UNMERGED
sksm-pod-8330a3166606ec17d86fb1    1    2   33280    8192    8193      256 pages
  default/shop                              130.0    32.0    32.0      1.0 MiB
  0.13 s of CPU; merged 3s ago; next in 9m57s
sksm-pod-9aee32768bf4a762e22778    1    1       0       -       -        - pages
  default/bank                                0.0       -       -        - MiB
  0.00 s of CPU; not merged yet; unmerged until selective-ksm merge

NOT MERGED
  default/bank/slow: it is merged on demand only, by selective-ksm merge
  default/root/evil?[2J: it is privileged, and pods.privileged of the
      configuration is false
  default/shop/worker: the kernel says that their memory is not mergeable: they
      joined by exec
`

func TestStatus(t *testing.T) {
	pageSize = 4096
	var b strings.Builder
	if err := Status(&b, sample()); err != nil {
		t.Fatal(err)
	}
	if got := b.String(); got != wantStatus {
		t.Errorf("got\n%s\nwant\n%s", got, wantStatus)
	}
	for line := range strings.Lines(b.String()) {
		if len(line)-1 > width {
			t.Errorf("%d columns: %s", len(line)-1, line)
		}
	}
}

// Each state of a partition is told in words.
func TestNext(t *testing.T) {
	one := engine.ContainerStatus{Running: true}
	for want, p := range map[string]engine.PartitionStatus{
		"is being unmerged":                    {Hold: engine.HoldUnmerging, Next: now.Add(time.Minute)},
		"unmerged until selective-ksm merge":   {Hold: engine.HoldUnmerged},
		"failed, and is tried again within 4s": {Retry: 4 * time.Second, Next: now.Add(time.Minute)},
		"waits for its turn":                   {Waiting: true, Next: now},
		"no merge is planned":                  {},
		"merges now":                           {Next: now.Add(time.Minute), Due: []time.Time{now}},
		"next in 10s":                          {Next: now.Add(time.Minute), Due: []time.Time{now.Add(10 * time.Second)}},
	} {
		p.Containers = []engine.ContainerStatus{one}
		if got := (&table{now: now}).next(p); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if got := (&table{now: now}).next(engine.PartitionStatus{}); got != "is being removed" {
		t.Errorf("without containers: %q", got)
	}
}

const wantWorker = `default/shop/worker
  container    worker000000000000000000000000000000000000000000000000000000000000
  partition    sksm-pod-8330a3166606ec17d86fb1, because partitionBy of the
               configuration is pod
  merged with  default/shop/web
  interface    sysfs: /sys/kernel/mm/ksm with add_process
  opted in     from outside, by the kernel
  secrets      left out
  schedule     each 10m0s, and up to 1h20m0s while little is saved; next in
               9m57s
  last merge   3s ago, in 0.46 s: 2 processes offered 65.0 MiB; 64.0 MiB of the
               container are merged, which saves 32.0 MiB
  not merged   the kernel says that their memory is not mergeable: they joined
               by exec (not_mergeable)
`

const wantOut = `default/root/evil?[2J
  container    evil?[2J000000000000000000000000000000000000000000000000000000000000
  partition    none
  not merged   it is privileged, and pods.privileged of the configuration is
               false (policy)
`

func TestExplain(t *testing.T) {
	for name, want := range map[string]string{
		"worker": wantWorker, "default/shop/worker": wantWorker, "worker0": wantWorker, "root": wantOut,
	} {
		var b strings.Builder
		if err := Explain(&b, sample(), name); err != nil {
			t.Fatal(err)
		}
		if got := b.String(); got != want {
			t.Errorf("%s:\n%s\nwant\n%s", name, got, want)
		}
	}
	var b strings.Builder
	if err := Explain(&b, sample(), "default/shop"); err != nil || strings.Count(b.String(), "\n  container ") != 2 {
		t.Errorf("a pod is\n%s, %v", b.String(), err)
	}
	for _, name := range []string{"", "nobody", "w", "/"} {
		if err := Explain(&b, sample(), name); err == nil {
			t.Errorf("%q was explained", name)
		}
	}
}
