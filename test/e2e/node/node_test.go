package node

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/test/missing"
	"github.com/selective-ksm/selective-ksm/test/workload/control"
)

// TestPod runs a pod without any plugin: what it needs is containerd alone.
func TestPod(t *testing.T) {
	if os.Getuid() != 0 {
		missing.Skip(t, "containerd runs as root here")
	}
	config := Built("../../../build")
	for _, path := range []string{config.Tools, config.Workload} {
		if _, err := os.Stat(path); err != nil {
			missing.Skip(t, "not built: %v", err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()

	n, err := Start(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.Stop(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(n.dir); !os.IsNotExist(err) {
			t.Errorf("%s was left: %v", n.dir, err)
		}
		if t.Failed() {
			t.Log(n.Log())
		}
	}()

	p, err := n.RunPod(ctx, "one")
	if err != nil {
		t.Fatal(err)
	}
	c, err := p.Start(ctx, ContainerConfig{Name: "web", MiB: 4, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	checked, err := c.Do(ctx, control.Request{Op: control.Check})
	if err != nil {
		t.Fatal(err)
	}
	if checked.Sum != c.Hello.Sum {
		t.Errorf("data sums to %#x, to %#x at first", checked.Sum, c.Hello.Sum)
	}
	written, err := c.Do(ctx, control.Request{Op: control.Write, First: 5, Count: 1, Seed: 2})
	if err != nil {
		t.Fatal(err)
	}
	if written.Sum == checked.Sum {
		t.Error("a write did not change the sum")
	}
	if _, err := c.Do(ctx, control.Request{Op: control.Churn, Count: 1024, Seed: 3}); err != nil {
		t.Fatal(err)
	}
	settled, err := c.Do(ctx, control.Request{Op: control.Settle})
	if err != nil {
		t.Fatal(err)
	}
	if settled.Sum == written.Sum && settled.Rounds > 0 {
		t.Errorf("%d rounds of churn did not change the sum", settled.Rounds)
	}
	// The workload refuses what it cannot do, and says so before it exits.
	if _, err := c.Do(ctx, control.Request{Op: control.Write, First: 1024, Count: 1}); err == nil {
		t.Error("a write behind the end was not refused")
	}
	if err := c.Stop(ctx); err != nil {
		t.Error(err)
	}
	if err := p.Remove(ctx); err != nil {
		t.Error(err)
	}
}
