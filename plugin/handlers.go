package plugin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/sirupsen/logrus"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/optin"
)

// binaryPath is where a container finds the program that opts it in.
const binaryPath = "/.selective-ksm"

// addTimeout is how long a container's creation may wait for its partition.
const addTimeout = 50 * time.Millisecond

// Configure takes the configuration that the runtime gives, unless there is one
// already. It is the only handler that returns an error: the runtime then goes on
// without us.
func (p *plugin) Configure(_ context.Context, text, runtime, version string) (api.EventMask, error) {
	p.change(func(s *state) { s.configured = true })
	if p.Config != nil {
		return 0, nil
	}
	c, err := config.Parse([]byte(text))
	var wrapper string
	if err == nil {
		wrapper, err = p.prepare(c)
	}
	if err == nil {
		err = p.Apply(c)
	}
	if err != nil {
		err = fmt.Errorf("%w (%s %s): %w", ErrConfig, runtime, version, err)
		p.change(func(s *state) { s.refused = err })
		return 0, err
	}
	p.use(c, wrapper)
	return 0, nil
}

// Synchronize takes over what the runtime has.
func (p *plugin) Synchronize(_ context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	sandboxes := map[string]*api.PodSandbox{}
	for _, pod := range pods {
		sandboxes[pod.GetId()] = pod
	}
	there := map[string]bool{}
	for _, ctr := range containers {
		there[ctr.GetId()] = true
	}
	p.change(func(s *state) { maps.DeleteFunc(s.told, func(id, _ string) bool { return !there[id] }) })

	var created, running []engine.Container
	for _, ctr := range containers {
		c, err := p.assign(sandboxes[ctr.GetPodSandboxId()], ctr)
		if err != nil {
			p.notMerged(sandboxes[ctr.GetPodSandboxId()], ctr, err)
			continue
		}
		switch ctr.GetState() {
		case api.ContainerState_CONTAINER_CREATED:
			created = append(created, c)
		case api.ContainerState_CONTAINER_RUNNING, api.ContainerState_CONTAINER_PAUSED:
			running = append(running, c)
		}
	}
	if err := p.Engine.Reconcile(created, running); err != nil {
		p.Log.WithError(err).Warn("partitions that are not needed any more stay")
	}
	p.change(func(s *state) { s.synchronized = true })
	p.Log.WithFields(logrus.Fields{"created": len(created), "running": len(running)}).Info("synchronized with the runtime")
	return nil, nil
}

// CreateContainer gives the container its partition, and puts the opt-in before its
// command where the engine does not do that from outside.
func (p *plugin) CreateContainer(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	adjustment, err := p.create(ctx, pod, ctr)
	if err != nil {
		p.notMerged(pod, ctr, err)
	}
	return adjustment, nil, nil
}

func (p *plugin) create(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) (*api.ContainerAdjustment, error) {
	c, err := p.assign(pod, ctr)
	if err != nil {
		return nil, err
	}
	var adjustment *api.ContainerAdjustment
	if p.wraps(p.get().policy) {
		if adjustment, err = p.wrap(ctr); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, addTimeout)
	defer cancel()
	if err := p.Engine.Add(ctx, c); err != nil {
		return nil, err
	}
	return adjustment, nil
}

// PostStartContainer has the container merged.
func (p *plugin) PostStartContainer(_ context.Context, _ *api.PodSandbox, ctr *api.Container) error {
	p.Engine.Start(ctr.GetId())
	return nil
}

// StopContainer comes when the container's first process has ended, too.
func (p *plugin) StopContainer(_ context.Context, _ *api.PodSandbox, ctr *api.Container) ([]*api.ContainerUpdate, error) {
	p.Engine.Stop(ctr.GetId())
	return nil, nil
}

// RemoveContainer comes for containers that were never started, too.
func (p *plugin) RemoveContainer(_ context.Context, _ *api.PodSandbox, ctr *api.Container) error {
	p.Engine.Stop(ctr.GetId())
	p.change(func(s *state) { delete(s.told, ctr.GetId()) })
	return nil
}

// StopPodSandbox ends what is left of a pod.
func (p *plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.Engine.StopSandbox(pod.GetId())
	return nil
}

// RemovePodSandbox ends what is left of a pod.
func (p *plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.Engine.StopSandbox(pod.GetId())
	return nil
}

// assign asks the policy for a container's partition. The error is the reason why
// it has none.
func (p *plugin) assign(pod *api.PodSandbox, ctr *api.Container) (engine.Container, error) {
	cgroup := ctr.GetLinux().GetCgroupsPath()
	partition, reason := p.get().policy.Assign(
		config.Sandbox{ID: pod.GetId()},
		config.Container{ID: ctr.GetId(), CgroupsPath: cgroup},
	)
	if partition == "" {
		return engine.Container{}, errors.New(reason)
	}
	return engine.Container{
		ID:          ctr.GetId(),
		Name:        ctr.GetName(),
		Pod:         pod.GetName(),
		Namespace:   pod.GetNamespace(),
		SandboxID:   pod.GetId(),
		CgroupsPath: cgroup,
		Partition:   partition,
		Secrets:     p.get().policy.Secrets,
	}, nil
}

// wrap puts the opt-in before a container's command. It adjusts nothing where that
// has been done already, by an instance of us that another takes over from.
func (p *plugin) wrap(ctr *api.Container) (*api.ContainerAdjustment, error) {
	command := ctr.GetArgs()
	if len(command) == 0 {
		return nil, errors.New("it has no command")
	}
	if optin.Wrapped(binaryPath, command) {
		return nil, nil
	}
	// For each container: the file may have gone, and mounting what is not there
	// would fail the container.
	wrapper := p.get().wrapper
	if err := wrapperRuns(wrapper, ctr); err != nil {
		return nil, err
	}
	adjustment := &api.ContainerAdjustment{}
	// Not SetArgs, which fails the container if a plugin before us has set them.
	adjustment.UpdateArgs(optin.Wrap(binaryPath, command))
	adjustment.AddMount(&api.Mount{
		Source:      wrapper,
		Destination: binaryPath,
		Type:        "bind",
		Options:     []string{"bind", "rprivate", "ro", "exec"},
	})
	return adjustment, nil
}

// notMerged logs why a container is left alone, once for each reason: the runtime
// tells of all containers whenever we connect to it.
func (p *plugin) notMerged(pod *api.PodSandbox, ctr *api.Container, reason error) {
	told := false
	p.change(func(s *state) {
		told = s.told[ctr.GetId()] == reason.Error()
		if s.told == nil {
			s.told = map[string]string{}
		}
		s.told[ctr.GetId()] = reason.Error()
	})
	if told {
		return
	}
	p.Log.WithFields(logrus.Fields{
		"pod": pod.GetName(), "namespace": pod.GetNamespace(), "container": ctr.GetName(), "container_id": ctr.GetId(),
	}).WithError(reason).Warn("container is not merged")
}
