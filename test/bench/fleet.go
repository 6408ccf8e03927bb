package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"
)

const (
	root  = "/sys/fs/cgroup"
	below = "sksm-bench"
)

// fleet is containers as a runtime has them.
type fleet struct {
	pods       []*api.PodSandbox
	containers []*api.Container
	processes  []*exec.Cmd
	cgroups    []string // in the order in which they were made
}

func newFleet() (*fleet, error) {
	f := &fleet{}
	return f, f.cgroup(below)
}

// withFleet has a runtime's half of NRI, below a directory for the time of it, and containers:
// those that fill adds, unless it is nil, before a plugin can connect.
func withFleet(fill func(dir string, f *fleet) error, do func(dir string, f *fleet, r *nri) error) (err error) {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	f, err := newFleet()
	defer func() { err = errors.Join(err, f.stop()) }()
	if err == nil && fill != nil {
		err = fill(dir, f)
	}
	if err != nil {
		return err
	}
	r, err := f.serve(dir)
	if err != nil {
		return err
	}
	defer r.Stop()
	return do(dir, f, r)
}

// beside does so with the plugin, by a configuration, that has taken over what fill has
// added. It tells how long that took.
func (g *guest) beside(ctx context.Context, config string, fill func(dir string, f *fleet) error,
	do func(f *fleet, r *nri, p *agent, took time.Duration) error) error {
	return withFleet(fill, func(dir string, f *fleet, r *nri) (err error) {
		p, err := startAgent(filepath.Join(g.bin, product), dir, config)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, p.stop()) }()
		took, err := r.connected(ctx, p)
		if err != nil {
			return err
		}
		return do(f, r, p, took)
	})
}

func id(kind, name string) string {
	sum := sha256.Sum256([]byte(kind + name))
	return hex.EncodeToString(sum[:])
}

func (f *fleet) cgroup(path string) error {
	dir := filepath.Join(root, path)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	f.cgroups = append(f.cgroups, dir)
	return nil
}

// pod adds a pod, which is in a namespace of Kubernetes.
func (f *fleet) pod(name, namespace string) (*api.PodSandbox, error) {
	pod := &api.PodSandbox{Id: id("pod", namespace+"/"+name), Name: name, Namespace: namespace}
	f.pods = append(f.pods, pod)
	return pod, f.cgroup(podCgroup(pod))
}

// podCgroup is where the containers of a pod have theirs.
func podCgroup(pod *api.PodSandbox) string {
	return filepath.Join(below, "pod"+pod.Id)
}

// container adds a container to a pod, with an empty cgroup.
func (f *fleet) container(pod *api.PodSandbox, name string) (*api.Container, error) {
	ctr := &api.Container{
		Id: id("container", pod.Id+name), PodSandboxId: pod.Id, Name: name,
		State: api.ContainerState_CONTAINER_RUNNING, Args: []string{"sleep", "infinity"},
		Mounts: []*api.Mount{{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro"}}},
	}
	path := filepath.Join(podCgroup(pod), ctr.Id)
	ctr.Linux = &api.LinuxContainer{CgroupsPath: "/" + path, Namespaces: []*api.LinuxNamespace{{Type: "pid"}}}
	f.containers = append(f.containers, ctr)
	return ctr, f.cgroup(path)
}

// enter has a process that runs be one of a container.
func (f *fleet) enter(ctr *api.Container, pid int) error {
	return os.WriteFile(filepath.Join(root, ctr.Linux.CgroupsPath, "cgroup.procs"), fmt.Append(nil, pid), 0)
}

// start starts a command in a container.
func (f *fleet) start(ctr *api.Container, cmd *exec.Cmd) error {
	dir, err := os.Open(filepath.Join(root, ctr.Linux.CgroupsPath))
	if err != nil {
		return err
	}
	defer dir.Close()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	if err := cmd.Start(); err != nil {
		return err
	}
	f.processes = append(f.processes, cmd)
	return nil
}

// stop ends all that runs in the containers.
func (f *fleet) stop() error {
	for _, p := range f.processes {
		p.Process.Kill()
		p.Wait()
	}
	var errs []error
	for i := len(f.cgroups) - 1; i >= 0; i-- {
		errs = append(errs, os.Remove(f.cgroups[i]))
	}
	return errors.Join(errs...)
}

// silent is the log of the runtime's half.
type silent struct{}

func (silent) Debugf(context.Context, string, ...any) {}
func (silent) Infof(context.Context, string, ...any)  {}
func (silent) Warnf(context.Context, string, ...any)  {}
func (silent) Errorf(context.Context, string, ...any) {}

// nri is the half of NRI that is the runtime's.
type nri struct {
	*adaptation.Adaptation
	synchronized chan time.Duration // how long a plugin took to take over what runs
}

// serve has plugins connect, and tells them of these containers.
func (f *fleet) serve(dir string) (*nri, error) {
	nrilog.Set(silent{})
	r := &nri{synchronized: make(chan time.Duration, 1)}
	launched := true // the first is for plugins that the runtime has launched: none
	var err error
	r.Adaptation, err = adaptation.New("bench", "v1",
		func(ctx context.Context, synchronize adaptation.SyncCB) error {
			began := time.Now()
			_, err := synchronize(ctx, f.pods, f.containers)
			if !launched && err == nil {
				r.synchronized <- time.Since(began)
			}
			launched = false
			return err
		},
		func(context.Context, []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) { return nil, nil },
		adaptation.WithSocketPath(filepath.Join(dir, "nri.sock")),
		adaptation.WithPluginPath(filepath.Join(dir, "plugins")),
		adaptation.WithPluginConfigPath(filepath.Join(dir, "conf.d")),
	)
	if err != nil {
		return nil, err
	}
	return r, r.Start()
}

// starts tells the plugin that a container is created and started.
func (r *nri) starts(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) error {
	_, err := r.CreateContainer(ctx, &api.CreateContainerRequest{Pod: pod, Container: ctr})
	if err == nil {
		err = r.PostStartContainer(ctx, &api.PostStartContainerRequest{Pod: pod, Container: ctr})
	}
	return err
}

// connected waits until the plugin has taken over what runs.
func (r *nri) connected(ctx context.Context, p *agent) (time.Duration, error) {
	select {
	case took := <-r.synchronized:
		return took, nil
	case <-p.read:
		return 0, errors.New("the plugin ended: " + p.last())
	case <-ctx.Done():
		return 0, fmt.Errorf("the plugin did not connect: %w\n%s", ctx.Err(), p.last())
	}
}
