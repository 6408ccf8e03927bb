package plugin

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
)

func TestDescribe(t *testing.T) {
	pod := pod()
	pod.RuntimeHandler, pod.Labels = "kata", map[string]string{"app": "web"}
	pod.Annotations = map[string]string{
		"partition.selective-ksm.dev/container.name-c1": "container",
		"partition.selective-ksm.dev/pod":               "pod",
		"merge.selective-ksm.dev/pod":                   "on-demand",
		"merge.selective-ksm.dev":                       "off",
		"interval.selective-ksm.dev":                    "1m",
		"include-secrets.selective-ksm.dev/container.x": "true",
		"selective-ksm.dev/partition":                   "sksm-pod-0123456789abcdef012345",
	}
	c := ctr("c1", api.ContainerState_CONTAINER_RUNNING)
	// What is written at a container is the runtime's, or ours.
	c.Annotations = map[string]string{"include-secrets.selective-ksm.dev": "true"}
	s := describe(pod, c)
	want := map[string]string{config.AnnotationPartition: "container", config.AnnotationMerge: "on-demand", config.AnnotationInterval: "1m"}
	if !maps.Equal(s.container.Annotations, want) {
		t.Errorf("annotations are %v, want %v", s.container.Annotations, want)
	}
	if s.sandbox.Namespace != "shop" || s.sandbox.RuntimeHandler != "kata" || s.sandbox.Labels["app"] != "web" || !s.running ||
		s.container.HostPID || s.container.Privileged {
		t.Errorf("got %+v", s)
	}
	if s := describe(pod, ctr("c2", api.ContainerState_CONTAINER_CREATED)); s.container.Annotations[config.AnnotationPartition] != "pod" || s.running {
		t.Errorf("got %+v", s)
	}
}

func TestPrivileged(t *testing.T) {
	readOnly := &api.Mount{Destination: "/sys", Type: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}}
	writable := &api.Mount{Destination: "/sys", Type: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "rw"}}
	cgroup := &api.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Options: []string{"rw"}}
	volume := &api.Mount{Destination: "/sys", Source: "/sys", Type: "bind", Options: []string{"rbind", "ro"}}
	devices := func(d ...*api.LinuxDeviceCgroup) *api.LinuxResources { return &api.LinuxResources{Devices: d} }
	none := &api.LinuxDeviceCgroup{Allow: false, Access: "rwm"}
	null := &api.LinuxDeviceCgroup{Allow: true, Type: "c", Major: api.Int64(1), Minor: api.Int64(3), Access: "rwm"}
	nodes := &api.LinuxDeviceCgroup{Allow: true, Type: "c", Access: "m"}
	all := &api.LinuxDeviceCgroup{Allow: true, Access: "rwm"}
	for name, tc := range map[string]struct {
		mounts    []*api.Mount
		resources *api.LinuxResources
		want      bool
	}{
		"ordinary":                          {[]*api.Mount{readOnly, cgroup}, devices(none, null, nodes), false},
		"no resources":                      {[]*api.Mount{readOnly}, nil, false},
		"privileged":                        {[]*api.Mount{writable, cgroup}, devices(all), true},
		"privileged without host devices":   {[]*api.Mount{writable, cgroup}, devices(none, null), true},
		"privileged, a volume at /sys":      {[]*api.Mount{volume, cgroup}, devices(none, null), true},
		"all devices":                       {[]*api.Mount{readOnly}, devices(none, all), true},
		"two sysfs, one to be written to":   {[]*api.Mount{readOnly, writable}, nil, true},
		"a runtime that says nothing of it": {nil, nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			c := ctr("c1", 0)
			c.Mounts, c.Linux.Resources = tc.mounts, tc.resources
			if got := describe(pod(), c).container.Privileged; got != tc.want {
				t.Errorf("privileged: %v, want %v", got, tc.want)
			}
		})
	}
}

func TestHostPID(t *testing.T) {
	mount, own := &api.LinuxNamespace{Type: "mount"}, &api.LinuxNamespace{Type: "pid"}
	shared := &api.LinuxNamespace{Type: "pid", Path: "/proc/7/ns/pid"}
	type namespaces []*api.LinuxNamespace
	for name, tc := range map[string]struct {
		pod, ctr namespaces
		want     bool
	}{
		"own":                                    {namespaces{mount, own}, namespaces{mount, own}, false},
		"own, pod has none":                      {namespaces{mount}, namespaces{own, mount}, false},
		"pod's":                                  {namespaces{mount, own}, namespaces{mount, shared}, false},
		"machine's, by way of the pod's process": {namespaces{mount}, namespaces{mount, shared}, true},
		"none":                                   {namespaces{mount, own}, namespaces{mount}, true},
		"a pod that nothing is said":             {nil, namespaces{shared}, true},
	} {
		t.Run(name, func(t *testing.T) {
			p, c := pod(), ctr("c1", 0)
			p.Linux, c.Linux.Namespaces = &api.LinuxPodSandbox{Namespaces: tc.pod}, tc.ctr
			if got := describe(p, c).container.HostPID; got != tc.want {
				t.Errorf("machine's: %v, want %v", got, tc.want)
			}
		})
	}
}

// What became of a container is written to it, whatever that is.
func TestOutcome(t *testing.T) {
	dir := t.TempDir()
	c := configuration(t)
	r := startRuntime(t, dir, nil, nil)
	defer r.Stop()
	e := &recorder{optsIn: true}
	stop, log := start(t, dir, &c, e)
	defer stop()
	r.wait(t)
	log.Reset()

	host := ctr("host", 0, "sh")
	host.Linux.Namespaces = nil
	for _, tc := range []struct {
		ctr    *api.Container
		refuse error
		want   map[string]string
		level  logrus.Level
	}{
		{ctr("c1", 0, "sh"), nil, map[string]string{"selective-ksm.dev/partition": podOf, "selective-ksm.dev/interface": "sysfs"}, 0},
		{host, nil, map[string]string{
			"selective-ksm.dev/not-merged": "it sees the processes of the machine, and pods.hostPID of the configuration is false",
		}, logrus.InfoLevel},
		{ctr("c2", 0, "sh"), errors.New("no \xff room"), map[string]string{"selective-ksm.dev/not-merged": "no ? room"}, logrus.WarnLevel},
	} {
		e.add = tc.refuse
		if got := r.create(t, tc.ctr).GetAnnotations(); !maps.Equal(got, tc.want) {
			t.Errorf("%s: annotations are %v, want %v", tc.ctr.Id, got, tc.want)
		}
		if entry := log.LastEntry(); tc.level != 0 && (entry == nil || entry.Level != tc.level) {
			t.Errorf("%s: logged %v", tc.ctr.Id, entry)
		}
		log.Reset()
	}
}

// Each pod's bad annotation is told and counted once, however many containers it is
// for and however often they are looked at.
func TestBadAnnotations(t *testing.T) {
	log, hook := logtest.NewNullLogger()
	e := &recorder{optsIn: true}
	var counted []string
	p := newPlugin(Options{Engine: e, Log: log, Ignored: func(annotation string) { counted = append(counted, annotation) }})
	p.use(configuration(t), "")
	pod := pod()
	pod.Annotations = map[string]string{config.AnnotationInterval: "often", config.AnnotationPartition + "/container.name-c2": "namespace"}
	var all []*api.Container
	for _, id := range []string{"c1", "c2"} {
		c := ctr(id, api.ContainerState_CONTAINER_RUNNING)
		if _, _, err := p.CreateContainer(t.Context(), pod, c); err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	for range 2 {
		if _, err := p.Synchronize(t.Context(), []*api.PodSandbox{pod}, all); err != nil {
			t.Fatal(err)
		}
	}
	var told []string
	for _, entry := range hook.AllEntries() {
		if entry.Level == logrus.WarnLevel {
			told = append(told, fmt.Sprint(entry.Data["annotation"], " ", entry.Data["value"], " ", entry.Data["count"]))
		}
	}
	if want := []string{"interval.selective-ksm.dev often 1", "partition.selective-ksm.dev namespace 2"}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
	if want := []string{config.AnnotationInterval, config.AnnotationPartition}; !slices.Equal(counted, want) {
		t.Errorf("counted %q, want %q", counted, want)
	}
	if want := `partitionBy of the configuration is pod; interval.selective-ksm.dev: "often" does not count: `; !strings.HasPrefix(e.last[0].Because, want) {
		t.Errorf("because %q, want %q", e.last[0].Because, want)
	}
	if e.last[1].Partition != podOf || e.last[1].Interval != 0 {
		t.Errorf("got %+v", e.last[1])
	}
	// Nothing is kept of pods that are gone.
	if err := p.RemovePodSandbox(t.Context(), pod); err != nil || len(p.ignored) != 0 || len(p.subjects) != 0 {
		t.Errorf("kept %v, %v, %v", p.ignored, p.subjects, err)
	}
}

// The engine is told why a container is in no partition.
func TestLeftOutBecause(t *testing.T) {
	log, _ := logtest.NewNullLogger()
	e := &recorder{}
	p := newPlugin(Options{Engine: e, Log: log})
	p.use(config.Default(), "/nowhere")
	off := pod()
	off.Annotations = map[string]string{config.AnnotationMerge: "off"}
	for _, tc := range []struct {
		pod     *api.PodSandbox
		because string
		cause   engine.Cause
	}{
		{off, `merge.selective-ksm.dev is "off"`, ""},
		{pod(), "wrapper: stat /nowhere: no such file or directory", engine.CauseOptIn},
	} {
		if _, _, err := p.CreateContainer(t.Context(), tc.pod, ctr("c1", 0, "sh")); err != nil {
			t.Fatal(err)
		}
		if got := e.added; got.Partition != "" || got.Because != tc.because || got.Cause != tc.cause {
			t.Errorf("got %+v, want %q %q", got, tc.because, tc.cause)
		}
	}
}

// outcomes hears what the plugin says of each reload.
type outcomes chan string

func (o outcomes) Levels() []logrus.Level { return logrus.AllLevels }

func (o outcomes) Fire(e *logrus.Entry) error {
	if strings.HasPrefix(e.Message, "configuration is") {
		o <- fmt.Sprint(e.Message, ": ", e.Data["error"])
	}
	return nil
}

func (o outcomes) expect(t *testing.T, want string) {
	t.Helper()
	select {
	case got := <-o:
		if got != want {
			t.Errorf("said %s, want %s", got, want)
		}
	case <-time.After(30 * time.Second):
		t.Fatalf("did not say: %s", want)
	}
}

// A configuration is taken whole or not at all, and containers that are there already
// get what it gives them.
func TestReload(t *testing.T) {
	dir := t.TempDir()
	c := configuration(t)
	r := startRuntime(t, dir, []*api.PodSandbox{pod()}, []*api.Container{
		ctr("made", api.ContainerState_CONTAINER_CREATED, "sh"), ctr("run", api.ContainerState_CONTAINER_RUNNING, "sh"),
	})
	defer r.Stop()
	e := &recorder{optsIn: true}
	reload, loaded, unfit := make(chan struct{}), make(chan config.Config), make(chan error, 1)
	said := make(outcomes, 1)
	stop, _ := startWith(t, dir, Options{Config: &c, Engine: e, Reload: reload,
		Load: func() (config.Config, error) {
			select {
			case err := <-unfit:
				return config.Config{}, err
			case c := <-loaded:
				return c, nil
			}
		},
		Apply: func(c config.Config) error {
			e.record("apply %s", c.PartitionBy)
			if c.LogFile != "" {
				return errors.New("logFile: it is a directory")
			}
			return nil
		},
	}, said)
	defer stop()
	r.wait(t)
	r.create(t, ctr("new", 0, "sh"))
	if err := r.PostStartContainer(t.Context(), &api.PostStartContainerRequest{Pod: pod(), Container: ctr("made", 0)}); err != nil {
		t.Fatal(err)
	}
	expect(t, e, "reconcile [made] [run]", "add new to "+podOf, "start made")

	const stays = "configuration is not reloaded, and stays as it was: "
	narrow := c
	narrow.PartitionBy = config.ScopeContainer
	reload <- struct{}{}
	loaded <- narrow
	said.expect(t, "configuration is reloaded: <nil>")
	expect(t, e, "apply container", "reconcile [new] [made,run]")
	if e.last[1].Partition != "sksm-ctr-acba25512100f80b56fc3c" {
		t.Errorf("partition is %s", e.last[1].Partition)
	}

	reload <- struct{}{}
	unfit <- errors.New("line 1: no")
	said.expect(t, stays+"line 1: no")
	bad := c
	bad.LogFile = "/"
	bad.OptIn, bad.Wrapper = config.OptInWrapper, static(t)
	reload <- struct{}{}
	loaded <- bad
	said.expect(t, stays+"logFile: it is a directory")
	bad = c
	bad.OptIn, bad.Wrapper = config.OptInWrapper, "/nowhere"
	reload <- struct{}{}
	loaded <- bad
	said.expect(t, stays+"wrapper: stat /nowhere: no such file or directory")
	// What was refused has changed nothing.
	if left, err := os.ReadDir(own(dir)); err != nil || len(left) > 0 {
		t.Errorf("there are %v, %v", left, err)
	}
	r.create(t, ctr("newer", 0, "sh"))
	expect(t, e, "apply pod", "add newer to sksm-ctr-804f51f71254c4081e37e7")
}
