package e2e_test

import (
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selective-ksm/selective-ksm/test/e2e/border"
	"github.com/selective-ksm/selective-ksm/test/e2e/node"
)

const ambient = "optIn: ambient\n" + often

// Containers of a runtime that is mergeable itself are, and so is what comes in by exec;
// nothing of them is changed.
func TestAmbient(t *testing.T) {
	needPartitions(t)
	config := node.Built(build)
	config.Under = []string{program, "runtime", "--"}
	n := startNode(t, config)
	p := startPlugin(t, n, ambient)
	guard := border.Watch()
	shop := run(t, n, guard, "shop", web(1), worker(1))
	bank := run(t, n, guard, "bank", web(1), worker(1))
	for _, pod := range []tenant{shop, bank} {
		merged(t, p, pod.ready(), pod.containers...)
		wantMerged(t, pod.containers[0], pod.containers[1])
		unchanged(t, pod.containers...)
	}
	stopGuard(t, guard)

	r := &record{t: t, node: n, pod: shop.Pod}
	got, err := n.CRI().ExecSync(deadline(t), &runtime.ExecSyncRequest{
		ContainerId: shop.containers[0].ID, Cmd: []string{"/workload", "-report", "-exit=0"}, Timeout: 60,
	})
	if err != nil {
		t.Fatal(err)
	}
	if own := r.reported("exec", string(got.Stdout)); own.Mergeable != "yes" {
		t.Errorf("what comes in by exec is mergeable: %q", own.Mergeable)
	}
	if isWrapped(r.status("started", shop.containers[0].ID)) {
		t.Error("the wrapper is before the command")
	}
}

// Where the runtime is not, the plugin says so of each container, and merges none, though
// the kernel would let it.
func TestAmbientOfOrdinaryRuntime(t *testing.T) {
	n := sharedNode(t)
	p := startPlugin(t, n, ambient)
	shop := run(t, n, nil, "shop", web(1), worker(1))
	for _, c := range shop.containers {
		if _, err := p.Wait(deadline(t), 1, complaints(c.Name)); err != nil {
			t.Errorf("no complaint about %s: %v", c.Name, err)
		}
	}
	if together, _ := common(t, shop.containers[0], shop.containers[1]); together != 0 {
		t.Errorf("%d pages are merged", together)
	}
	unchanged(t, shop.containers...)
}
