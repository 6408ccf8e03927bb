package inventory

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/hooks/member"
)

// id is the id of a container, by a digit.
func id(digit string) string { return strings.Repeat(digit, 64) }

// Containers are found by the forms in which runtimes name their cgroups.
func TestByCgroup(t *testing.T) {
	const kubelet = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podu.slice"
	paths := []string{
		"kubepods/besteffort/pod1/" + id("a"),
		"kubepods/besteffort/pod1/" + id("b"),
		kubelet + "/cri-containerd-" + id("c") + ".scope",
		kubelet + "/crio-" + id("d") + ".scope",
		kubelet + "/crio-conmon-" + id("d") + ".scope",
		"machine.slice/libpod-" + id("e") + ".scope/container",
		"machine.slice/libpod-conmon-" + id("e") + ".scope",
		"machine.slice/machine-libpod_pod_" + id("9") + ".slice/libpod-" + id("f") + ".scope",
		"libpod_parent/" + id("8") + "/libpod-" + id("0"),
		"libpod_parent/libpod-" + id("7"),
		"docker/" + id("1") + "/kubelet/kubepods/pod2/" + id("2"), // that of a container in one
		"system.slice/ssh.service",
	}
	want := map[string]string{ // and the pods
		id("a"): "/kubepods/besteffort/pod1", id("b"): "/kubepods/besteffort/pod1",
		id("c"): "/" + kubelet, id("d"): "/" + kubelet, id("e"): "",
		id("f"): "/machine.slice/machine-libpod_pod_" + id("9") + ".slice",
		id("0"): "/libpod_parent/" + id("8"), id("7"): "", id("1"): "",
	}
	for name, files := range map[string][]string{"v2": {"cgroup.controllers"}, "v1": nil, "hybrid": nil} {
		root := t.TempDir()
		top := map[string]string{"v2": root, "v1": filepath.Join(root, "memory"), "hybrid": filepath.Join(root, "unified")}[name]
		for _, p := range paths {
			if err := os.MkdirAll(filepath.Join(top, p), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for _, f := range files {
			if err := os.WriteFile(filepath.Join(root, f), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		found, err := byCgroup(root)
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for id, c := range found {
			got[id] = c.Sandbox.ID
			if strings.HasPrefix(c.Sandbox.ID, "container ") {
				got[id] = ""
			}
			if c.ID != id || !slices.Contains(paths, strings.TrimPrefix(c.CgroupsPath, "/")) && id != c.ID || c.Name != id[:shownID] {
				t.Errorf("%s: %+v", name, c)
			}
		}
		if !maps.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
	if found, err := byCgroup(filepath.Join(t.TempDir(), "none")); err != nil || len(found) > 0 {
		t.Errorf("without cgroups: %v, %v", found, err)
	}
}

// The engine has names and partitions, containers whose cgroup is found by no name, and the
// VMMs of pods, by the ids of their sandboxes.
func TestTold(t *testing.T) {
	of := func(digit, name string) engine.Container {
		return engine.Container{ID: id(digit), Name: name, Pod: "web", Namespace: "shop", SandboxID: id("9"), CgroupsPath: "/" + name, Partition: "one"}
	}
	all := map[string]*Container{
		id("a"): {Container: engine.Container{ID: id("a")}, Sandbox: config.Sandbox{ID: "/pod"}},
		id("9"): {Container: engine.Container{ID: id("9"), Name: "pause"}, Pause: true},
		id("c"): {Container: engine.Container{ID: id("c")}},
	}
	told(all, []engine.PartitionStatus{{Name: "one", Containers: []engine.ContainerStatus{
		{Container: of("a", "server")}, {Container: of("b", "other")}, {Container: of("9", "vmm")},
	}}})
	for digit, name := range map[string]string{"a": "server", "b": "other", "9": "vmm"} {
		want := Container{Container: of(digit, name), Sandbox: config.Sandbox{ID: id("9"), Namespace: "shop"}}
		if got := all[id(digit)]; got == nil || !reflect.DeepEqual(*got, want) {
			t.Errorf("%s is %+v", name, got)
		}
	}
	if c := all[id("c")]; c.Partition != "" || len(all) != 4 {
		t.Errorf("one that the engine has not is %+v, of %d", c, len(all))
	}
}

// Where no engine runs, hooks have told of containers whose cgroup is found by no name.
func TestWritten(t *testing.T) {
	of := func(id string) member.Member {
		return member.Member{
			Container: engine.Container{ID: id, Name: "server", Pod: "web", Namespace: "shop", SandboxID: "pod", CgroupsPath: "/" + id, Partition: "one"},
			Facts:     &member.Facts{HostPID: true, Annotations: map[string]string{"a": "b"}},
		}
	}
	known := &Container{Container: engine.Container{ID: id("a")}}
	all := map[string]*Container{id("a"): known}
	written(all, []member.Member{of(id("a")), of("bundle"), of("ended")}, func(c *Container) bool { return c.ID != "ended" })
	want := of("bundle").Container
	want.Partition = "" // which an engine has, and none runs
	got := all["bundle"]
	if len(all) != 2 || all[id("a")] != known || got == nil || got.Container != want || !reflect.DeepEqual(got.Sandbox, config.Sandbox{ID: "pod", Namespace: "shop"}) ||
		!got.HostPID || got.Annotations["a"] != "b" {
		t.Errorf("found %+v, of %d", got, len(all))
	}
}

// Policy is that of the plugin.
func TestAssign(t *testing.T) {
	c := Container{Container: engine.Container{ID: id("a")}, Sandbox: config.Sandbox{ID: id("b"), Namespace: "shop"}}
	policy := config.Default()
	if a := c.Assign(policy); a.Partition != "sksm-pod-"+id("b")[:22] {
		t.Errorf("by pod: %+v", a)
	}
	c.HostPID = true
	if a := c.Assign(policy); a.Partition != "" || a.Reason == "" {
		t.Errorf("one that sees the machine's processes: %+v", a)
	}
	c.HostPID, c.Annotations = false, map[string]string{config.AnnotationMerge: "off"}
	if a := c.Assign(policy); a.Partition != "" {
		t.Errorf("one that does not want to: %+v", a)
	}
}

func TestProcesses(t *testing.T) {
	found, err := Processes(os.Getpid(), os.Getppid(), os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if len(found.Containers) != 2 {
		t.Fatalf("found %v", found.Containers)
	}
	for i, pid := range []int{os.Getpid(), os.Getppid()} {
		c := found.Containers[i]
		pids, err := c.Pids()
		if err != nil || !slices.Equal(pids, []int{pid}) || !strings.Contains(c.String(), fmt.Sprint(pid)) {
			t.Errorf("%s has processes %v, %v", c, pids, err)
		}
		if !seesMachine(pid) {
			t.Errorf("%s is taken to be in another pid namespace", c)
		}
	}
	a, b := found.Containers[0].Assign(config.Default()), found.Containers[1].Assign(config.Default())
	if a.Partition == b.Partition {
		t.Errorf("both are of %s", a.Partition)
	}
	if _, err := Processes(1 << 30); err == nil {
		t.Error("one that is not there is found")
	}
}
