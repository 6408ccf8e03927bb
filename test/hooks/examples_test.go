package hooks

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

const examples = "../../examples/hooks"

// example is a file of the examples, with other paths in it.
func example(t *testing.T, name string, paths ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(examples, name))
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	for i := 0; i < len(paths); i += 2 {
		if !strings.Contains(text, paths[i]) {
			t.Fatalf("%s does not have %s", name, paths[i])
		}
		text = strings.ReplaceAll(text, paths[i], paths[i+1])
	}
	return text
}

// Podman that is set up as the examples say has the containers of a pod merged, and its infra
// container is of that pod.
func TestPodmanExamples(t *testing.T) {
	n := newNode(t)
	if _, err := exec.LookPath("podman"); err != nil {
		missing.Skip(t, "%v", err)
	}
	n.daemon(t)
	dir := t.TempDir()
	put := func(name, content string, mode os.FileMode) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const runtime = "runc-selective-ksm"
	script := put(runtime, example(t, runtime, "/usr/local/bin/selective-ksm", product), 0o755)
	config := example(t, "containers.conf.d/90-selective-ksm.conf",
		"/usr/share/containers/oci/hooks.d", n.hooks, "/etc/containers/oci/hooks.d", dir, "/usr/local/bin/"+runtime, script)
	if n.mainline {
		config += "\n[containers]\ndefault_ulimits = [\"nofile=20000:20000\", \"nproc=4096:4096\"]\n"
	}
	t.Setenv("CONTAINERS_CONF", put("containers.conf", config, 0o644))
	if unknown := podmanDoesNotKnow(t); unknown != "" {
		t.Errorf("podman does not know %s", unknown)
	}

	p := &podman{control: n.control, runtime: runtime, native: n.mainline}
	image := filepath.Join(dir, "pause.tar")
	command(t, "tar", "-C", filepath.Dir(workload), "-cf", image, filepath.Base(workload))
	const pause = "localhost/hooks-pause:1"
	p.run(t, "import", image, pause)
	t.Cleanup(func() { p.run(t, "rmi", "--force", pause) })
	const pod = "hooks-shop"
	// Podman 4.3 lets nobody open a device in the cgroup that it makes for a pod, where there
	// are cgroups v2 and no systemd: hence share-parent.
	p.run(t, "pod", "create", "--name", pod, "--infra-image", pause, "--infra-command", "/workload",
		"--network", "host", "--share", "ipc,uts", "--share-parent=false")
	t.Cleanup(func() { p.run(t, "pod", "rm", "--force", "--time", "1", "--ignore", pod) })
	p.run(t, "pod", "start", pod)
	a := n.run(t, p, "hooks-a", pod)
	b := n.run(t, p, "hooks-b", pod)
	merge(t, a, b)
	a.check(t)
	b.check(t)

	report, err := control.Ask(t.Context(), engine.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Partitions) != 1 || len(report.Partitions[0].Containers) != 3 {
		t.Errorf("the pod with its infra container is %+v", report.Partitions)
	}
	p.run(t, "pod", "stop", "--time", "10", pod)
	p.run(t, "pod", "rm", "--force", pod)
	n.clean(t)
}

// CRI-O's example is TOML, and sets the keys that it is to set. Nobody reads it here but podman,
// which knows none of them, and says so.
func TestCRIOExample(t *testing.T) {
	if os.Getuid() != 0 {
		missing.Skip(t, "not root")
	}
	if _, err := exec.LookPath("podman"); err != nil {
		missing.Skip(t, "%v", err)
	}
	path := filepath.Join(t.TempDir(), "crio.conf")
	if err := os.WriteFile(path, []byte(example(t, "crio.conf.d/90-selective-ksm.conf")), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CONTAINERS_CONF", path)
	const runtime = `\"crio.runtime.runtimes.runc-selective-ksm`
	const want = `[\"crio.runtime\" \"crio.runtime.hooks_dir\" ` +
		runtime + `\" ` + runtime + `.runtime_path\" ` + runtime + `.runtime_type\" ` + runtime + `.runtime_root\"]`
	if got := podmanDoesNotKnow(t); got != want {
		t.Errorf("it sets %s, want %s", got, want)
	}
}

// podmanDoesNotKnow is what podman says of the configuration's keys that it does not know.
func podmanDoesNotKnow(t *testing.T) string {
	t.Helper()
	said := command(t, "podman", "--log-level", "debug", "info")
	if m := regexp.MustCompile(`Failed to decode the keys (\[.*\]) from`).FindStringSubmatch(said); m != nil {
		return m[1]
	}
	return ""
}
