package plugin

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/selective-ksm/selective-ksm/config"
)

// A VMM is of the partition of the containers that are in it, as long as that is one.
func TestVMM(t *testing.T) {
	log, _ := logtest.NewNullLogger()
	e := &recorder{optsIn: true}
	p := newPlugin(Options{Engine: e, Log: log})
	c := config.Default()
	p.use(c, "")
	const vmm = 7 // the process
	pod := pod()
	pod.Pid = vmm
	pod.Linux = &api.LinuxPodSandbox{CgroupsPath: "/k8s.io/" + podID}
	pod.Annotations = map[string]string{config.AnnotationPartition + "/container.name-vm-alone": "container"}
	create := func(id string) *api.Container {
		t.Helper()
		c := ctr(id, api.ContainerState_CONTAINER_CREATED, "sh")
		if _, _, err := p.CreateContainer(t.Context(), pod, c); err != nil {
			t.Fatal(err)
		}
		return c
	}
	start := func(c *api.Container) {
		t.Helper()
		c.Pid = 8
		if strings.HasPrefix(c.Id, "vm-") {
			c.Pid = vmm
		}
		if err := p.PostStartContainer(t.Context(), pod, c); err != nil {
			t.Fatal(err)
		}
	}
	stop := func(c *api.Container) {
		t.Helper()
		if _, err := p.StopContainer(t.Context(), pod, c); err != nil {
			t.Fatal(err)
		}
	}
	joined, left := "add "+podID+" to "+podOf, "leave out "+podID
	started, stopped := "start "+podID, "stop "+podID

	one := create("vm-one")
	expect(t, e, "add vm-one to "+podOf)
	start(one)
	expect(t, e, joined, started, "start vm-one")
	two := create("vm-two")
	expect(t, e, "add vm-two to "+podOf, joined, started)
	start(two)
	expect(t, e, joined, started, "start vm-two")
	stop(two)
	expect(t, e, "stop vm-two", joined, started)

	// The runtime tells all of it again.
	one.State = api.ContainerState_CONTAINER_RUNNING
	synchronize := func(containers ...*api.Container) {
		t.Helper()
		if _, err := p.Synchronize(t.Context(), []*api.PodSandbox{pod}, containers); err != nil {
			t.Fatal(err)
		}
	}
	synchronize(one)
	expect(t, e, "reconcile [] [vm-one,"+podID+"]")

	// One that is merged with itself alone is in it, too.
	alone := create("vm-alone")
	expect(t, e, "add vm-alone to sksm-ctr-0381d5769e883d5b6b9ee3", left, started)
	// What it held may be there when it has ended.
	stop(alone)
	expect(t, e, "stop vm-alone", left, started)
	stop(one)
	expect(t, e, "stop vm-one", stopped)
	if err := p.RemovePodSandbox(t.Context(), pod); err != nil || len(p.vmms)+len(p.guests)+len(p.subjects) != 0 {
		t.Errorf("kept %v, %v, %v, %v", p.vmms, p.guests, p.subjects, err)
	}
	expect(t, e, "stop sandbox "+podID)

	// So may what one held that has ended before the next was made, whether that is told
	// or not.
	for name, end := range map[string]func(*api.Container){"told": stop, "not told": func(*api.Container) { synchronize() }} {
		alone := create("vm-alone")
		start(alone)
		end(alone)
		one := create("vm-one")
		e.took()
		start(one)
		if got := e.took(); !slices.Contains(got, left) {
			t.Errorf("%s: engine was told %q", name, got)
		}
		if err := p.StopPodSandbox(t.Context(), pod); err != nil {
			t.Fatal(err)
		}
		e.took()
	}

	// Another policy is asked of all, if all are there still.
	reload := func(scope config.Scope) {
		t.Helper()
		p.Load = func() (config.Config, error) {
			c := config.Default()
			c.PartitionBy = scope
			return c, nil
		}
		p.Apply = func(config.Config) error { return nil }
		p.change(func(s *state) { s.synchronized = true })
		if err := p.reload(); err != nil {
			t.Fatal(err)
		}
	}
	one = create("vm-one")
	start(one)
	e.took()
	reload(config.ScopeNamespace)
	expect(t, e, "reconcile [] [vm-one,"+podID+"]")
	two = create("vm-two")
	start(two)
	stop(two)
	e.took()
	reload(config.ScopePod)
	expect(t, e, "reconcile [] [vm-one,not "+podID+"]")
	stop(one)
	if err := p.StopPodSandbox(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	e.took()

	// Containers that are not in a VM have none, nor has a pod whose cgroup may be that
	// of others.
	start(create("ordinary"))
	expect(t, e, "add ordinary to "+podOf, "start ordinary")
	synchronize(ctr("ordinary", api.ContainerState_CONTAINER_RUNNING, "sh"))
	expect(t, e, "reconcile [] [ordinary]")
	synchronize()
	expect(t, e, "reconcile [] []")
	pod.Linux.CgroupsPath = "/k8s.io"
	start(create("vm-one"))
	expect(t, e, "add vm-one to "+podOf, left, started, "start vm-one")
}
