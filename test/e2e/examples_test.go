package e2e_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/e2e/border"
	"github.com/selective-ksm/selective-ksm/test/e2e/manifest"
	"github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/missing"
	"github.com/selective-ksm/selective-ksm/test/pages"
)

const (
	examples = project + "/examples"
	// rendered are the examples for Kubernetes, as make renders them.
	rendered = build + "/kubernetes"
	// productImage is what make image makes.
	productImage = build + "/selective-ksm.tar"
	// containerdFile is where the examples have containerd's configuration.
	containerdFile = "/etc/containerd/config.toml"
	// pluginLog is where they have the log of a plugin that containerd launches.
	pluginLog = "/var/log/selective-ksm.log"
)

// exampleNode gives the examples the directories that they name, empty and for this
// test only. It starts containerd with the example's configuration after install has put
// there what is to be there too.
func exampleNode(t *testing.T, install func()) *node.Node {
	t.Helper()
	for _, dir := range []string{"/etc/containerd", "/etc/nri", "/opt/nri", "/run/nri"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("none", dir, "tmpfs", 0, "mode=0755"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	}
	copyFile(t, containerdFile, examples+"/containerd/config.toml")
	install()
	config := node.Built(build)
	config.File = containerdFile
	return startNode(t, config)
}

// containerd launches the plugin that the example's script has installed, with the
// example's configurations.
func TestContainerdExample(t *testing.T) {
	needPartitions(t)
	t.Cleanup(func() { os.Remove(pluginLog) })
	n := exampleNode(t, func() {
		if said, err := exec.CommandContext(deadline(t), examples+"/containerd/install", program).CombinedOutput(); err != nil {
			t.Fatalf("install: %v\n%s", err, said)
		}
	})
	guard := border.Watch()
	shop, bank := run(t, n, guard, "shop", web(1), worker(1)), run(t, n, guard, "bank", web(1), worker(1))
	for _, pod := range []tenant{shop, bank} {
		waitMerged(t, pod.containers[0], pod.containers[1])
		unchanged(t, pod.containers...)
	}
	stopGuard(t, guard)
	for _, pod := range []tenant{shop, bank} {
		if err := pod.Remove(deadline(t)); err != nil {
			t.Error(err)
		}
	}
	noPartitions(t)

	// The plugin's own configuration says where it logs, and how.
	said, err := os.ReadFile(pluginLog)
	if err != nil {
		t.Fatal(err)
	}
	wantIn(t, string(said), `"msg":"synchronized with the runtime"`, shop.containers[0].ID)
	dump, err := exec.CommandContext(deadline(t), node.Built(build).Tools+"/containerd", "--config", containerdFile, "config", "dump").Output()
	if err != nil {
		t.Fatal(err)
	}
	wantIn(t, string(dump), "plugin_registration_timeout = '10s'", "plugin_request_timeout = '2s'")
}

// daemon is the container of a DaemonSet.
type daemon struct {
	*node.Daemon
	set *manifest.DaemonSet
	// config is the directory of its ConfigMap.
	config string
}

// startDaemon starts the container of a DaemonSet, as the kubelet would, and waits until
// its startup probe says that it has started. change, if not nil, makes it another one.
func startDaemon(t *testing.T, n *node.Node, kustomization string, change func(*manifest.DaemonSet)) daemon {
	t.Helper()
	set, err := manifest.Read(filepath.Join(rendered, kustomization+".yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(set)
	}
	d := daemon{set: set}
	dirs := map[string]string{}
	for name, files := range set.ConfigMaps {
		d.config = t.TempDir()
		if err := manifest.WriteConfigMap(d.config, files); err != nil {
			t.Fatal(err)
		}
		dirs[name] = d.config
	}
	sandbox, err := set.Sandbox("daemon-" + kustomization)
	if err != nil {
		t.Fatal(err)
	}
	container, err := set.CRI(dirs)
	if err != nil {
		t.Fatal(err)
	}
	if d.Daemon, err = n.StartDaemon(deadline(t), sandbox, container); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(d.Log())
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := d.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	waitFor(t, "its startup probe", func() bool {
		status, _, err := d.Exec(deadline(t), set.StartupProbe.Exec.Command)
		return err == nil && status == 0
	})
	return d
}

// probe runs the other probes.
func (d daemon) probe(t *testing.T) {
	t.Helper()
	for _, p := range []manifest.Probe{d.set.ReadinessProbe, d.set.LivenessProbe} {
		if status, said, err := d.Exec(deadline(t), p.Exec.Command); err != nil || status != 0 {
			t.Errorf("probe %q: status %d, %v\n%s", p.Exec.Command, status, err, said)
		}
	}
}

// daemonNode is a node with the product's image, and without a plugin.
func daemonNode(t *testing.T) *node.Node {
	t.Helper()
	set, err := manifest.Read(rendered + "/base.yaml")
	if err != nil {
		missing.Skip(t, "not rendered: %v", err)
	}
	if _, err := os.Stat(productImage); err != nil {
		missing.Skip(t, "not built: %v", err)
	}
	n := exampleNode(t, func() {
		const dir = "/conf.d"
		if err := os.Mkdir(filepath.Dir(containerdFile)+dir, 0o755); err != nil {
			t.Fatal(err)
		}
		const file = dir + "/90-selective-ksm.toml"
		copyFile(t, filepath.Dir(containerdFile)+file, examples+"/containerd"+file)
	})
	if err := n.Import(deadline(t), productImage, set.Image); err != nil {
		t.Fatal(err)
	}
	return n
}

// user is one that is not root.
const user = 1000

// others are containers of users that are not root's, and of root's.
func others() []node.ContainerConfig {
	a, b := web(1), worker(1)
	b.User = user
	return []node.ContainerConfig{a, b}
}

// The DaemonSet's container, from the image that make image makes, with the mounts and
// capabilities of the manifest and no others, merges the containers of the node that it
// runs on.
func TestDaemonSet(t *testing.T) {
	needPartitions(t)
	n := daemonNode(t)
	var capabilities []string
	t.Run("base", func(t *testing.T) {
		d := startDaemon(t, n, "base", nil)
		capabilities = d.set.SecurityContext.Capabilities.Add
		d.probe(t)
		guard := border.Watch()
		shop, bank := run(t, n, guard, "shop", others()...), run(t, n, guard, "bank", others()...)
		for _, pod := range []tenant{shop, bank} {
			waitMerged(t, pod.containers[0], pod.containers[1])
		}
		if err := partition.WaitFor(deadline(t), partition.OfPod(shop.ID), partition.OfPod(bank.ID)); err != nil {
			t.Error(err)
		}

		// A ConfigMap that changes.
		if err := manifest.WriteConfigMap(d.config, map[string]string{"config.yaml": "partitionBy: container\n"}); err != nil {
			t.Fatal(err)
		}
		var each []string
		for _, c := range slices.Concat(shop.containers, bank.containers) {
			each = append(each, partition.OfContainer(c.ID))
		}
		if err := partition.WaitFor(deadline(t), each...); err != nil {
			t.Error(err)
		}
		for _, pod := range []tenant{shop, bank} {
			if together, _ := common(t, pod.containers[0], pod.containers[1]); together > 0 {
				t.Errorf("%s: %d pages are merged that may not be any more", pod.Name, together)
			}
			unchanged(t, pod.containers...)
		}
		d.probe(t)
		stopGuard(t, guard)
		for _, pod := range []tenant{shop, bank} {
			if err := pod.Remove(deadline(t)); err != nil {
				t.Error(err)
			}
		}
		noPartitions(t)
	})

	t.Run("metrics", func(t *testing.T) {
		d := startDaemon(t, n, "metrics", nil)
		if len(d.set.Ports) != 1 {
			t.Fatalf("ports are %v, want that of the metrics", d.set.Ports)
		}
		waitFor(t, "metrics", func() bool {
			r, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/metrics", d.set.Ports[0].ContainerPort))
			if err != nil {
				return false
			}
			defer r.Body.Close()
			text, err := io.ReadAll(r.Body)
			return err == nil && r.StatusCode == http.StatusOK && strings.Contains(string(text), "\nselective_ksm_")
		})
	})

	// An audit as a probe needs a capability more.
	for _, more := range [][]string{nil, {"SYS_ADMIN"}} {
		t.Run(fmt.Sprint("audit with ", more), func(t *testing.T) {
			d := startDaemon(t, n, "base", func(set *manifest.DaemonSet) {
				set.SecurityContext.Capabilities.Add = append(set.SecurityContext.Capabilities.Add, more...)
			})
			shop := run(t, n, nil, "shop", others()...)
			waitMerged(t, shop.containers[0], shop.containers[1])
			want := 0
			if more == nil {
				want = 3 // it could not look
			}
			status, said, err := d.Exec(deadline(t), []string{d.set.StartupProbe.Exec.Command[0], "audit"})
			if err != nil || int(status) != want {
				t.Errorf("status %d, %v, want %d\n%s", status, err, want, said)
			}
		})
	}

	// Each capability is needed.
	for _, capability := range capabilities {
		t.Run("without "+capability, func(t *testing.T) {
			d := startDaemon(t, n, "base", func(set *manifest.DaemonSet) {
				add := &set.SecurityContext.Capabilities.Add
				*add = slices.DeleteFunc(*add, func(other string) bool { return other == capability })
			})
			shop := run(t, n, nil, "shop", others()...)
			waitFor(t, "a refusal", func() bool { return strings.Contains(d.Log(), "permission denied") })
			if together, _ := common(t, shop.containers[0], shop.containers[1]); together > 0 {
				t.Errorf("%d pages are merged", together)
			}
			for line := range strings.Lines(d.Log()) {
				if strings.Contains(line, "permission denied") {
					t.Log(strings.TrimSpace(line))
				}
			}
		})
	}
}

// own is a container of an example that is merged with itself alone, and nobody one that
// is not merged, until it is asked for if it is on demand.
const own, nobody, onDemand = "itself", "nobody", "on demand"

// exampleTenants are whom the containers of the example pods are merged with, where the
// overlay by-group is.
var exampleTenants = map[string]string{
	"vault/web": own, "vault/keys": own,
	"web-blue/web": "web", "web-green/web": "web",
	"checkout/web": "checkout", "checkout/worker": "checkout", "checkout/keys": nobody, "checkout/batch": onDemand,
	"cache/cache": "cache", "cache/replica": "cache",
	"database/database": own,
}

// With the overlay by-group, the example pods are merged as their comments say.
func TestExamplePods(t *testing.T) {
	needPartitions(t)
	n := daemonNode(t)
	d := startDaemon(t, n, "by-group", nil)
	files, err := filepath.Glob(examples + "/kubernetes/pods/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var all []governed
	for _, file := range files {
		pods, err := manifest.ReadPods(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range pods {
			pod, err := n.RunPodWith(deadline(t), node.PodConfig{Name: p.Name, Namespace: p.Namespace, Annotations: p.Annotations})
			if err != nil {
				t.Fatal(err)
			}
			removeAfter(t, pod)
			for _, name := range p.Containers {
				c, err := pod.Start(deadline(t), node.ContainerConfig{
					Name: name, MiB: 8, Seed: 1, Repeat: true,
					// Such data is merged by the annotation only.
					Secret: p.Annotations["include-secrets.selective-ksm.dev"] == "true",
				})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { c.Close() })
				g := governed{Container: c}
				switch tenant := exampleTenants[g.name()]; tenant {
				case "":
					t.Fatalf("the test does not say whom %s is merged with", g.name())
				case own:
					g.tenant = g.name()
				case onDemand:
					g.onDemand = true
				case nobody:
				default:
					g.tenant = tenant
				}
				all = append(all, g)
			}
		}
	}
	if len(all) != len(exampleTenants) {
		t.Errorf("there are %d containers, and the test knows %d", len(all), len(exampleTenants))
	}
	settled := func(g governed) {
		t.Helper()
		waitFor(t, "a merge of "+g.name(), func() bool {
			a, b := g.halves(t)
			together, err := pages.Merged(a, b)
			return err == nil && together*100 >= len(a)*least
		})
	}
	for _, g := range all {
		if g.tenant != "" {
			settled(g)
		}
	}
	wantTenants(t, all)

	for i, g := range all {
		if g.onDemand {
			all[i].tenant = "checkout"
			if status, said, err := d.Exec(deadline(t), []string{"/selective-ksm", "merge"}); err != nil || status != 0 {
				t.Fatalf("merge: status %d, %v\n%s", status, err, said)
			}
			settled(g)
		}
	}
	wantTenants(t, all)
	if said := "annotation does not count"; strings.Contains(d.Log(), said) {
		t.Errorf("%s, for one of the examples", said)
	}
	for _, g := range all {
		unchanged(t, g.Container)
	}
}

// On an unpatched kernel, the overlay mainline has the first pod merged.
func TestDaemonSetMainline(t *testing.T) {
	if partition.Supported() || os.Getenv("SELECTIVE_KSM_VM") == "" {
		t.Skip("make test-kernel runs this in a VM, with an unpatched kernel")
	}
	n := daemonNode(t)
	d := startDaemon(t, n, "mainline", nil)
	d.probe(t)
	shop := run(t, n, nil, "shop", others()...)
	bank := run(t, n, nil, "bank", others()...)
	waitMerged(t, shop.containers[0], shop.containers[1])
	for _, c := range bank.containers {
		for _, other := range slices.Concat(shop.containers, bank.containers) {
			if together, _ := common(t, c, other); other != c && together > 0 {
				t.Errorf("%s/%s and %s/%s share %d pages", c.Pod.Name, c.Name, other.Pod.Name, other.Name, together)
			}
		}
		unchanged(t, c)
	}
	unchanged(t, shop.containers...)
}
