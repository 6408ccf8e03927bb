package plugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/sirupsen/logrus"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/optin"
)

// What became of a container is in annotations of its own, where only the runtime can
// read it: in its OCI configuration. We ourselves read none of them, as they may be of
// another configuration or not be ours.
const (
	annotationPartition = "selective-ksm.dev/partition"
	annotationInterface = "selective-ksm.dev/interface"
	annotationNotMerged = "selective-ksm.dev/not-merged"
)

// binaryPath is where a container finds the program that opts it in.
const binaryPath = "/.selective-ksm"

// addTimeout is how long a container's creation may wait for its partition: half of what
// any answer may take.
const addTimeout = 25 * time.Millisecond

// Configure takes the configuration that the runtime gives, unless there is one
// already. It is the only handler that returns an error: the runtime then goes on
// without us.
func (p *plugin) Configure(_ context.Context, text, runtime, version string) (api.EventMask, error) {
	p.change(func(s *state) { s.configured = true })
	if p.Config != nil {
		return 0, nil
	}
	c, err := config.Parse([]byte(text))
	var wrapper kept
	if err == nil {
		wrapper, err = p.prepare(c)
	}
	if err == nil {
		err = p.apply(c, wrapper)
	}
	if err != nil {
		err = fmt.Errorf("%w (%s %s): %w", ErrConfig, runtime, version, err)
		p.change(func(s *state) { s.refused = err })
		return 0, err
	}
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

	maps.DeleteFunc(p.ignored, func(id string, _ []config.Ignored) bool { return sandboxes[id] == nil })
	before := p.subjects
	p.subjects = map[string]*subject{}
	clear(p.vmms)
	maps.DeleteFunc(p.guests, func(id string, _ *guest) bool { return sandboxes[id] == nil })
	var subjects []*subject
	for _, ctr := range containers {
		switch ctr.GetState() {
		case api.ContainerState_CONTAINER_CREATED, api.ContainerState_CONTAINER_RUNNING, api.ContainerState_CONTAINER_PAUSED:
			s := describe(sandboxes[ctr.GetPodSandboxId()], ctr)
			s.virtual = s.running && inVM(sandboxes[ctr.GetPodSandboxId()], ctr)
			p.subjects[ctr.GetId()] = s
			subjects = append(subjects, s)
		}
	}
	for id, s := range before {
		if p.subjects[id] == nil {
			p.guestEnded(s)
		}
	}
	created, running := p.reconcile(subjects)
	p.change(func(s *state) { s.synchronized = true })
	p.Log.WithFields(logrus.Fields{"created": created, "running": running}).Info("synchronized with the runtime")
	return nil, nil
}

// reconcile has the engine take over all containers as policy has them now, and returns
// how many it gave partitions to.
func (p *plugin) reconcile(subjects []*subject) (created, running int) {
	var lists [2][]engine.Container // created, running
	var given [2]int
	for _, s := range subjects {
		c, err := p.assign(s)
		list := 0
		if s.running {
			list = 1
		}
		if err != nil {
			p.notMerged(s, err)
		} else {
			given[list]++
		}
		lists[list] = append(lists[list], c)
	}
	for _, s := range subjects {
		if id := s.sandbox.ID; s.virtual && !slices.ContainsFunc(lists[1], func(c engine.Container) bool { return c.ID == id }) {
			if vmm, there := p.vmm(id); there {
				p.vmms[id] = true
				lists[1] = append(lists[1], vmm)
			}
		}
	}
	if err := p.Engine.Reconcile(lists[0], lists[1]); err != nil {
		p.Log.WithError(err).Warn("partitions that are not needed any more stay")
	}
	return given[0], given[1]
}

// CreateContainer gives the container its partition, and puts the opt-in before its
// command where the engine does not do that from outside.
func (p *plugin) CreateContainer(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	s := describe(pod, ctr)
	p.subjects[ctr.GetId()] = s
	adjustment, partition, err := p.create(ctx, s, ctr)
	if adjustment == nil {
		adjustment = &api.ContainerAdjustment{}
	}
	if err != nil {
		p.notMerged(s, err)
		// What is not UTF-8 could not be sent.
		adjustment.AddAnnotation(annotationNotMerged, strings.ToValidUTF8(err.Error(), "?"))
	} else {
		adjustment.AddAnnotation(annotationPartition, partition)
		adjustment.AddAnnotation(annotationInterface, p.Interface)
	}
	return adjustment, nil, nil
}

func (p *plugin) create(ctx context.Context, s *subject, ctr *api.Container) (adjustment *api.ContainerAdjustment, partition string, err error) {
	c, err := p.assign(s)
	if err == nil && p.wraps(p.get().policy) {
		adjustment, err = p.wrap(ctr)
	}
	if err != nil {
		c.Partition, c.Because = "", err.Error()
		if !errors.As(err, new(leftOut)) {
			c.Cause = engine.CauseOptIn
		}
		s.assigned = c
	}
	ctx, cancel := context.WithTimeout(ctx, addTimeout)
	defer cancel()
	refused := p.Engine.Add(ctx, c)
	if p.vmms[c.SandboxID] {
		p.followVMM(ctx, c.SandboxID)
	}
	if refused != nil {
		return nil, "", refused
	}
	return adjustment, c.Partition, err
}

// PostStartContainer has the container merged.
func (p *plugin) PostStartContainer(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) error {
	if s := p.subjects[ctr.GetId()]; s != nil {
		s.running = true
		if s.virtual = inVM(pod, ctr); s.virtual {
			p.followVMM(ctx, s.sandbox.ID)
		}
	}
	p.Engine.Start(ctr.GetId())
	return nil
}

// StopContainer comes when the container's first process has ended, too.
func (p *plugin) StopContainer(ctx context.Context, _ *api.PodSandbox, ctr *api.Container) ([]*api.ContainerUpdate, error) {
	p.ended(ctx, ctr.GetId())
	return nil, nil
}

// RemoveContainer comes for containers that were never started, too.
func (p *plugin) RemoveContainer(ctx context.Context, _ *api.PodSandbox, ctr *api.Container) error {
	p.ended(ctx, ctr.GetId())
	p.change(func(s *state) { delete(s.told, ctr.GetId()) })
	return nil
}

// ended has the engine know that a container has ended.
func (p *plugin) ended(ctx context.Context, id string) {
	s := p.subjects[id]
	delete(p.subjects, id)
	p.Engine.Stop(id)
	if s == nil {
		return
	}
	p.guestEnded(s)
	if p.vmms[s.sandbox.ID] {
		p.followVMM(ctx, s.sandbox.ID)
	}
}

// StopPodSandbox ends what is left of a pod.
func (p *plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.forget(pod)
	return nil
}

// RemovePodSandbox ends what is left of a pod.
func (p *plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.forget(pod)
	return nil
}

func (p *plugin) forget(pod *api.PodSandbox) {
	maps.DeleteFunc(p.subjects, func(_ string, s *subject) bool { return s.sandbox.ID == pod.GetId() })
	delete(p.ignored, pod.GetId())
	delete(p.vmms, pod.GetId())
	delete(p.guests, pod.GetId())
	p.change(func(s *state) { delete(s.told, pod.GetId()) })
	p.Engine.StopSandbox(pod.GetId())
}

// leftOut is why the configuration or its annotations leave a container out.
type leftOut string

func (e leftOut) Error() string { return string(e) }

// assign asks the policy for a container's partition. If it has none, the error is the
// reason why.
func (p *plugin) assign(s *subject) (engine.Container, error) {
	a := p.get().policy.Assign(s.sandbox, s.container)
	for _, i := range a.Ignored {
		p.doesNotCount(s, i)
	}
	c := s.engine
	c.Because = cmp.Or(a.Reason, a.Because)
	for _, i := range a.Ignored {
		c.Because += fmt.Sprintf("; %s: %q does not count: %s", i.Annotation, i.Value, i.Why)
	}
	if a.Partition != "" {
		c.Partition, c.Interval, c.OnDemand, c.Secrets = a.Partition, a.Interval, a.OnDemand, a.Secrets
	}
	s.assigned = c
	if a.Partition == "" {
		return c, leftOut(a.Reason)
	}
	return c, nil
}

// doesNotCount logs an annotation whose value does not count, once for a pod, however
// many containers it is for.
func (p *plugin) doesNotCount(s *subject, i config.Ignored) {
	id := s.sandbox.ID
	if slices.Contains(p.ignored[id], i) {
		return
	}
	p.ignored[id] = append(p.ignored[id], i)
	p.ignoredCount++
	if p.Ignored != nil {
		p.Ignored(i.Annotation)
	}
	p.Log.WithFields(logrus.Fields{
		"pod": s.engine.Pod, "namespace": s.engine.Namespace, "container": s.engine.Name,
		"annotation": i.Annotation, "value": i.Value, "count": p.ignoredCount,
	}).Warn("annotation does not count: " + i.Why)
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
func (p *plugin) notMerged(s *subject, reason error) {
	c, told := s.engine, false
	p.change(func(s *state) {
		told = s.told[c.ID] == reason.Error()
		if s.told == nil {
			s.told = map[string]string{}
		}
		s.told[c.ID] = reason.Error()
	})
	if told {
		return
	}
	level := logrus.WarnLevel
	if errors.As(reason, new(leftOut)) {
		level = logrus.InfoLevel
	}
	fields := logrus.Fields{"pod": c.Pod, "namespace": c.Namespace, "container": c.Name, "container_id": c.ID}
	if of := s.assigned.Partition; of != "" {
		// That the kernel refused.
		fields["partition"] = of
	}
	p.Log.WithFields(fields).WithError(reason).Log(level, "container is not merged")
}
