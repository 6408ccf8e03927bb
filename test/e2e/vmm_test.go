package e2e_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selective-ksm/selective-ksm/test/e2e/border"
	"github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/missing"
	"github.com/selective-ksm/selective-ksm/test/pages"
)

const (
	qemu = "/usr/bin/qemu-system-x86_64"
	// guestMiB is a guest's memory, and imageMiB what is loaded into it, at imageAt.
	guestMiB, imageAt, imageMiB = 64, 16, 16
)

// vmmCommand is a VMM's with a guest that does nothing yet, into whose memory an image is
// loaded.
func vmmCommand(image string) []string {
	return []string{
		qemu, "-S", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg,tb-size=8", "-m", fmt.Sprint(guestMiB),
		"-device", fmt.Sprintf("loader,file=%s,addr=%#x,force-raw=on", image, imageAt<<20),
	}
}

// vmmImage makes the image: of pages that all differ.
func vmmImage(t *testing.T) (path string) {
	t.Helper()
	if _, err := exec.LookPath(qemu); err != nil {
		missing.Skip(t, "no VMM: %v", err)
	}
	content := make([]byte, imageMiB<<20)
	if _, err := rand.NewChaCha8([32]byte{1}).Read(content); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// guest is a VMM's process with its guest.
type guest struct {
	pod, name string
	pid       int
}

// memory returns the pages of the guest's memory, those of the image alone or all.
func (g guest) memory(t *testing.T, imageAlone bool) []pages.Page {
	t.Helper()
	start, found := anonymous(t, g.pid, guestMiB<<20)
	if !found {
		return nil
	}
	end := start + guestMiB<<20
	if imageAlone {
		start, end = start+imageAt<<20, start+(imageAt+imageMiB)<<20
	}
	memory, err := pages.Range(g.pid, start, end)
	if err != nil {
		t.Fatal(err)
	}
	return memory
}

// shared is how many merged pages the memory of two guests has in common.
func (g guest) shared(t *testing.T, other guest) int {
	t.Helper()
	n, err := pages.Merged(g.memory(t, false), other.memory(t, false))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// wantGuests waits until the guests of one pod share what they both hold, and fails the
// test if one in another pod shares anything with them. All hold the image.
func wantGuests(t *testing.T, first, second, other guest) {
	t.Helper()
	all := imageMiB << 20 / os.Getpagesize()
	poll(t, func(context.Context) string {
		if n := first.shared(t, second); n*100 < all*least {
			return fmt.Sprintf("%s and %s share %d of %d pages", first.name, second.name, n, all)
		}
		return ""
	})
	t.Logf("of the image's %d pages, two guests of one pod share %d", all, first.shared(t, second))
	var processes []border.Process
	for _, g := range []guest{first, second, other} {
		if n := len(g.memory(t, true)); n != all {
			t.Errorf("%s has %d pages of its image, of %d", g.name, n, all)
		}
		if n := g.shared(t, other); g != other && n != 0 {
			t.Errorf("%s and %s share %d pages", g.name, other.name, n)
		}
		processes = append(processes, border.Process{Tenant: g.pod, Name: g.name, PID: g.pid})
	}
	if crossings, err := border.Crossings(processes...); err != nil || len(crossings) > 0 {
		t.Errorf("%v crossings, %v", crossings, err)
	}
}

// anonymous finds a process's private anonymous mapping of a size in bytes.
func anonymous(t *testing.T, pid int, size uint64) (start uint64, found bool) {
	t.Helper()
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close()
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		var end uint64
		var rights string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &start, &end, &rights); err != nil {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
		if rights == "rw-p" && end-start == size && len(strings.Fields(lines.Text())) == 5 {
			return start, true
		}
	}
	return 0, false
}

// Guests' memory is merged as any other memory: two guests of one pod share what they both
// hold, and a third one in another pod shares nothing with them.
func TestVMM(t *testing.T) {
	t.Run("in containers", vmmInContainers)
	t.Run("in sandboxes", vmmInSandboxes)
}

// The VMMs are the containers' processes.
func vmmInContainers(t *testing.T) {
	n := sharedNode(t)
	image := vmmImage(t)
	startPlugin(t, n, often)
	one, other := startRecord(t, n, node.PodConfig{Name: "one"}), startRecord(t, n, node.PodConfig{Name: "other"})
	run := func(r *record, name string) guest {
		t.Helper()
		bind := func(from, to string) *runtime.Mount {
			return &runtime.Mount{HostPath: from, ContainerPath: to, Readonly: true}
		}
		id, created := r.create(&runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: name},
			Command:  vmmCommand("/image"),
			Mounts: []*runtime.Mount{
				bind("/usr", "/usr"), bind("/usr/lib", "/lib"), bind("/usr/lib64", "/lib64"), bind("/etc/alternatives", "/etc/alternatives"),
				bind(image, "/image"),
			},
		})
		if !created || !r.start(id) {
			t.Fatalf("%q", r.lines)
		}
		got, err := n.CRI().ContainerStatus(deadline(t), &runtime.ContainerStatusRequest{ContainerId: id, Verbose: true})
		if err != nil {
			t.Fatal(err)
		}
		if got.Status.State != runtime.ContainerState_CONTAINER_RUNNING {
			t.Fatalf("%s: %v\n%s", name, got.Status, r.output(name))
		}
		var info struct {
			PID int `json:"pid"`
		}
		if err := json.Unmarshal([]byte(got.Info["info"]), &info); err != nil {
			t.Fatal(err)
		}
		return guest{r.pod.Name, name, info.PID}
	}
	wantGuests(t, run(one, "guest-1"), run(one, "guest-2"), run(other, "guest-3"))
	for _, r := range []*record{one, other} {
		if err := r.pod.Remove(deadline(t)); err != nil {
			t.Error(err)
		}
	}
	noPartitions(t)
}

// The containers are in VMs, and the runtime, which is the test here, tells nothing of the
// VMMs in the cgroups of the pods' sandboxes.
func vmmInSandboxes(t *testing.T) {
	needPartitions(t)
	image := vmmImage(t)
	run := func(pod *api.PodSandbox, name string) guest {
		t.Helper()
		dir := filepath.Join("/sys/fs/cgroup", pod.Linux.CgroupsPath)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		group, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer group.Close()
		command := vmmCommand(image)
		cmd := exec.Command(command[0], command[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
			if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.EBUSY) {
				t.Error(err)
			}
		})
		return guest{pod.Name, name, cmd.Process.Pid}
	}
	var pods []*api.PodSandbox
	var containers []*api.Container
	for i, name := range []string{"one", "other"} {
		id := strings.Repeat(fmt.Sprint(i), 64)
		pod := &api.PodSandbox{
			Id: id, Name: name, Namespace: "default", RuntimeHandler: "vm",
			Linux: &api.LinuxPodSandbox{CgroupsPath: "/" + id, Namespaces: []*api.LinuxNamespace{{Type: "pid"}}},
		}
		ctr := &api.Container{
			Id: strings.Repeat(fmt.Sprint(i+2), 64), PodSandboxId: id, Name: "inside", State: api.ContainerState_CONTAINER_RUNNING,
			Mounts: []*api.Mount{{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro"}}},
		}
		ctr.Linux = &api.LinuxContainer{CgroupsPath: "/" + ctr.Id, Namespaces: []*api.LinuxNamespace{{Type: "pid"}}}
		pods, containers = append(pods, pod), append(containers, ctr)
	}
	first, second, third := run(pods[0], "guest-1"), run(pods[0], "guest-2"), run(pods[1], "guest-3")
	for i, g := range []guest{first, third} {
		// It is all that the runtime of a VM has to name.
		pods[i].Pid, containers[i].Pid = uint32(g.pid), uint32(g.pid)
	}

	dir := t.TempDir()
	a, err := adaptation.New("test", "v1",
		func(ctx context.Context, synchronize adaptation.SyncCB) error {
			_, err := synchronize(ctx, pods, containers)
			return err
		},
		func(context.Context, []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) { return nil, nil },
		adaptation.WithSocketPath(filepath.Join(dir, "nri.sock")),
		adaptation.WithPluginPath(filepath.Join(dir, "plugins")),
		adaptation.WithPluginConfigPath(filepath.Join(dir, "conf.d")),
	)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Stop)
	startPluginAt(t, filepath.Join(dir, "nri.sock"), often)
	wantGuests(t, first, second, third)
	if err := partition.WaitFor(deadline(t), partition.OfPod(pods[0].Id), partition.OfPod(pods[1].Id)); err != nil {
		t.Error(err)
	}
	for _, pod := range pods {
		if err := a.StopPodSandbox(t.Context(), &api.StopPodSandboxRequest{Pod: pod}); err != nil {
			t.Error(err)
		}
	}
	noPartitions(t)
	if n := first.shared(t, second); n != 0 {
		t.Errorf("%d pages are shared when the pods have ended", n)
	}
}
