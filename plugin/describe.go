package plugin

import (
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/api"
	nri "github.com/containerd/nri/pkg/plugin"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
)

// subject is a container as the runtime told of it: what the engine has to know, but for
// what policy gives it, and what policy has to know.
type subject struct {
	engine    engine.Container
	sandbox   config.Sandbox
	container config.Container
	running   bool
	// assigned is the engine's container with what policy gave it.
	assigned engine.Container
	// sandboxCgroup is that of the pod's sandbox. virtual is that the container is in a VM.
	sandboxCgroup string
	virtual       bool
}

// describe takes what matters of a container out of what the runtime says. It keeps
// nothing else of that, as all containers are kept. The pod is nil if it is not known.
func describe(pod *api.PodSandbox, ctr *api.Container) *subject {
	s := &subject{
		engine: engine.Container{
			ID:          ctr.GetId(),
			Name:        ctr.GetName(),
			Pod:         pod.GetName(),
			Namespace:   pod.GetNamespace(),
			SandboxID:   pod.GetId(),
			CgroupsPath: ctr.GetLinux().GetCgroupsPath(),
		},
		sandbox: config.Sandbox{
			ID:             pod.GetId(),
			Namespace:      pod.GetNamespace(),
			RuntimeHandler: pod.GetRuntimeHandler(),
			Labels:         pod.GetLabels(),
		},
		container: config.Container{
			ID:          ctr.GetId(),
			CgroupsPath: ctr.GetLinux().GetCgroupsPath(),
			HostPID:     hostPID(pod, ctr),
			Privileged:  privileged(ctr),
		},
		sandboxCgroup: pod.GetLinux().GetCgroupsPath(),
		running:       ctr.GetState() == api.ContainerState_CONTAINER_RUNNING || ctr.GetState() == api.ContainerState_CONTAINER_PAUSED,
	}
	for _, key := range config.Annotations() {
		// Of the pod only: NRI has no annotations of a container that its user wrote.
		if value, ok := nri.GetEffectiveAnnotation(pod, key, ctr.GetName()); ok {
			if s.container.Annotations == nil {
				s.container.Annotations = map[string]string{}
			}
			s.container.Annotations[key] = value
		}
	}
	return s
}

// hostPID reports whether a container is in the machine's pid namespace, or may be: it
// has no other, or it is in that of a process of its pod, which has no other itself.
// containerd has it the second way (WithPodNamespaces in its internal/cri/opts).
func hostPID(pod *api.PodSandbox, ctr *api.Container) bool {
	own, given := pidNamespace(ctr.GetLinux().GetNamespaces())
	_, podHas := pidNamespace(pod.GetLinux().GetNamespaces())
	return !given || own != "" && !podHas
}

func pidNamespace(all []*api.LinuxNamespace) (path string, given bool) {
	for _, n := range all {
		if n.GetType() == "pid" {
			return n.GetPath(), true
		}
	}
	return "", false
}

// privileged reports whether a container is privileged, or may be: NRI tells neither
// that nor the capabilities (containerd/nri v0.12). But containerd makes sysfs writable
// for privileged containers, and for no others (WithPrivileged in its pkg/oci). Where a
// volume is mounted in the place of sysfs that cannot be seen, and the container is
// taken for privileged. So is one that may use all devices.
func privileged(ctr *api.Container) bool {
	readOnly := false
	for _, m := range ctr.GetMounts() {
		if m.GetType() != "sysfs" {
			continue
		}
		if !slices.Contains(m.GetOptions(), "ro") {
			return true
		}
		readOnly = true
	}
	return !readOnly || slices.ContainsFunc(ctr.GetLinux().GetResources().GetDevices(), func(d *api.LinuxDeviceCgroup) bool {
		return d.GetAllow() && (d.GetType() == "" || d.GetType() == "a") && d.GetMajor() == nil && d.GetMinor() == nil &&
			strings.Contains(d.GetAccess(), "w")
	})
}
