package hooks

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
)

const (
	id      = "f80f5d9722bb0e4ac57e0ad2b5f96e9dc1fa0ab40cfab20ac6ee2d6b7bd5ac3d"
	sandbox = "c1f257a4f610c73091f51f0e4ac57e0ad2b5f96e9dc1fa0ab40cfab20ac6ee2d"
	pid     = 4711
)

// fakeMachine has one process, with the lines of its cgroup file, and is in cgroups.
func fakeMachine(t *testing.T, lines string, cgroups ...string) machine {
	t.Helper()
	m := machine{proc: t.TempDir(), cgroups: t.TempDir()}
	process := filepath.Join(m.proc, strconv.Itoa(pid))
	write(t, filepath.Join(process, "cgroup"), lines)
	write(t, filepath.Join(process, "exe"), "")
	write(t, filepath.Join(process, "ns/pid"), "")
	write(t, filepath.Join(m.proc, "self/ns/pid"), "")
	for _, c := range cgroups {
		for dir := filepath.Dir(c); dir != "."; dir = filepath.Dir(dir) {
			write(t, filepath.Join(m.cgroups, dir, "cgroup.procs"), "")
		}
		write(t, filepath.Join(m.cgroups, c, "cgroup.procs"), fmt.Sprintln(pid))
	}
	if strings.HasPrefix(lines, "0::") {
		write(t, filepath.Join(m.cgroups, "cgroup.controllers"), "")
	}
	return m
}

// ordinary is the configuration of a container that has nothing of the machine's.
const ordinary = `{"ociVersion":"1.0.2","mounts":[{"destination":"/sys","type":"sysfs","source":"sysfs","options":["nosuid","ro"]}],
	"linux":{"resources":{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":3,"access":"rwm"}]}}}`

// bundleOf makes a bundle, in a directory of the container's id as CRI-O has it.
func bundleOf(t *testing.T, root, id, config string) string {
	t.Helper()
	bundle := filepath.Join(root, id, "userdata")
	write(t, filepath.Join(bundle, "config.json"), config)
	return bundle
}

func write(t *testing.T, path, content string) {
	t.Helper()
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, []byte(content), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestContainer(t *testing.T) {
	policy := config.Default()
	for name, tc := range map[string]struct {
		lines       string
		cgroup      string // the directory that the process is in
		annotations map[string]string
		want        engine.Container
	}{
		"plain": {
			lines: "0::/" + id + "\n", cgroup: id,
			want: engine.Container{SandboxID: id, CgroupsPath: "/" + id, Partition: "sksm-pod-" + id[:22]},
		},
		"podman on systemd, with crun": {
			lines: "0::/machine.slice/libpod-" + id + ".scope/container\n", cgroup: "machine.slice/libpod-" + id + ".scope/container",
			want: engine.Container{
				SandboxID: id, CgroupsPath: "/machine.slice/libpod-" + id + ".scope", Partition: "sksm-pod-" + id[:22],
			},
		},
		"CRI-O": {
			lines:  "0::/kubepods.slice/kubepods-pod1.slice/crio-" + id + ".scope\n",
			cgroup: "kubepods.slice/kubepods-pod1.slice/crio-" + id + ".scope",
			annotations: map[string]string{
				"io.kubernetes.cri-o.SandboxID": sandbox, "io.kubernetes.cri-o.ContainerType": "container",
				"io.kubernetes.pod.namespace": "default", "io.kubernetes.pod.name": "shop", "io.kubernetes.container.name": "web",
			},
			want: engine.Container{
				Name: "web", Pod: "shop", Namespace: "default", SandboxID: sandbox,
				CgroupsPath: "/kubepods.slice/kubepods-pod1.slice/crio-" + id + ".scope", Partition: "sksm-pod-" + sandbox[:22],
			},
		},
		"own annotations": {
			lines: "0::/" + id + "\n", cgroup: id,
			annotations: map[string]string{
				"io.kubernetes.cri-o.SandboxID": sandbox, "io.kubernetes.container.name": "web",
				"partition.selective-ksm.dev":                 "pod",
				"partition.selective-ksm.dev/container.web":   "container",
				"partition.selective-ksm.dev/container.other": "pod",
				"merge.selective-ksm.dev/pod":                 "on-demand",
				"interval.selective-ksm.dev":                  "90s",
				"include-secrets.selective-ksm.dev":           "true",
			},
			want: engine.Container{
				Name: "web", SandboxID: sandbox, CgroupsPath: "/" + id, Partition: "sksm-ctr-" + id[:22],
				OnDemand: true, Interval: 90 * time.Second, Secrets: true,
			},
		},
		"containerd on cgroup v1": {
			lines:  "9:name=systemd:/\n4:memory:/kubepods/pod1/" + id + "\n0::/\n",
			cgroup: "memory/kubepods/pod1/" + id,
			annotations: map[string]string{
				"io.kubernetes.cri.sandbox-id": sandbox, "io.kubernetes.cri.container-type": "container",
				"io.kubernetes.cri.sandbox-namespace": "default", "io.kubernetes.cri.sandbox-name": "shop",
				"io.kubernetes.cri.container-name": "web",
			},
			want: engine.Container{
				Name: "web", Pod: "shop", Namespace: "default", SandboxID: sandbox,
				CgroupsPath: "/kubepods/pod1/" + id, Partition: "sksm-pod-" + sandbox[:22],
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			tc.want.ID = id
			s := specs.State{ID: id, Pid: pid, Annotations: tc.annotations, Bundle: bundleOf(t, t.TempDir(), id, ordinary)}
			c, err := placedOn(fakeMachine(t, tc.lines, tc.cgroup), s, policy)
			tc.want.Because = c.Because
			if err != nil || c != tc.want || c.Because == "" {
				t.Errorf("got\n\t%+v, %v\nwant\n\t%+v", c, err, tc.want)
			}
		})
	}
}

// placedOn is what a hook makes of a state.
func placedOn(m machine, s specs.State, policy config.Config) (engine.Container, error) {
	c, facts, err := m.container(s, policy.Pods)
	if err != nil {
		return c, err
	}
	return assign(policy, c, facts)
}

func TestContainerRefused(t *testing.T) {
	own := "0::/" + id + "\n"
	for name, tc := range map[string]struct {
		lines       string
		pid         int
		annotations map[string]string
		want        string
	}{
		"dead":           {own, 4712, nil, "no such file or directory"},
		"other cgroup":   {"0::/system.slice/sshd.service\n", pid, nil, "process 4711 is in no cgroup that is named after the container"},
		"root":           {"0::/\n", pid, nil, "process 4711 is in no cgroup that is named after the container"},
		"outside":        {"0::/../" + id + "\n", pid, nil, "process 4711 is in no cgroup that is named after the container"},
		"part of a name": {"0::/session-" + id + ".scope\n", pid, nil, "process 4711 is in no cgroup that is named after the container"},
		"not a member":   {"0::/libpod-" + id + "\n", pid, nil, "process 4711 is in no cgroup that is named after the container"},
		"two runtimes": {own, pid, map[string]string{crio.sandbox: sandbox, containerd.sandbox: id},
			"annotations io.kubernetes.cri-o.SandboxID and io.kubernetes.cri.sandbox-id are both there, of which only one can be the runtime's"},
		"off": {own, pid, map[string]string{"merge.selective-ksm.dev": "off"}, `merge.selective-ksm.dev is "off"`},
		"system's": {own, pid, map[string]string{crio.sandbox: sandbox, crio.namespace: "kube-system"},
			`pods.namespaces.exclude of the configuration has its namespace "kube-system"`},
		"bad pod": {own, pid, map[string]string{crio.sandbox: "a/b\n"},
			`annotation io.kubernetes.cri-o.SandboxID: "a/b\n" is not the id of a pod`},
	} {
		t.Run(name, func(t *testing.T) {
			s := specs.State{ID: id, Pid: tc.pid, Annotations: tc.annotations, Bundle: bundleOf(t, t.TempDir(), id, ordinary)}
			c, err := placedOn(fakeMachine(t, tc.lines, id), s, config.Default())
			if err == nil || !strings.HasSuffix(err.Error(), tc.want) {
				t.Errorf("got %+v, and error\n\t%v\nwant\n\t%s", c, err, tc.want)
			}
		})
	}
	_, err := podOf(specs.State{ID: id, Annotations: map[string]string{crio.sandbox: sandbox, crio.kind: "sandbox"}})
	if !errors.Is(err, errNotOurs) {
		t.Errorf("of a sandbox: %v", err)
	}
}
