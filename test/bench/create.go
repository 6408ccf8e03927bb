package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selective-ksm/selective-ksm/test/bench/result"
	"github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/e2e/plugin"
)

// perTurn is how many containers are started with one plugin before it is the other's turn,
// besides the first: a program's first steps are slow where they are emulated.
const perTurn = 8

// starting is how containers are created and started.
type starting struct {
	figure string
	count  int           // with each plugin
	pause  time.Duration // after each
}

// runtime measures what a container's creation and start take of containerd's time, with
// our plugin and with one that hears of the same and does nothing, in turn.
func (g *guest) runtime(ctx context.Context) error {
	const merged = 600 * time.Millisecond // until a merge of each has ended
	return g.created(ctx, starting{"create", g.starts, merged})
}

// runtimeNative does so on the machine itself, more often, as less is to be told apart.
func (g *guest) runtimeNative(ctx context.Context) error {
	const often, pause = 4, 50 * time.Millisecond
	return g.created(ctx, starting{"create-native", often * g.starts, pause})
}

func (g *guest) created(ctx context.Context, s starting) error {
	const timeout = 20 * time.Minute
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return g.withNode(ctx, func(n *node.Node) error { return g.createOn(ctx, n, s) })
}

// withNode calls f while containerd runs.
func (g *guest) withNode(ctx context.Context, f func(*node.Node) error) (err error) {
	n, err := node.Start(ctx, node.Built(filepath.Dir(g.bin)))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Stop(context.WithoutCancel(ctx))) }()
	return f(n)
}

func (g *guest) createOn(ctx context.Context, n *node.Node, s starting) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// As a program of its own the idle plugin shares no page with this one, which always runs,
	// and so has been translated where that is done. Both are of the same file system.
	programs := map[string]string{idlePlugin: self, product: filepath.Join(g.bin, product)}
	for name, from := range programs {
		programs[name] = n.Path("bench-" + filepath.Base(from))
		if content, err := os.ReadFile(from); err != nil {
			return err
		} else if err := os.WriteFile(programs[name], content, 0o755); err != nil {
			return err
		}
	}
	config, text := n.Path("plugin.yaml"), "logFormat: json\n"
	if !g.selective {
		// Nobody is mergeable, so that nothing is merged; all else is done.
		text += "interface: mainline\nmainlinePartition: first\nsecrets: true\noptIn: ambient\n"
	}
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return err
	}
	for left := s.count; left > 0; left -= perTurn {
		for _, variant := range []struct {
			name string
			args []string
		}{
			{idlePlugin, []string{"idle", n.NRISocket()}},
			{product, plugin.Args(config, n.NRISocket())},
		} {
			p, err := plugin.StartArgs(ctx, programs[variant.name], variant.args...)
			if err != nil {
				return err
			}
			if err := errors.Join(g.createWith(ctx, n, s, variant.name, min(left, perTurn)), p.Stop()); err != nil {
				return err
			}
		}
	}
	return nil
}

// createWith creates and starts containers in a pod, and tells what each took, but for the
// first.
func (g *guest) createWith(ctx context.Context, n *node.Node, s starting, variant string, count int) (err error) {
	pod, err := n.RunPod(ctx, "bench")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pod.Remove(ctx)) }()
	for i := range count + 1 {
		began := time.Now()
		created, err := n.CRI().CreateContainer(ctx, &cri.CreateContainerRequest{
			PodSandboxId: pod.ID, SandboxConfig: pod.Config(),
			Config: &cri.ContainerConfig{
				Metadata: &cri.ContainerMetadata{Name: fmt.Sprint("bench-", i)},
				Image:    &cri.ImageSpec{Image: node.Image},
				LogPath:  fmt.Sprintf("%s-%d.log", pod.Config().Metadata.Uid, i),
				Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
					NamespaceOptions: pod.Config().Linux.SecurityContext.NamespaceOptions,
				}},
			},
		})
		if err != nil {
			return err
		}
		half := time.Now()
		if _, err := n.CRI().StartContainer(ctx, &cri.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
			return err
		}
		end := time.Now()
		if err := wait(ctx, s.pause); err != nil {
			return err
		}
		if i == 0 {
			continue
		}
		for what, took := range map[string]time.Duration{"create": half.Sub(began), "start": end.Sub(half)} {
			err := g.sample(result.Sample{Figure: s.figure, Case: what, Variant: variant, Value: 1000 * took.Seconds()})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// idle is a plugin that hears of what ours does, and does nothing.
type idle struct{}

func (idle) Synchronize(context.Context, []*api.PodSandbox, []*api.Container) ([]*api.ContainerUpdate, error) {
	_, err := fmt.Fprintln(os.Stderr, plugin.Ready)
	return nil, err
}

func (idle) CreateContainer(context.Context, *api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	return nil, nil, nil
}

func (idle) PostStartContainer(context.Context, *api.PodSandbox, *api.Container) error { return nil }

func (idle) StopContainer(context.Context, *api.PodSandbox, *api.Container) ([]*api.ContainerUpdate, error) {
	return nil, nil
}

func (idle) RemoveContainer(context.Context, *api.PodSandbox, *api.Container) error { return nil }
func (idle) StopPodSandbox(context.Context, *api.PodSandbox) error                  { return nil }
func (idle) RemovePodSandbox(context.Context, *api.PodSandbox) error                { return nil }

// runIdle runs it until ctx ends.
func runIdle(ctx context.Context, socket string) error {
	gone := make(chan struct{})
	closed := sync.OnceFunc(func() { close(gone) })
	s, err := stub.New(idle{}, stub.WithPluginName("idle"), stub.WithPluginIdx(plugin.Index), stub.WithSocketPath(socket),
		stub.WithLogger(silent{}), stub.WithOnClose(closed))
	if err != nil {
		return err
	}
	if err := s.Start(ctx); err != nil {
		return err
	}
	defer s.Wait()
	defer s.Stop()
	select {
	case <-ctx.Done():
		return nil
	case <-gone:
		return errors.New("the runtime closed the connection")
	}
}
