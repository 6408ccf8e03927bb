package hooks

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/process"
	"github.com/selective-ksm/selective-ksm/hooks/member"
)

// machine is where the kernel shows its processes and cgroups.
type machine struct {
	proc, cgroups string
}

// errNotOurs says that a container is none whose memory is worth merging.
var errNotOurs = errors.New("it is the sandbox of a pod")

// ErrLeftOut is matched by the reason why a container is not merged, where that is the
// configuration or an annotation, and nothing has failed.
var ErrLeftOut = errors.New("left out")

// leftOut is such a reason.
type leftOut string

func (e leftOut) Error() string      { return string(e) }
func (leftOut) Is(target error) bool { return target == ErrLeftOut }

// container makes out of a state what the engine has to know, but for what the policy
// gives it, and the facts that the policy asks for. The error is the reason why the
// container is not merged, or matches errNotOurs.
func (m machine) container(s specs.State, rules config.Pods) (engine.Container, *member.Facts, error) {
	pod, err := podOf(s)
	if err != nil {
		return engine.Container{}, nil, err
	}
	cgroup, err := m.cgroupOf(s)
	if err != nil {
		return engine.Container{}, nil, err
	}
	c := engine.Container{
		ID: s.ID, Name: pod.container, Pod: pod.name, Namespace: pod.namespace, SandboxID: pod.sandbox,
		CgroupsPath: cgroup,
	}
	facts, err := m.facts(s, pod, rules)
	return c, facts, err
}

// facts are what policy has to know of a container.
func (m machine) facts(s specs.State, p pod, rules config.Pods) (*member.Facts, error) {
	spec, err := readConfig(s.Bundle)
	if err != nil {
		return nil, err
	}
	f := &member.Facts{
		Privileged: privileged(spec), Labels: labelsOf(s, rules.Labels), Annotations: annotationsOf(s.Annotations, p.container),
	}
	if f.HostPID, err = m.hostPID(s.Pid); err != nil {
		return nil, err
	}
	return f, nil
}

// annotationsOf are the values of those of the configuration's annotations that count for
// a container.
func annotationsOf(annotations map[string]string, container string) map[string]string {
	count := map[string]string{}
	for _, key := range config.Annotations() {
		// The forms that NRI has for them, that which counts most first.
		for _, form := range []string{key + "/container." + container, key + "/pod", key} {
			if value, there := annotations[form]; there {
				count[key] = value
				break
			}
		}
	}
	return count
}

// assign asks the policy what a container gets. The error is the reason why that is no
// partition. An annotation that does not count is as if it were not there: the policy
// has chosen what holds instead.
func assign(policy config.Config, c engine.Container, f *member.Facts) (engine.Container, error) {
	c.Partition = ""
	if rule := policy.Pods.RuntimeHandlers; len(rule.Include)+len(rule.Exclude) > 0 {
		// CRI-O writes it down where annotations of the pod may take its place.
		return c, leftOut("pods.runtimeHandlers of the configuration has rules, and a hook is not told of the runtime handler")
	}
	labels := map[string]string{}
	for _, key := range labelKeys(policy.Pods.Labels) {
		value, known := f.Labels[key]
		if !known {
			return c, leftOut(fmt.Sprintf("pods.labels of the configuration has rules for %s, and it is not known whether the pod has that label", key))
		}
		if value != nil {
			labels[key] = *value
		}
	}
	a := policy.Assign(
		config.Sandbox{ID: c.SandboxID, Namespace: c.Namespace, Labels: labels},
		// What the policy checks of a path is that of a runtime's word. This one is the
		// kernel's, and has been found to be the container's own.
		config.Container{
			ID: c.ID, CgroupsPath: "/" + c.ID, HostPID: f.HostPID, Privileged: f.Privileged, Annotations: f.Annotations,
		},
	)
	if a.Partition == "" {
		return c, leftOut(a.Reason)
	}
	c.Partition, c.Interval, c.OnDemand, c.Secrets, c.Because = a.Partition, a.Interval, a.OnDemand, a.Secrets, a.Because
	return c, nil
}

// pod is the pod of a container, as its runtime calls it.
type pod struct {
	sandbox, namespace, name, container string
}

// keys are the annotations by which a runtime tells of a pod.
type keys struct {
	sandbox, kind, namespace, name, container string
}

var (
	// crio is CRI-O's, and podman's for its pods (cri-o/pkg/annotations). CRI-O
	// puts the labels of the kubelet among the annotations of a container.
	crio = keys{
		sandbox:   "io.kubernetes.cri-o.SandboxID",
		kind:      "io.kubernetes.cri-o.ContainerType",
		namespace: "io.kubernetes.pod.namespace",
		name:      "io.kubernetes.pod.name",
		container: "io.kubernetes.container.name",
	}
	// containerd is that of its CRI plugin (containerd/internal/cri/annotations).
	containerd = keys{
		sandbox:   "io.kubernetes.cri.sandbox-id",
		kind:      "io.kubernetes.cri.container-type",
		namespace: "io.kubernetes.cri.sandbox-namespace",
		name:      "io.kubernetes.cri.sandbox-name",
		container: "io.kubernetes.cri.container-name",
	}
)

// podOf tells the pod of a container. One without any is a pod of its own. A runtime
// overwrites its own keys, but passes on those of the other that whoever made the pod
// has given: so a container that has both may be in the pod of somebody else.
func podOf(s specs.State) (pod, error) {
	_, isCRIO := s.Annotations[crio.sandbox]
	_, isContainerd := s.Annotations[containerd.sandbox]
	var k keys
	switch {
	case isCRIO && isContainerd:
		return pod{}, fmt.Errorf("annotations %s and %s are both there, of which only one can be the runtime's", crio.sandbox, containerd.sandbox)
	case isCRIO:
		k = crio
	case isContainerd:
		k = containerd
	default:
		return pod{sandbox: s.ID}, nil
	}
	if s.Annotations[k.kind] == "sandbox" {
		return pod{}, errNotOurs
	}
	p := pod{
		sandbox:   s.Annotations[k.sandbox],
		namespace: s.Annotations[k.namespace],
		name:      s.Annotations[k.name],
		container: s.Annotations[k.container],
	}
	if !isID(p.sandbox) {
		return pod{}, fmt.Errorf("annotation %s: %q is not the id of a pod", k.sandbox, shown(p.sandbox))
	}
	return p, nil
}

// hierarchies are those that runtimes put every container in: of cgroup v2 and v1.
var hierarchies = []string{"", "memory", "pids", "name=systemd"}

// cgroupOf finds the cgroup of a container by its process, and makes sure that it is the
// container's own, by its name, and that the process is in it.
func (m machine) cgroupOf(s specs.State) (string, error) {
	file, err := os.Open(filepath.Join(m.proc, strconv.Itoa(s.Pid), "cgroup"))
	if err != nil {
		return "", fmt.Errorf("cgroup of process %d: %w", s.Pid, err)
	}
	defer file.Close()
	// A line is hierarchy:controllers:path (cgroups(7)).
	paths := map[string]string{}
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		if part := strings.SplitN(lines.Text(), ":", 3); len(part) == 3 {
			for controller := range strings.SplitSeq(part[1], ",") {
				paths[controller] = part[2]
			}
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("cgroup of process %d: %w", s.Pid, err)
	}
	for _, h := range hierarchies {
		own := ownCgroup(paths[h], s.ID)
		if own == "" {
			continue
		}
		member, err := process.Member(m.cgroups, own, s.Pid)
		if err != nil {
			return "", err
		}
		if member {
			return own, nil
		}
	}
	return "", fmt.Errorf("process %d is in no cgroup that is named after the container", s.Pid)
}

// scopes are what runtimes put before the id of a container in the name of its cgroup.
var scopes = []string{"libpod-", "crio-", "cri-containerd-", "runc-", "crun-"}

// ownCgroup returns the part of a cgroup's path that ends with the cgroup that is named
// after a container, or nothing. Runtimes and the container make others in that one.
func ownCgroup(cgroup, id string) string {
	if !path.IsAbs(cgroup) || path.Clean(cgroup) != cgroup {
		return ""
	}
	names := strings.Split(cgroup, "/")
	for i, name := range names {
		if i == 0 {
			continue
		}
		own := name == id
		for _, scope := range scopes {
			own = own || name == scope+id || name == scope+id+".scope"
		}
		if own {
			return strings.Join(names[:i+1], "/")
		}
	}
	return ""
}
