package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Daemon is a container of any image, in a pod of its own.
type Daemon struct {
	id  string
	pod *Pod
	log string
}

// StartDaemon runs a pod with one container, as they are given. It does not wait for
// what the container does.
func (n *Node) StartDaemon(ctx context.Context, sandbox *runtime.PodSandboxConfig, container *runtime.ContainerConfig) (_ *Daemon, err error) {
	sandbox.LogDirectory = n.Path("logs")
	container.LogPath = fmt.Sprintf("%s-%d.log", sandbox.Metadata.Uid, n.pods.Add(1))
	p := &Pod{Name: sandbox.Metadata.Name, node: n, config: sandbox}
	ran, err := n.cri.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: sandbox})
	if err != nil {
		return nil, fmt.Errorf("run pod %s: %w", p.Name, err)
	}
	p.ID = ran.PodSandboxId
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start container of pod %s: %w", p.Name, err), p.Remove(context.WithoutCancel(ctx)))
		}
	}()
	created, err := n.cri.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: p.ID, SandboxConfig: sandbox, Config: container})
	if err != nil {
		return nil, err
	}
	if _, err := n.cri.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
		return nil, err
	}
	return &Daemon{id: created.ContainerId, pod: p, log: filepath.Join(sandbox.LogDirectory, container.LogPath)}, nil
}

// Exec runs a command in the container, and returns its exit status and its output.
func (d *Daemon) Exec(ctx context.Context, command []string) (status int, output string, err error) {
	r, err := d.pod.node.cri.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: d.id, Cmd: command})
	if err != nil {
		return 0, "", fmt.Errorf("run %q in pod %s: %w", command, d.pod.Name, err)
	}
	return int(r.ExitCode), string(r.Stdout) + string(r.Stderr), nil
}

// Log returns what the container has written, each line with what the runtime puts
// before it.
func (d *Daemon) Log() string {
	said, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	return string(said)
}

// Stop asks the container to end, and removes it with its pod. That it ends without
// complaint is part of what a caller wants to know.
func (d *Daemon) Stop(ctx context.Context) error {
	cri := d.pod.node.cri
	_, err := cri.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: d.id, Timeout: int64(stopGrace.Seconds())})
	if err == nil {
		var r *runtime.ContainerStatusResponse
		r, err = cri.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: d.id})
		if err == nil && r.Status.ExitCode != 0 {
			err = fmt.Errorf("ended with exit status %d: %s", r.Status.ExitCode, r.Status.Message)
		}
	}
	if err != nil {
		err = fmt.Errorf("stop container of pod %s: %w", d.pod.Name, err)
	}
	return errors.Join(err, d.pod.Remove(ctx))
}
