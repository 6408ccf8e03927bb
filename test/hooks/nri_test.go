package hooks

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/control"
	cri "github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/e2e/plugin"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

// Where NRI and hooks are both installed, and tell of the same container, it is handled
// once, and those that hooks alone tell of stay when the plugin connects again.
func TestNRI(t *testing.T) {
	n := newNode(t)
	if n.mainline {
		missing.Skip(t, "this kernel has no partitions")
	}
	if _, err := os.Stat(cri.Built("../../build").Tools); err != nil {
		missing.Skip(t, "not built: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*patience)
	defer cancel()
	built := cri.Built("../../build")
	built.Hooks = installed(t, n.hooks)
	containerd, err := cri.Start(ctx, built)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := containerd.Stop(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	}()
	config := filepath.Join(t.TempDir(), "plugin.yaml")
	if err := os.WriteFile(config, []byte("startDelays: [0s]\nlogFormat: json\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	start := func() *plugin.Process {
		p, err := plugin.Start(ctx, product, config, containerd.NRISocket())
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	p := start()
	pod, err := containerd.RunPod(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	web, err := pod.Start(ctx, cri.ContainerConfig{Name: "web", MiB: size, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer web.Close()

	r := &bundles{hooks: n.hooks, control: n.control, runtime: "runc"}
	n.run(t, r, "hooks-a", "hooks-bank")

	// has waits until the engine has each container once, as who told of it first does.
	has := func(want ...string) {
		t.Helper()
		within(t, fmt.Sprint("the engine has ", want), func() error {
			report, err := control.Ask(ctx, engine.RunDir)
			if err != nil {
				return err
			}
			var got []string
			for _, p := range report.Partitions {
				for _, c := range p.Containers {
					if c.Running {
						got = append(got, fmt.Sprint(c.Pod, "/", c.Name))
					}
				}
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				err = fmt.Errorf("it has %q", got)
			}
			return err
		})
	}
	has("hooks-bank/", "shop/web")
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	p = start()
	defer func() {
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(p.Log())
		}
	}()
	has("hooks-bank/", "shop/web")

	if err := pod.Remove(ctx); err != nil {
		t.Error(err)
	}
	has("hooks-bank/")
	r.stop(t, "hooks-a", true)
	n.clean(t)
	if err := partition.WaitFor(ctx); err != nil {
		t.Error(err)
	}
}
