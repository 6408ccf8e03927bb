package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// stuck is a kernel that answers nothing that is asked of it, until it is released.
type stuck struct{ released chan struct{} }

func (k stuck) wait() error {
	<-k.released
	return errors.New("stuck")
}

func (k stuck) Features() kernel.Features { return kernel.Features{Bind: true} }
func (k stuck) Partitions() ([]string, error) {
	return []string{podOf, "sksm-pod-0000bbbbccccddddeeeeff"}, nil
}
func (k stuck) Recover(context.Context) error            { return k.wait() }
func (k stuck) AddPartition(string) error                { return k.wait() }
func (k stuck) RemovePartition(string) error             { return k.wait() }
func (k stuck) Bind(string, int) error                   { return k.wait() }
func (k stuck) Unbind(string, int) error                 { return k.wait() }
func (k stuck) Close() error                             { return nil }
func (k stuck) Counters(string) (kernel.Counters, error) { return kernel.Counters{}, k.wait() }
func (k stuck) Merge(context.Context, string, int, kernel.Range) error {
	return k.wait()
}
func (k stuck) Settle(context.Context, string) (time.Duration, error) { return 0, k.wait() }
func (k stuck) Unmerge(context.Context, string, int) error            { return k.wait() }

// refusing is an engine that has an error for everything.
type refusing struct{ recorder }

func (*refusing) Add(context.Context, engine.Container) error { return errors.New("no") }
func (*refusing) Reconcile(_, _ []engine.Container) error     { return errors.New("no") }

// No handler returns an error, or waits for longer than one for the kernel may, whatever
// the kernel does.
func TestHandlers(t *testing.T) {
	log, _ := logtest.NewNullLogger()
	k := stuck{make(chan struct{})}
	e := engine.New(engine.Options{Kernel: k, Owned: config.Owned, Settings: engine.Settings{StartDelays: []time.Duration{0}}, Log: log})
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { e.Run(ctx) })
	defer running.Wait()
	defer close(k.released)
	defer cancel()
	for name, e := range map[string]Engine{"a kernel that is stuck": e, "an engine that refuses": &refusing{}} {
		t.Run(name, func(t *testing.T) {
			p := newPlugin(Options{Engine: e, Log: log, Interface: "sysfs"})
			p.use(config.Default(), "")
			// Far more than a handler takes, on a machine that is busy too. What is stuck takes
			// for ever.
			const long = 10 * time.Second
			handled := func(what string, handle func() error) {
				t.Helper()
				began := time.Now()
				if err := handle(); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				if took := time.Since(began); took > long {
					t.Errorf("%s took %s", what, took)
				}
			}
			ctx := t.Context()
			handled("Synchronize", func() error {
				_, err := p.Synchronize(ctx, []*api.PodSandbox{pod()}, []*api.Container{
					ctr("run", api.ContainerState_CONTAINER_RUNNING, "sh"), ctr("made", api.ContainerState_CONTAINER_CREATED, "sh"),
				})
				return err
			})
			for i := range 3 {
				pod, c := pod(), ctr(fmt.Sprint("c", i), api.ContainerState_CONTAINER_CREATED, "sh")
				pod.Id = strings.Repeat(fmt.Sprint(i), len(podID))
				handled("CreateContainer", func() error { _, _, err := p.CreateContainer(ctx, pod, c); return err })
				handled("PostStartContainer", func() error { return p.PostStartContainer(ctx, pod, c) })
				handled("StopContainer", func() error { _, err := p.StopContainer(ctx, pod, c); return err })
				handled("RemoveContainer", func() error { return p.RemoveContainer(ctx, pod, c) })
				handled("StopPodSandbox", func() error { return p.StopPodSandbox(ctx, pod) })
				handled("RemovePodSandbox", func() error { return p.RemovePodSandbox(ctx, pod) })
			}
			// Of containers and pods that nothing is known of.
			handled("CreateContainer", func() error { _, _, err := p.CreateContainer(ctx, nil, &api.Container{}); return err })
			handled("PostStartContainer", func() error { return p.PostStartContainer(ctx, nil, &api.Container{}) })
			handled("StopContainer", func() error { _, err := p.StopContainer(ctx, nil, &api.Container{}); return err })
			handled("RemoveContainer", func() error { return p.RemoveContainer(ctx, nil, nil) })
			handled("StopPodSandbox", func() error { return p.StopPodSandbox(ctx, nil) })
			handled("RemovePodSandbox", func() error { return p.RemovePodSandbox(ctx, nil) })
			handled("Synchronize", func() error { _, err := p.Synchronize(ctx, nil, nil); return err })
		})
	}
}

// warnings hears the plugin's.
type warnings chan string

func (warnings) Levels() []logrus.Level { return []logrus.Level{logrus.WarnLevel} }

func (w warnings) Fire(e *logrus.Entry) error {
	select {
	case w <- e.Message:
	default:
	}
	return nil
}

// debugged hears the errors that it tells of for debugging.
type debugged chan error

func (debugged) Levels() []logrus.Level { return []logrus.Level{logrus.DebugLevel} }

func (d debugged) Fire(e *logrus.Entry) error {
	if err, ok := e.Data[logrus.ErrorKey].(error); ok {
		select {
		case d <- err:
		default:
		}
	}
	return nil
}

// A plugin that is started while the runtime is away, and has been killed, waits for it.
func TestWaitsForRuntime(t *testing.T) {
	dir := t.TempDir()
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "nri.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	left.SetUnlinkOnClose(false)
	if err := left.Close(); err != nil {
		t.Fatal(err)
	}
	c := configuration(t)
	e := &recorder{optsIn: true}
	said := make(warnings, 1)
	again := make(debugged, 1)
	stop, log := startWith(t, dir, Options{Config: &c, Engine: e}, said, again)
	defer stop()
	select {
	case got := <-said:
		if want := "the runtime does not answer: waiting for it"; got != want {
			t.Fatalf("said %q, want %q", got, want)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("said nothing")
	}
	// A runtime that starts removes the socket first.
	if err := os.Remove(filepath.Join(dir, "nri.sock")); err != nil {
		t.Fatal(err)
	}
	for gone := false; !gone; {
		select {
		case err := <-again:
			gone = errors.Is(err, os.ErrNotExist)
		case <-time.After(30 * time.Second):
			t.Fatal("did not try again")
		}
	}
	r := startRuntime(t, dir, nil, nil)
	defer r.Stop()
	r.wait(t)
	expect(t, e, "reconcile [] []")
	if err := stop(); err != nil {
		t.Errorf("told to end, the plugin returned %v", err)
	}
	lines := slices.DeleteFunc(log.AllEntries(), func(e *logrus.Entry) bool { return e.Level == logrus.DebugLevel })
	if n := len(lines); n != 2 {
		t.Errorf("said %d things, not one of waiting and one of having begun", n)
	}
}
