package node

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selective-ksm/selective-ksm/test/workload/control"
)

// PodConfig says what a pod is. Its zero value is an ordinary one, but for the name.
type PodConfig struct {
	Name string
	// Namespace is its Kubernetes namespace, "default" if it is empty.
	Namespace           string
	Labels, Annotations map[string]string
	// HostPID has its containers see the machine's processes, SharedPID each other's.
	HostPID, SharedPID bool
	// Privileged makes its containers privileged.
	Privileged bool
	// UserNamespace gives it one, in which root is nobody of the machine's.
	UserNamespace bool
}

// Pod is a pod sandbox.
type Pod struct {
	Name, ID string

	node   *Node
	config *runtime.PodSandboxConfig
}

// RunPod runs a pod without containers.
func (n *Node) RunPod(ctx context.Context, name string) (*Pod, error) {
	return n.RunPodWith(ctx, PodConfig{Name: name})
}

// RunPodWith runs a pod without containers.
func (n *Node) RunPodWith(ctx context.Context, c PodConfig) (*Pod, error) {
	name := c.Name
	namespaces := &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_CONTAINER}
	switch {
	case c.HostPID:
		namespaces.Pid = runtime.NamespaceMode_NODE
	case c.SharedPID:
		namespaces.Pid = runtime.NamespaceMode_POD
	}
	if c.UserNamespace {
		ids := []*runtime.IDMapping{{HostId: 100000, ContainerId: 0, Length: 65536}}
		namespaces.UsernsOptions = &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: ids, Gids: ids}
	}
	uid := fmt.Sprintf("%s-%d", name, n.pods.Add(1))
	p := &Pod{Name: name, node: n, config: &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: name, Uid: uid, Namespace: cmp.Or(c.Namespace, "default")},
		Labels:       c.Labels,
		Annotations:  c.Annotations,
		LogDirectory: n.Path("logs"),
		Linux: &runtime.LinuxPodSandboxConfig{
			CgroupParent:    "/kubepods/besteffort/pod" + uid,
			SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: namespaces, Privileged: c.Privileged},
		},
	}}
	r, err := n.cri.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		return nil, fmt.Errorf("run pod %s: %w", name, err)
	}
	p.ID = r.PodSandboxId
	return p, nil
}

// Config is what the pod was run with. Callers do not change it.
func (p *Pod) Config() *runtime.PodSandboxConfig { return p.config }

// Remove stops a pod with all that runs in it, and removes it.
func (p *Pod) Remove(ctx context.Context) error {
	_, err := p.node.cri.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.ID})
	if err == nil {
		_, err = p.node.cri.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.ID})
	}
	if err != nil {
		return fmt.Errorf("remove pod %s: %w", p.Name, err)
	}
	return nil
}

func (n *Node) removePods(ctx context.Context) error {
	r, err := n.cri.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	var errs []error
	for _, s := range r.Items {
		p := &Pod{Name: s.Metadata.Name, ID: s.Id, node: n}
		errs = append(errs, p.Remove(ctx))
	}
	return errors.Join(errs...)
}

// RuntimeDefault is containerd's own seccomp profile.
const RuntimeDefault = "runtime/default"

// ContainerConfig says what a container holds.
type ContainerConfig struct {
	Name string
	// MiB of data, made from Seed.
	MiB  int
	Seed uint64
	// Repeat makes the second half of the data equal to the first.
	Repeat bool
	// Secret marks the data as secret.
	Secret bool
	// User is who its program runs as.
	User int64
	// SeccompProfile, if not empty, is the path of the profile to run under, or
	// RuntimeDefault.
	SeccompProfile string
	// Created, if not nil, is called between the container's creation and its
	// start.
	Created func() error
}

// Container is a running container with its memory filled.
type Container struct {
	Name, ID string
	Pod      *Pod
	// PID is the first process's, as the machine counts.
	PID int
	// Annotations are those that the runtime has for it, NRI plugins' included.
	Annotations map[string]string
	// Ready is when its memory was filled.
	Ready time.Time

	*control.Conn
}

// Start creates and starts a container, and waits until its memory is filled.
func (p *Pod) Start(ctx context.Context, c ContainerConfig) (_ *Container, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start container %s/%s: %w", p.Name, c.Name, err)
		}
	}()
	dir := p.node.Path(filepath.Join("control", p.config.Metadata.Uid+"-"+c.Name))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	listener, err := control.Listen(dir)
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	if err := os.Chown(control.Socket(dir), int(c.User), 0); err != nil {
		return nil, err
	}

	const inside = "/control"
	ofPod := p.config.Linux.SecurityContext
	security := &runtime.LinuxContainerSecurityContext{
		NamespaceOptions: ofPod.NamespaceOptions, Privileged: ofPod.Privileged, RunAsUser: &runtime.Int64Value{Value: c.User},
	}
	switch c.SeccompProfile {
	case "":
	case RuntimeDefault:
		security.Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}
	default:
		security.Seccomp = &runtime.SecurityProfile{
			ProfileType:  runtime.SecurityProfile_Localhost,
			LocalhostRef: c.SeccompProfile,
		}
	}
	created, err := p.node.cri.CreateContainer(ctx, &runtime.CreateContainerRequest{
		PodSandboxId:  p.ID,
		SandboxConfig: p.config,
		Config: &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: c.Name},
			Image:    &runtime.ImageSpec{Image: Image},
			Args:     []string{"-control", inside, "-size", strconv.Itoa(c.MiB), "-seed", strconv.FormatUint(c.Seed, 10), "-repeat=" + strconv.FormatBool(c.Repeat), "-secret=" + strconv.FormatBool(c.Secret)},
			Mounts:   []*runtime.Mount{{HostPath: dir, ContainerPath: inside}},
			LogPath:  p.log(c.Name),
			Linux:    &runtime.LinuxContainerConfig{SecurityContext: security},
		},
	})
	if err != nil {
		return nil, err
	}
	if c.Created != nil {
		if err := c.Created(); err != nil {
			return nil, err
		}
	}
	if _, err := p.node.cri.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
		return nil, err
	}
	conn, err := listener.Accept(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w\n%s", err, p.Output(c.Name))
	}
	container := &Container{Name: c.Name, ID: created.ContainerId, Pod: p, Ready: time.Now(), Conn: conn}
	i, err := p.node.info(ctx, created.ContainerId)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	container.PID, container.Annotations = i.PID, i.RuntimeSpec.Annotations
	return container, nil
}

// Output returns what a container has written.
func (p *Pod) Output(container string) string {
	out, err := os.ReadFile(filepath.Join(p.config.LogDirectory, p.log(container)))
	if err != nil {
		return err.Error()
	}
	return string(out)
}

func (p *Pod) log(container string) string {
	return p.config.Metadata.Uid + "-" + container + ".log"
}

// info is the verbose part of a container's status, as far as it is of use.
type info struct {
	PID         int
	RuntimeSpec struct{ Annotations map[string]string }
}

func (n *Node) info(ctx context.Context, id string) (info, error) {
	r, err := n.cri.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return info{}, err
	}
	if s := r.Status; s.State != runtime.ContainerState_CONTAINER_RUNNING {
		return info{}, fmt.Errorf("not running but %s: %s, exit status %d", s.State, s.Reason, s.ExitCode)
	}
	var i info
	if err := json.Unmarshal([]byte(r.Info["info"]), &i); err != nil {
		return info{}, fmt.Errorf("read verbose status: %w", err)
	}
	return i, nil
}

// Running tells whether the container runs.
func (c *Container) Running(ctx context.Context) (bool, error) {
	r, err := c.Pod.node.cri.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: c.ID})
	if err != nil {
		return false, fmt.Errorf("status of container %s/%s: %w", c.Pod.Name, c.Name, err)
	}
	return r.Status.State == runtime.ContainerState_CONTAINER_RUNNING, nil
}

// KillShim kills what the runtime has run the container's pod by, as the kernel would.
// The runtime ends the pod then.
func (c *Container) KillShim() error {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.PID))
	if err != nil {
		return fmt.Errorf("kill shim: %w", err)
	}
	// The name is in parentheses, and the parent is the second field behind it.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	shim, err := strconv.Atoi(fields[1])
	if err != nil {
		return fmt.Errorf("kill shim: parent of process %d: %w", c.PID, err)
	}
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", shim))
	if err != nil {
		return fmt.Errorf("kill shim: %w", err)
	}
	if !strings.HasPrefix(string(name), "containerd-shim") {
		return fmt.Errorf("kill shim: process %d, the parent of %d, is %q", shim, c.PID, name)
	}
	if err := syscall.Kill(shim, syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill shim: %w", err)
	}
	return nil
}

// stopGrace is far more than anything here takes to exit that is asked to.
const stopGrace = time.Minute

// Stop stops the container, and removes it.
func (c *Container) Stop(ctx context.Context) error {
	cri := c.Pod.node.cri
	_, err := cri.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: c.ID, Timeout: int64(stopGrace.Seconds())})
	if err == nil {
		_, err = cri.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: c.ID})
	}
	if err != nil {
		return fmt.Errorf("stop container %s/%s: %w", c.Pod.Name, c.Name, err)
	}
	return nil
}
