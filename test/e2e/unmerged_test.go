package e2e_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/e2e/plugin"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

// ownDir is the plugin's directory, and wrapper what it mounts into containers.
const (
	ownDir  = "/run/selective-ksm"
	wrapper = ownDir + "/optin"
)

// complaints are the lines of a plugin about one container.
func complaints(container string) func(plugin.Line) bool {
	return func(l plugin.Line) bool {
		return l.Container == container && (l.Level == "warning" || l.Level == "error")
	}
}

// toldOnce fails the test unless the plugin says of a container that it is not
// merged, and says so once, while it merges others of its pod.
func toldOnce(t *testing.T, p *plugin.Process, c *node.Container, others ...*node.Container) {
	t.Helper()
	said, err := p.Wait(deadline(t), 1, complaints(c.Name))
	if err != nil {
		t.Fatalf("no complaint about %s: %v", c.Name, err)
	}
	t.Log(said.Text)
	if said.Pod != c.Pod.Name {
		t.Errorf("the complaint does not name the pod: %s", said.Text)
	}
	// Often enough for a second complaint.
	for range 2 {
		merged(t, p, time.Now(), others...)
	}
	if lines := p.Lines(complaints(c.Name)); len(lines) != 1 {
		t.Errorf("complained %d times: %v", len(lines), lines)
	}
	for _, other := range others {
		if together, _ := common(t, c, other); together != 0 {
			t.Errorf("%d pages of %s are merged with %s", together, c.Name, other.Name)
		}
	}
	unchanged(t, c)
	unchanged(t, others...)
}

// onOptIn is a seccomp profile with an action for prctl(PR_SET_MEMORY_MERGE).
func onOptIn(t *testing.T, action string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "profile.json")
	profile := `{
		"defaultAction": "SCMP_ACT_ALLOW",
		"syscalls": [{
			"names": ["prctl"],
			"action": "` + action + `",
			"args": [{"index": 0, "value": 67, "op": "SCMP_CMP_EQ"}]
		}]
	}`
	if err := os.WriteFile(path, []byte(profile), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// wrapped merges again and again, and opts containers in by the wrapper, on any
// kernel.
const wrapped = "optIn: wrapper\n" + often

// A kernel that makes memory mergeable from outside leaves a container as it is, and
// does not ask it: one is merged that would be killed for opting in.
func TestNothingOfContainerChanged(t *testing.T) {
	n := sharedNode(t)
	if !partition.Binds() {
		missing.Skip(t, "this kernel does not make memory mergeable from outside")
	}
	p := startPlugin(t, n, often)
	shop := run(t, n, nil, "shop", web(1),
		node.ContainerConfig{Name: "mined", MiB: dataMiB, Seed: 1, SeccompProfile: onOptIn(t, "SCMP_ACT_KILL_PROCESS")})
	for _, c := range shop.containers {
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", c.PID))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(mounts), "/.selective-ksm") {
			t.Errorf("%s has a mount of ours:\n%s", c.Name, mounts)
		}
	}
	merged(t, p, shop.ready(), shop.containers...)
	wantMerged(t, shop.containers[0], shop.containers[1])
	unchanged(t, shop.containers...)
}

// A container whose memory cannot be merged runs all the same: one that is
// refused the opt-in, and one that would be killed for it. The runtime's own
// seccomp profile does neither.
func TestOptInRefused(t *testing.T) {
	n := sharedNode(t)
	p := startPlugin(t, n, wrapped)
	shop := run(t, n, nil, "shop",
		node.ContainerConfig{Name: "web", MiB: dataMiB, Seed: 1, SeccompProfile: node.RuntimeDefault},
		node.ContainerConfig{Name: "worker", MiB: dataMiB, Seed: 1, SeccompProfile: node.RuntimeDefault},
		node.ContainerConfig{Name: "sealed", MiB: dataMiB, Seed: 1, SeccompProfile: onOptIn(t, "SCMP_ACT_ERRNO")},
		node.ContainerConfig{Name: "mined", MiB: dataMiB, Seed: 1, SeccompProfile: onOptIn(t, "SCMP_ACT_KILL_PROCESS")})
	open, sealed, mined := shop.containers[:2], shop.containers[2], shop.containers[3]
	toldOnce(t, p, sealed, open...)
	toldOnce(t, p, mined, open...)
	wantMerged(t, open[0], open[1])
}

// Containers do not depend on the program's file, as soon as the plugin runs.
func TestProgramRemoved(t *testing.T) {
	n := sharedNode(t)
	gone := filepath.Join(t.TempDir(), "selective-ksm")
	copyFile(t, gone, program)
	p, err := plugin.Start(deadline(t), gone, configFile(t, wrapped), n.NRISocket())
	if err != nil {
		t.Fatal(err)
	}
	stopAfter(t, p)
	config := web(1)
	// The runtime has been told of a file to mount, and has not mounted it yet.
	config.Created = func() error { return os.Remove(gone) }
	shop := run(t, n, nil, "shop", config, worker(1))
	merged(t, p, shop.ready(), shop.containers...)
	wantMerged(t, shop.containers[0], shop.containers[1])
	unchanged(t, shop.containers...)
}

func copyFile(t *testing.T, to, from string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

// With the wrapper taken away, containers run without it.
func TestWrapperRemoved(t *testing.T) {
	n := sharedNode(t)
	p := startPlugin(t, n, wrapped)
	bare := node.ContainerConfig{Name: "bare", MiB: dataMiB, Seed: 1}
	shop := run(t, n, nil, "shop", web(1), worker(1))
	if err := os.Remove(wrapper); err != nil {
		t.Fatal(err)
	}
	c, err := shop.Start(deadline(t), bare)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	toldOnce(t, p, c, shop.containers...)
}

// Where nothing can be executed from the plugin's directory, as from /run of many
// a machine, containers can execute the wrapper.
func TestWrapperOnNoexec(t *testing.T) {
	n := sharedNode(t)
	if err := os.MkdirAll(ownDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", ownDir, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(ownDir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	p := startPlugin(t, n, wrapped)
	shop := run(t, n, nil, "shop", web(1), worker(1))
	merged(t, p, shop.ready(), shop.containers...)
	wantMerged(t, shop.containers[0], shop.containers[1])
	unchanged(t, shop.containers...)
}

// A container whose merge the kernel refuses, as it is bound to a partition that
// is not ours, runs on.
func TestMergeRefused(t *testing.T) {
	n := sharedNode(t)
	p := startPlugin(t, n, "optIn: wrapper\n"+never)
	shop := run(t, n, nil, "shop", web(1), worker(1), node.ContainerConfig{Name: "taken", MiB: dataMiB, Seed: 1})
	others, taken := shop.containers[:2], shop.containers[2]
	const elsewhere = "selective-ksm-test"
	if err := partition.Add(elsewhere); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := partition.Remove(elsewhere); err != nil {
			t.Error(err)
		}
	})
	if err := partition.Merge(elsewhere, taken.PID, taken.Hello.Start, taken.Hello.End); err != nil {
		t.Fatal(err)
	}
	p = replace(t, n, p, wrapped)
	toldOnce(t, p, taken, others...)
	wantMerged(t, others[0], others[1])
	if err := shop.Remove(deadline(t)); err != nil {
		t.Error(err)
	}
	// What is not ours stays.
	if err := partition.WaitFor(deadline(t), elsewhere); err != nil {
		t.Error(err)
	}
}
