package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
)

// recorder is an engine that writes down what it is told.
type recorder struct {
	mu    sync.Mutex
	calls []string
	add   error
	// optsIn is that the engine needs no wrapper.
	optsIn bool
	last   []engine.Container // of Reconcile
	added  engine.Container   // of Add
}

func (r *recorder) record(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, fmt.Sprintf(format, args...))
}

func (r *recorder) took() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	calls := r.calls
	r.calls = nil
	return calls
}

func (r *recorder) Add(ctx context.Context, c engine.Container) error {
	if _, ok := ctx.Deadline(); !ok {
		r.record("no deadline")
	}
	r.mu.Lock()
	r.added = c
	r.mu.Unlock()
	if c.Partition == "" {
		r.record("leave out %s", c.ID)
		return nil
	}
	r.record("add %s to %s", c.ID, c.Partition)
	return r.add
}

func (r *recorder) OptsIn() bool          { return r.optsIn }
func (r *recorder) Start(id string)       { r.record("start %s", id) }
func (r *recorder) Stop(id string)        { r.record("stop %s", id) }
func (r *recorder) StopSandbox(id string) { r.record("stop sandbox %s", id) }

func (r *recorder) Reconcile(created, running []engine.Container) error {
	ids := func(containers []engine.Container) string {
		var s []string
		for _, c := range containers {
			if c.Partition == "" {
				c.ID = "not " + c.ID
			}
			s = append(s, c.ID)
		}
		return strings.Join(s, ",")
	}
	r.record("reconcile [%s] [%s]", ids(created), ids(running))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = running
	return nil
}

// The test binary is a plugin when a runtime launches it.
func TestMain(m *testing.M) {
	if Launched() {
		log, _ := logtest.NewNullLogger()
		if err := Run(context.Background(), Options{
			// The runtime gives it no environment.
			Apply: func(config.Config) error { return nil }, Dir: own(filepath.Dir(os.Args[0])), Engine: &recorder{}, Log: log,
		}); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	quiet := logrus.New()
	quiet.SetLevel(logrus.FatalLevel)
	nrilog.Set(debugLog{quiet})
	os.Exit(m.Run())
}

// configuration is one with a wrapper that could be given to containers.
func configuration(t *testing.T) config.Config {
	t.Helper()
	c := config.Default()
	c.Wrapper = static(t)
	return c
}

// own is the plugin's directory in a test's.
func own(dir string) string { return filepath.Join(dir, "own") }

// copied is the wrapper that containers get.
func copied(dir string) string { return filepath.Join(own(dir), "optin") }

const (
	podID = "aaaabbbbccccddddeeeeffff0000111122223333444455556666777788889999"
	podOf = "sksm-pod-aaaabbbbccccddddeeeeff"
)

func pod() *api.PodSandbox {
	return &api.PodSandbox{Id: podID, Name: "web", Namespace: "shop"}
}

func ctr(id string, state api.ContainerState, args ...string) *api.Container {
	return &api.Container{
		Id: id, PodSandboxId: podID, Name: "name-" + id, State: state, Args: args,
		Mounts: []*api.Mount{{Destination: "/sys", Type: "sysfs", Options: []string{"nosuid", "ro"}}},
		Linux: &api.LinuxContainer{
			CgroupsPath: "/k8s.io/" + id, Namespaces: []*api.LinuxNamespace{{Type: "mount"}, {Type: "pid"}},
		},
	}
}

// runtime is the runtime's half of NRI, as containerd has it.
type runtime struct {
	*adaptation.Adaptation
	synchronized chan error
}

func startRuntime(t testing.TB, dir string, pods []*api.PodSandbox, containers []*api.Container) *runtime {
	t.Helper()
	r := &runtime{synchronized: make(chan error, 1)}
	a, err := adaptation.New("runtime", "v1.2.3",
		func(ctx context.Context, synchronize adaptation.SyncCB) error {
			_, err := synchronize(ctx, pods, containers)
			r.synchronized <- err
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
	<-r.synchronized // of the plugins that it launched: none
	r.Adaptation = a
	return r
}

// wait waits until a plugin is connected and gets events.
func (r *runtime) wait(t testing.TB) {
	t.Helper()
	select {
	case err := <-r.synchronized:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the plugin did not connect")
	}
	r.BlockPluginSync().Unblock()
}

func (r *runtime) create(t *testing.T, c *api.Container) *api.ContainerAdjustment {
	t.Helper()
	reply, err := r.CreateContainer(t.Context(), &api.CreateContainerRequest{Pod: pod(), Container: c})
	if err != nil {
		t.Fatal(err)
	}
	return reply.GetAdjust()
}

// start runs the plugin, and returns what waits for its end.
func start(t *testing.T, dir string, c *config.Config, e Engine) (stop func() error, log *logtest.Hook) {
	t.Helper()
	return startWith(t, dir, Options{Config: c, Engine: e})
}

func startWith(t *testing.T, dir string, o Options, hooks ...logrus.Hook) (stop func() error, log *logtest.Hook) {
	t.Helper()
	logger, hook := logtest.NewNullLogger()
	for _, hook := range hooks {
		logger.AddHook(hook)
		if slices.Contains(hook.Levels(), logrus.DebugLevel) {
			logger.SetLevel(logrus.DebugLevel)
		}
	}
	o.Name, o.Index, o.Socket, o.Dir, o.Interface, o.Log = "selective-ksm", "90", filepath.Join(dir, "nri.sock"), own(dir), "sysfs", logger
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, o) }()
	return sync.OnceValue(func() error {
		cancel()
		return <-ended
	}), hook
}

// line is a connection to the runtime that can be cut, which stopping an
// adaptation does not do.
type line struct {
	dir   string // of its nri.sock
	mu    sync.Mutex
	conns []net.Conn
}

func startLine(t *testing.T, runtimeDir string) *line {
	t.Helper()
	l := &line{dir: t.TempDir()}
	listener, err := net.Listen("unix", filepath.Join(l.dir, "nri.sock"))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("unix", filepath.Join(runtimeDir, "nri.sock"))
			if err != nil {
				near.Close()
				continue
			}
			l.mu.Lock()
			l.conns = append(l.conns, near, far)
			l.mu.Unlock()
			wg.Go(func() { io.Copy(near, far); near.Close() })
			wg.Go(func() { io.Copy(far, near); far.Close() })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		l.cut()
		wg.Wait()
	})
	return l
}

func (l *line) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		c.Close()
	}
	l.conns = nil
}

func expect(t *testing.T, e *recorder, want ...string) {
	t.Helper()
	if got := e.took(); !slices.Equal(got, want) {
		t.Errorf("engine was told %q, want %q", got, want)
	}
}

func TestOverTheProtocol(t *testing.T) {
	dir := t.TempDir()
	c := configuration(t)
	containers := []*api.Container{
		ctr("run", api.ContainerState_CONTAINER_RUNNING, "sh"),
		ctr("made", api.ContainerState_CONTAINER_CREATED, "sh"),
		ctr("over", api.ContainerState_CONTAINER_STOPPED, "sh"),
		{Id: "lost", PodSandboxId: "gone", State: api.ContainerState_CONTAINER_RUNNING},
	}
	r := startRuntime(t, dir, []*api.PodSandbox{pod()}, containers)
	defer r.Stop()
	l := startLine(t, dir)
	e := &recorder{}
	stop, log := start(t, l.dir, &c, e)
	defer stop()
	r.wait(t)
	expect(t, e, "reconcile [made] [run,not lost]")
	want := engine.Container{
		ID: "run", Name: "name-run", Pod: "web", Namespace: "shop", SandboxID: podID, CgroupsPath: "/k8s.io/run", Partition: podOf,
		Because: "partitionBy of the configuration is pod",
	}
	if e.last[0] != want {
		t.Errorf("container is %+v, want %+v", e.last[0], want)
	}
	if entry := log.AllEntries()[0]; entry.Message != "container is not merged" || entry.Data["container_id"] != "lost" ||
		fmt.Sprint(entry.Data["error"]) != "the runtime gave no sandbox id" {
		t.Errorf("logged %q %v", entry.Message, entry.Data)
	}

	adjusted := r.create(t, ctr("c1", api.ContainerState_CONTAINER_CREATED, "sleep", "1"))
	if want := []string{"/.selective-ksm", "optin", "--", "sleep", "1"}; !slices.Equal(adjusted.GetArgs(), want) {
		t.Errorf("arguments are %q, want %q", adjusted.GetArgs(), want)
	}
	mounts := adjusted.GetMounts()
	if len(mounts) != 1 || mounts[0].Source != copied(l.dir) || mounts[0].Destination != "/.selective-ksm" ||
		mounts[0].Type != "bind" || !slices.Equal(mounts[0].Options, []string{"bind", "rprivate", "ro", "exec"}) {
		t.Errorf("mounts are %v", mounts)
	}
	expect(t, e, "add c1 to "+podOf)

	c1, ctx := ctr("c1", api.ContainerState_CONTAINER_RUNNING), t.Context()
	for _, do := range []func() error{
		func() error {
			return r.PostStartContainer(ctx, &api.PostStartContainerRequest{Pod: pod(), Container: c1})
		},
		func() error {
			_, err := r.StopContainer(ctx, &api.StopContainerRequest{Pod: pod(), Container: c1})
			return err
		},
		func() error { return r.RemoveContainer(ctx, &api.RemoveContainerRequest{Pod: pod(), Container: c1}) },
		func() error { return r.StopPodSandbox(ctx, &api.StopPodSandboxRequest{Pod: pod()}) },
		func() error { return r.RemovePodSandbox(ctx, &api.RemovePodSandboxRequest{Pod: pod()}) },
	} {
		if err := do(); err != nil {
			t.Error(err)
		}
	}
	expect(t, e, "start c1", "stop c1", "stop c1", "stop sandbox "+podID, "stop sandbox "+podID)

	// The connection goes: the plugin makes another, and takes over anew.
	l.cut()
	r.wait(t)
	expect(t, e, "reconcile [made] [run,not lost]")

	if err := stop(); err != nil {
		t.Errorf("told to end, the plugin returned %v", err)
	}
}

func TestNotMerged(t *testing.T) {
	dir := t.TempDir()
	c := configuration(t)
	r := startRuntime(t, dir, nil, nil)
	defer r.Stop()
	e := &recorder{}
	stop, log := start(t, dir, &c, e)
	defer stop()
	r.wait(t)
	e.took()
	log.Reset()

	shared := ctr("c4", api.ContainerState_CONTAINER_CREATED, "sh")
	shared.Linux.CgroupsPath = "/shared"
	bare := &api.Container{Id: "c5", Name: "name-c5", Args: []string{"sh"}}
	for _, tc := range []struct {
		ctr    *api.Container
		refuse error
		want   string
	}{
		{ctr("c1", 0, "sh"), errors.New("no room"), "no room"},
		{ctr("c2", 0), nil, "it has no command"},
		{shared, nil, `its cgroup "/shared" is not named after the container, so that its processes cannot be told from others`},
		{bare, nil, `its cgroup "" is not named after the container, so that its processes cannot be told from others`},
	} {
		e.add = tc.refuse
		if a := r.create(t, tc.ctr); len(a.GetArgs()) != 0 || len(a.GetMounts()) != 0 {
			t.Errorf("%s was adjusted: %v", tc.ctr.Id, a)
		}
		entry := log.LastEntry()
		if len(log.AllEntries()) != 1 || entry.Message != "container is not merged" ||
			entry.Data["container"] != "name-"+tc.ctr.Id || fmt.Sprint(entry.Data["error"]) != tc.want {
			t.Errorf("%s: logged %q %v, want %s", tc.ctr.Id, entry.Message, entry.Data, tc.want)
		}
		log.Reset()
	}
	expect(t, e, "add c1 to "+podOf, "leave out c2", "leave out c4", "leave out c5")
	e.add = nil

	// One that another instance has wrapped is a member, and not wrapped again.
	if a := r.create(t, ctr("c6", 0, "/.selective-ksm", "optin", "--", "sh")); len(a.GetArgs()) != 0 || len(a.GetMounts()) != 0 {
		t.Errorf("wrapped twice: %v", a)
	}
	expect(t, e, "add c6 to "+podOf)

	// Nor is one whose memory the engine opts in.
	e.optsIn = true
	if a := r.create(t, ctr("c8", 0, "sh")); len(a.GetArgs()) != 0 || len(a.GetMounts()) != 0 {
		t.Errorf("wrapped for nothing: %v", a)
	}
	expect(t, e, "add c8 to "+podOf)
	e.optsIn = false

	// The program is removed: containers have the copy.
	if err := os.Remove(c.Wrapper); err != nil {
		t.Fatal(err)
	}
	if a := r.create(t, ctr("c7", 0, "sh")); len(a.GetMounts()) != 1 || a.GetMounts()[0].Source != copied(dir) {
		t.Errorf("not wrapped: %v", a)
	}
	expect(t, e, "add c7 to "+podOf)

	if err := os.Remove(copied(dir)); err != nil {
		t.Fatal(err)
	}
	if a := r.create(t, ctr("c9", 0, "sh")); len(a.GetArgs()) != 0 || len(a.GetMounts()) != 0 {
		t.Errorf("wrapped with nothing: %v", a)
	}
	expect(t, e, "leave out c9")
	want := "wrapper: stat " + copied(dir) + ": no such file or directory"
	if entry := log.LastEntry(); entry == nil || fmt.Sprint(entry.Data["error"]) != want {
		t.Errorf("logged %v, want %s", entry, want)
	}
}

// A reason is logged once for a container, however often the runtime tells of it.
func TestToldOnce(t *testing.T) {
	c := configuration(t)
	log, hook := logtest.NewNullLogger()
	p := newPlugin(Options{Engine: &recorder{}, Log: log})
	p.use(c, "")
	lost := &api.Container{Id: "lost", Name: "lost", State: api.ContainerState_CONTAINER_RUNNING}
	synchronize := func(containers ...*api.Container) {
		t.Helper()
		if _, err := p.Synchronize(t.Context(), nil, containers); err != nil {
			t.Fatal(err)
		}
	}
	told := func(want int) {
		t.Helper()
		entries := slices.DeleteFunc(hook.AllEntries(), func(e *logrus.Entry) bool { return e.Message != "container is not merged" })
		if len(entries) != want {
			t.Errorf("told %d times, want %d", len(entries), want)
		}
	}
	for range 3 {
		synchronize(lost)
	}
	told(1)
	// It gets a pod, and another reason.
	if _, _, err := p.CreateContainer(t.Context(), pod(), lost); err != nil {
		t.Fatal(err)
	}
	told(2)
	// Nothing is kept of containers that are gone.
	synchronize()
	synchronize(lost)
	told(3)
	if err := p.RemoveContainer(t.Context(), nil, lost); err != nil || len(p.get().told) != 0 {
		t.Errorf("kept %v, %v", p.get().told, err)
	}
}

// A runtime that launches the plugin gives it its configuration, over the
// connection that the plugin was started with.
func TestLaunched(t *testing.T) {
	dir := t.TempDir()
	c := configuration(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{
		"conf.d/selective-ksm.conf": "partitionBy: container\nwrapper: " + c.Wrapper + "\n",
		"conf.d/bad.conf":           "partitionBy: node\n",
		"plugins":                   "",
	} {
		path = filepath.Join(dir, path)
		if text == "" {
			err = os.Mkdir(path, 0o755)
		} else {
			err = errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"90-selective-ksm", "91-bad"} {
		if err := os.Symlink(self, filepath.Join(dir, "plugins", name)); err != nil {
			t.Fatal(err)
		}
	}
	r := startRuntime(t, dir, nil, nil)
	defer r.Stop()
	// The one that was given a bad configuration is gone, and fails nothing.
	adjusted := r.create(t, ctr("c1", 0, "sh"))
	if mounts := adjusted.GetMounts(); len(mounts) != 1 || mounts[0].Source != copied(filepath.Join(dir, "plugins")) {
		t.Errorf("mounts are %v", mounts)
	}
}

func TestConfigure(t *testing.T) {
	c := configuration(t)
	log, _ := logtest.NewNullLogger()
	var applied []config.Config
	var unfit error
	p := newPlugin(Options{Engine: &recorder{}, Dir: own(t.TempDir()), Log: log, Apply: func(c config.Config) error {
		if unfit == nil {
			applied = append(applied, c)
		}
		return unfit
	}})
	if _, err := p.Configure(t.Context(), "partitionBy: container\nwrapper: "+c.Wrapper, "runtime", "v1.2.3"); err != nil {
		t.Fatal(err)
	}
	want := c
	want.PartitionBy = config.ScopeContainer
	for text, problem := range map[string]string{
		"partitionBy: node":               `line 1: partitionBy: "node" is not known: write container or pod or group or namespace`,
		"wrapper: /nowhere/selective-ksm": "wrapper: stat /nowhere/selective-ksm: no such file or directory",
	} {
		_, err := p.Configure(t.Context(), text, "runtime", "v1.2.3")
		if want := "configuration from the runtime (runtime v1.2.3): " + problem; !errors.Is(err, ErrConfig) || err.Error() != want {
			t.Errorf("error is\n\t%v\nwant\n\t%s", err, want)
		}
	}
	unfit = errors.New("logFile: it is a directory")
	if _, err := p.Configure(t.Context(), "wrapper: "+c.Wrapper, "runtime", "v1.2.3"); !errors.Is(err, unfit) || !errors.Is(err, ErrConfig) {
		t.Errorf("error of what cannot be applied is %v", err)
	}
	// What was refused has changed nothing.
	if !reflect.DeepEqual(applied, []config.Config{want}) || !reflect.DeepEqual(p.get().policy, want) {
		t.Errorf("applied %+v", applied)
	}
	p.Config = &c
	if _, err := p.Configure(t.Context(), "partitionBy: node", "runtime", "v1.2.3"); err != nil {
		t.Errorf("a plugin with a file of its own: %v", err)
	}
}

// An engine that opts containers in needs no wrapper, unless the configuration wants
// one.
func TestOptIn(t *testing.T) {
	log, _ := logtest.NewNullLogger()
	dir := t.TempDir()
	p := newPlugin(Options{
		Engine: &recorder{optsIn: true}, Dir: own(dir), Log: log, Apply: func(config.Config) error { return nil },
	})
	wrapper := "wrapper: " + static(t) + "\n"
	for _, tc := range []struct {
		text string
		want bool
	}{
		{"wrapper: /nowhere\n", false}, {"wrapper: /nowhere\noptIn: ambient\n", false},
		{wrapper + "optIn: wrapper\n", true}, {wrapper + "optIn: auto\n", false},
	} {
		if _, err := p.Configure(t.Context(), tc.text, "runtime", "v1.2.3"); err != nil {
			t.Fatal(err)
		}
		a, _, err := p.CreateContainer(t.Context(), pod(), ctr("c1", 0, "sh"))
		if err != nil {
			t.Fatal(err)
		}
		if got := len(a.GetMounts()) == 1 && len(a.GetArgs()) > 1; got != tc.want {
			t.Errorf("%q: wrapped: %v, want %v", tc.text, got, tc.want)
		}
		if _, err := os.Stat(copied(dir)); (err == nil) != (tc.want || !strings.Contains(tc.text, "/nowhere")) {
			t.Errorf("%q: copy of the wrapper: %v", tc.text, err)
		}
	}
	// Nor do containers that are mergeable from the start, whatever the engine can do.
	p.Engine = &recorder{}
	for text, want := range map[string]bool{wrapper + "optIn: auto\n": true, "wrapper: /nowhere\noptIn: ambient\n": false} {
		if _, err := p.Configure(t.Context(), text, "runtime", "v1.2.3"); err != nil {
			t.Fatal(err)
		}
		if p.wraps(p.get().policy) != want {
			t.Errorf("%q: wrapped: %v", text, !want)
		}
	}
}

func TestCannotStart(t *testing.T) {
	dir := t.TempDir()
	c := configuration(t)
	dynamic := c
	dynamic.Wrapper = "/bin/sh"
	for name, tc := range map[string]struct {
		config config.Config
		want   string
	}{
		"no socket": {c, "NRI socket: dial unix " + dir + "/nri.sock: connect: no such file or directory: enable NRI in the runtime, or name its socket with -socket"},
		"wrapper":   {dynamic, "wrapper /bin/sh: needs a dynamic loader, which a container may lack: build it with CGO_ENABLED=0"},
	} {
		t.Run(name, func(t *testing.T) {
			log, _ := logtest.NewNullLogger()
			err := Run(t.Context(), Options{Socket: filepath.Join(dir, "nri.sock"), Config: &tc.config, Dir: own(dir), Engine: &recorder{}, Log: log})
			if err == nil || err.Error() != tc.want {
				t.Errorf("error is\n\t%v\nwant\n\t%s", err, tc.want)
			}
		})
	}
}
