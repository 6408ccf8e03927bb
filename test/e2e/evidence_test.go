package e2e_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/engine/audit"
	"github.com/selective-ksm/selective-ksm/engine/estimate"
	"github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
)

// tell runs the program, and reads the JSON that it writes. It returns the exit status
// and what the program said besides.
func tell(t *testing.T, into any, args ...string) (status int, said string) {
	t.Helper()
	cmd := exec.CommandContext(deadline(t), program, args...)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		status = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(out.Bytes(), into); err != nil {
		t.Fatalf("%s: %v\n%s%s", args[0], err, out.String(), stderr.String())
	}
	return status, stderr.String()
}

// estimated runs an estimate of all containers that run.
func estimated(t *testing.T, args ...string) estimate.Report {
	t.Helper()
	var r estimate.Report
	if status, said := tell(t, &r, append([]string{"estimate", "-interval", "1s", "-json"}, args...)...); status != 0 || said != "" {
		t.Fatalf("estimate ended with %d, and said %q", status, said)
	}
	return r
}

func policyOf(t *testing.T, r estimate.Report, name string) estimate.Policy {
	t.Helper()
	i := slices.IndexFunc(r.Policies, func(p estimate.Policy) bool { return p.Policy == name })
	if i < 0 {
		t.Fatalf("no policy %q in %+v", name, r.Policies)
	}
	return r.Policies[i]
}

// savedBy is what all partitions save, as the kernel counts, in bytes.
func savedBy(t *testing.T) uint64 {
	t.Helper()
	names, err := partition.List()
	if err != nil {
		t.Fatal(err)
	}
	pages := 0
	for _, name := range names {
		n, err := partition.Counter(name, "pages_sharing")
		if err != nil {
			t.Fatal(err)
		}
		pages += n
	}
	return uint64(pages) * uint64(os.Getpagesize())
}

// wantWithin5 fails the test if what was foretold is off by more than 5 % of what is.
func wantWithin5(t *testing.T, what string, foretold, is uint64) {
	t.Helper()
	off := (float64(foretold) - float64(is)) / float64(is) * 100
	t.Logf("%s: foretold %d bytes, %d are saved: off by %+.2f %%", what, foretold, is, off)
	if off > 5 || off < -5 || is == 0 {
		t.Errorf("%s: off by %+.2f %%", what, off)
	}
}

// What an estimate foretells of quiet containers, before the plugin first runs, is what
// merging them then saves.
func TestEstimate(t *testing.T) {
	n := sharedNode(t)
	const size = 32
	config := func(name string) node.ContainerConfig { return node.ContainerConfig{Name: name, MiB: size, Seed: 1} }
	shop := run(t, n, nil, "shop", config("web"), config("worker"))
	bank := run(t, n, nil, "bank", config("web"), config("worker"))
	before := estimated(t)
	var names []string
	for _, c := range before.Containers {
		names = append(names, c.Namespace+"/"+c.Pod+"/"+c.Name)
		if c.Offered < size<<20 || c.Processes != 1 || c.LeftOut != "" {
			t.Errorf("%+v", c)
		}
	}
	if want := []string{"default/bank/web", "default/bank/worker", "default/shop/web", "default/shop/worker"}; !slices.Equal(names, want) {
		t.Errorf("containers %q, want %q", names, want)
	}
	if before.Engine || before.Merged != 0 {
		t.Errorf("before there is an engine: %+v", before)
	}
	// Processes by their numbers, and a part of all contents: those that no policy knows.
	some := estimated(t, "-pid", fmt.Sprint(shop.containers[0].PID), "-pid", fmt.Sprint(bank.containers[0].PID), "-sample", "0.25")
	if len(some.Containers) != 2 || some.Rate != 0.25 {
		t.Errorf("of two processes: %+v", some)
	}
	for policy, want := range map[string]uint64{"container": 0, "node": size << 20} {
		// Their programs have some equal pages of their own.
		p := policyOf(t, some, policy)
		if off := size<<20/20 + 2*p.Error; p.Error == 0 || p.Saved+off < want || p.Saved > want+off {
			t.Errorf("of two processes with %d bytes in common: %+v", size<<20, p)
		}
	}

	p := startPlugin(t, n, once)
	var took time.Duration
	for _, pod := range []tenant{shop, bank} {
		lines, err := p.Merged(deadline(t), pod.ready(), pod.containers[0].ID, pod.containers[1].ID)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range lines {
			took += l.Took()
		}
	}
	wantWithin5(t, "by pod", policyOf(t, before, "pod").Saved, savedBy(t))
	t.Logf("the first merge took %s; foretold %+v by %+v", took, before.FirstMerge, before.Own)
	// What is merged already is foretold as what is not.
	after := estimated(t)
	if !after.Engine {
		t.Error("no engine is seen")
	}
	wantWithin5(t, "by the running engine", policyOf(t, after, "running engine").Saved, savedBy(t))
	wantWithin5(t, "saved already", after.SavedNow, savedBy(t))
	wantMerged(t, shop.containers[0], shop.containers[1])

	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	// The processes are still bound to the pods' partitions, and are let go there: that is
	// waited for no longer than it takes.
	p = startPlugin(t, n, "partitionBy: namespace\n"+once)
	merged(t, p, bank.ready(), slices.Concat(shop.containers, bank.containers)...)
	wantWithin5(t, "by namespace", policyOf(t, before, "namespace").Saved, savedBy(t))
	unchanged(t, slices.Concat(shop.containers, bank.containers)...)
}

// An audit of pods that are merged finds nothing, and finds containers that share pages
// where each should be alone.
func TestAudit(t *testing.T) {
	n := sharedNode(t)
	p := startPlugin(t, n, often)
	shop := run(t, n, nil, "shop", web(1), worker(1))
	bank := run(t, n, nil, "bank", web(1), worker(1))
	for _, pod := range []tenant{shop, bank} {
		merged(t, p, pod.ready(), pod.containers...)
	}
	var r audit.Report
	status, said := tell(t, &r, "audit", "-strict", "-json")
	if status != 0 || len(r.Crossings)+len(r.Outside) > 0 || !r.Engine || !r.Flags || r.Partitions != 2 || r.Pages < dataMiB<<20/4096*4*least/100 {
		t.Errorf("pods that are merged: exit status %d, %q, %+v", status, said, r)
	}
	status, said = tell(t, &r, "audit", "-by", "container", "-json")
	if status != 1 || !strings.Contains(said, "across the border") || len(r.Crossings) != 2 {
		t.Fatalf("containers that must be alone: exit status %d, %q, %+v", status, said, r)
	}
	for i, pod := range []tenant{bank, shop} {
		var want []string
		for _, c := range pod.containers {
			want = append(want, c.ID)
		}
		c := r.Crossings[i]
		got := []string{c.A.ID, c.B.ID}
		t.Log(c)
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(got, want) || c.A.Container != "default/"+pod.Name+"/web" && c.A.Container != "default/"+pod.Name+"/worker" {
			t.Errorf("%s: named are %s", pod.Name, c)
		}
	}
}

// What cannot be is refused in one line that names the fix, with the status of a wrong
// command line.
func TestEvidenceUsage(t *testing.T) {
	needProgram(t)
	none := filepath.Join(t.TempDir(), "none.json")
	for _, tc := range []struct{ args, part string }{
		{"estimate -sample 2", "0.0625"},
		{"estimate -interval -1s", "such as 5s"},
		{"estimate -pid x", "number of a process"},
		{"audit -by node", "container, pod, group or namespace"},
		{"audit now", "now"},
		{"report", "name a file"},
		{"report -status " + none, none},
	} {
		out, err := exec.CommandContext(deadline(t), program, strings.Fields(tc.args)...).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 {
			t.Errorf("%s: ended with %v", tc.args, err)
		}
		if said := string(out); !strings.Contains(said, tc.part) || strings.Count(said, "\n") != 1 {
			t.Errorf("%s: said %q, want %q in one line", tc.args, said, tc.part)
		}
	}
}
