package plugin

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/sirupsen/logrus"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

const (
	// maxAnswer is how long an answer to the runtime may take, under load.
	maxAnswer = 50 * time.Millisecond
	// load is how many pods start at once.
	load = 20
)

// prompt is a kernel that answers at once.
type prompt struct{}

func (prompt) Features() kernel.Features                              { return kernel.Features{Bind: true} }
func (prompt) Recover(context.Context) error                          { return nil }
func (prompt) Partitions() ([]string, error)                          { return nil, nil }
func (prompt) AddPartition(string) error                              { return nil }
func (prompt) RemovePartition(string) error                           { return nil }
func (prompt) Bind(string, int) error                                 { return nil }
func (prompt) Unbind(string, int) error                               { return nil }
func (prompt) Merge(context.Context, string, int, kernel.Range) error { return nil }
func (prompt) Settle(context.Context, string) (time.Duration, error)  { return 0, nil }
func (prompt) Unmerge(context.Context, string, int) error             { return nil }
func (prompt) Counters(string) (kernel.Counters, error)               { return kernel.Counters{}, nil }
func (prompt) Close() error                                           { return nil }

// answers hears how long the plugin took to answer the runtime.
type answers struct {
	mu      sync.Mutex
	slowest time.Duration
	event   any
	count   int
}

func (*answers) Levels() []logrus.Level { return []logrus.Level{logrus.DebugLevel} }

func (a *answers) Fire(e *logrus.Entry) error {
	ms, ok := e.Data["duration_ms"].(float64)
	if !ok {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.count++
	if took := time.Duration(ms * float64(time.Millisecond)); took > a.slowest {
		a.slowest, a.event = took, e.Data["event"]
	}
	return nil
}

// slow is a kernel that takes longer than a container's creation may.
type slow struct{ prompt }

func (slow) AddPartition(string) error {
	time.Sleep(4 * addTimeout)
	return nil
}

// BenchmarkAnswers has the runtime's half of NRI tell the plugin of pods that all start
// at once, and then end. It fails if an answer takes longer than it may.
func BenchmarkAnswers(b *testing.B) {
	wrapper := config.Default()
	wrapper.OptIn, wrapper.Wrapper = config.OptInWrapper, static(b)
	for _, tc := range []struct {
		name   string
		kernel kernel.Kernel
		config config.Config
	}{
		{"outside", prompt{}, config.Default()},
		{"wrapper", prompt{}, wrapper},
		{"slow", slow{}, config.Default()},
	} {
		b.Run(tc.name, func(b *testing.B) { answer(b, tc.kernel, tc.config) })
	}
}

func answer(b *testing.B, k kernel.Kernel, c config.Config) {
	heard := &answers{}
	log := logrus.New()
	log.SetLevel(logrus.DebugLevel)
	log.SetFormatter(silence{})
	log.AddHook(heard)
	e := engine.New(engine.Options{Kernel: k, Owned: config.Owned, Log: log})
	ctx, cancel := context.WithCancel(b.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() { e.Run(ctx) })

	dir := b.TempDir()
	r := startRuntime(b, dir, nil, nil)
	defer r.Stop()
	running.Go(func() {
		o := Options{Name: "selective-ksm", Index: "90", Socket: filepath.Join(dir, "nri.sock"), Config: &c, Dir: own(dir), Engine: e, Log: log}
		if err := Run(ctx, o); err != nil {
			b.Error(err)
		}
	})
	r.wait(b)
	for b.Loop() {
		var pods sync.WaitGroup
		for i := range load {
			pods.Go(func() { r.life(b, i) })
		}
		pods.Wait()
	}
	heard.mu.Lock()
	defer heard.mu.Unlock()
	b.ReportMetric(float64(heard.slowest.Microseconds())/1000, "ms/slowest")
	if heard.slowest > maxAnswer {
		b.Errorf("%v took %s to answer, one of %d, and may take %s", heard.event, heard.slowest, heard.count, maxAnswer)
	}
}

// silence is the format of a log that is only heard.
type silence struct{}

func (silence) Format(*logrus.Entry) ([]byte, error) { return nil, nil }

// life has a pod with one container start and end.
func (r *runtime) life(b *testing.B, i int) {
	pod, c := pod(), ctr(fmt.Sprintf("%064x", i), api.ContainerState_CONTAINER_CREATED, "sh")
	pod.Id = fmt.Sprintf("%064x", i)
	c.PodSandboxId = pod.Id
	ctx := b.Context()
	for _, tell := range []func() error{
		func() error {
			_, err := r.CreateContainer(ctx, &api.CreateContainerRequest{Pod: pod, Container: c})
			return err
		},
		func() error {
			return r.PostStartContainer(ctx, &api.PostStartContainerRequest{Pod: pod, Container: c})
		},
		func() error {
			_, err := r.StopContainer(ctx, &api.StopContainerRequest{Pod: pod, Container: c})
			return err
		},
		func() error { return r.RemoveContainer(ctx, &api.RemoveContainerRequest{Pod: pod, Container: c}) },
		func() error { return r.StopPodSandbox(ctx, &api.StopPodSandboxRequest{Pod: pod}) },
		func() error { return r.RemovePodSandbox(ctx, &api.RemovePodSandboxRequest{Pod: pod}) },
	} {
		if err := tell(); err != nil {
			b.Error(err)
		}
	}
}
