package e2e_test

import (
	"fmt"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/e2e/plugin"
)

// The runtime's own interface behaves with the plugin as it does without: the same
// calls have the same answers, and lead to the same containers, but for what the plugin
// is meant to change of them. What is seen of twice the same without the plugin is the
// same, too, or the comparison would mean nothing.
func TestConformance(t *testing.T) {
	n := sharedNode(t)
	without := calls(t, n)
	same(t, without, calls(t, n))
	for _, optIn := range []string{"auto", "wrapper"} {
		t.Run(optIn, func(t *testing.T) {
			p := startPlugin(t, n, "optIn: "+optIn+"\n"+often)
			same(t, without, calls(t, n))
			if len(p.Lines(func(l plugin.Line) bool { return l.Message == "merged" })) == 0 {
				t.Error("the plugin has merged nothing meanwhile")
			}
		})
	}
	t.Logf("compared %d lines", len(without))
}

// calls makes calls of the runtime's interface, and records what is seen.
func calls(t *testing.T, n *node.Node) []string {
	t.Helper()
	r := startRecord(t, n, node.PodConfig{Name: "calls", Labels: map[string]string{"app": "web"}, Annotations: map[string]string{"some": "thing"}})
	cri := n.CRI()
	r.sandbox("pod")

	main := &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: "main", Attempt: 1},
		Args:     []string{"-report", "-term=7"}, WorkingDir: "/some/where", Envs: []*runtime.KeyValue{{Key: "KEY", Value: []byte("value")}},
		Labels: map[string]string{"app": "web"}, Annotations: map[string]string{"some": "thing"},
		Mounts: []*runtime.Mount{{HostPath: "/etc", ContainerPath: "/host", Readonly: true}},
		Linux:  &runtime.LinuxContainerConfig{Resources: &runtime.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: 64 << 20}},
	}
	id, _ := r.create(main)
	r.status("created", id)
	r.start(id)
	r.answer("start again", second(cri.StartContainer(deadline(t), &runtime.StartContainerRequest{ContainerId: id})))
	r.waitReport("main")
	r.status("started", id)
	r.reported("said", r.output("main"))

	for _, args := range [][]string{{"/workload", "-report", "-exit=9"}, {"workload"}, {"/nowhere"}} {
		got, err := cri.ExecSync(deadline(t), &runtime.ExecSyncRequest{ContainerId: id, Cmd: args, Timeout: 60})
		if r.answer(fmt.Sprintf("exec %q", args), err) {
			r.line("exec %q: exit status %d, says %q", args, got.ExitCode, got.Stderr)
			r.reported("exec", string(got.Stdout))
		}
	}

	r.answer("update", second(cri.UpdateContainerResources(deadline(t), &runtime.UpdateContainerResourcesRequest{
		ContainerId: id, Linux: &runtime.LinuxContainerResources{CpuShares: 1024, MemoryLimitInBytes: 128 << 20},
	})))
	r.status("updated", id)
	r.answer("update wrongly", second(cri.UpdateContainerResources(deadline(t), &runtime.UpdateContainerResourcesRequest{
		ContainerId: id, Linux: &runtime.LinuxContainerResources{CpusetCpus: "4096"},
	})))
	stats, err := cri.ContainerStats(deadline(t), &runtime.ContainerStatsRequest{ContainerId: id})
	if r.answer("stats", err) {
		r.json("stats of", stats.Stats.Attributes)
	}

	r.stop(id)
	r.status("stopped", id)
	r.stop(id)
	r.answer("exec in a stopped one", second(cri.ExecSync(deadline(t), &runtime.ExecSyncRequest{ContainerId: id, Cmd: []string{"/workload"}})))
	r.remove(id)
	r.remove(id)
	r.answer("status of a removed one", second(cri.ContainerStatus(deadline(t), &runtime.ContainerStatusRequest{ContainerId: id})))

	// One that ends by itself, and one that is never started.
	id, _ = r.create(&runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: "job"}, Args: []string{"-report", "-exit=3"}})
	r.start(id)
	r.waitEnd(id)
	r.status("ended", id)
	r.reported("said", r.output("job"))
	id, _ = r.create(&runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: "never"}, Args: []string{"-report"}})
	r.status("never started", id)
	r.remove(id)
	// One that cannot be created, and one that is created twice.
	r.create(&runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: "job"}})
	r.create(&runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: "nobody"},
		Linux:    &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{RunAsUsername: "nobody"}},
	})

	// The pod ends with one that runs.
	id, _ = r.create(&runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: "last"}, Args: []string{"-report"}})
	r.start(id)
	r.waitReport("last")
	r.answer("stop pod", second(cri.StopPodSandbox(deadline(t), &runtime.StopPodSandboxRequest{PodSandboxId: r.pod.ID})))
	r.sandbox("stopped pod")
	r.waitEnd(id)
	r.status("of a stopped pod", id)
	r.answer("remove pod", second(cri.RemovePodSandbox(deadline(t), &runtime.RemovePodSandboxRequest{PodSandboxId: r.pod.ID})))
	r.answer("status of a removed pod", second(cri.PodSandboxStatus(deadline(t), &runtime.PodSandboxStatusRequest{PodSandboxId: r.pod.ID})))
	list, err := cri.ListContainers(deadline(t), &runtime.ListContainersRequest{})
	if r.answer("list", err) {
		r.line("%d containers are left", len(list.Containers))
	}
	return r.lines
}

// sandbox records what the runtime says of the pod.
func (r *record) sandbox(what string) {
	r.t.Helper()
	got, err := r.node.CRI().PodSandboxStatus(deadline(r.t), &runtime.PodSandboxStatusRequest{PodSandboxId: r.pod.ID})
	if !r.answer(what+": status", err) {
		return
	}
	s := got.Status
	r.json(what, map[string]any{
		"state": s.State.String(), "metadata": s.Metadata, "labels": s.Labels, "annotations": s.Annotations, "handler": s.RuntimeHandler,
		"linux": s.Linux, "network": s.Network,
	})
}

// second is a call's error.
func second[T any](_ T, err error) error { return err }
