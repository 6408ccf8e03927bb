package config

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Sandbox is what policy knows of a pod sandbox.
type Sandbox struct {
	// ID is the runtime's id of the sandbox.
	ID string
	// Namespace is the pod's Kubernetes namespace.
	Namespace string
	// RuntimeHandler is that of the pod's runtime class. It is empty for the
	// runtime's default.
	RuntimeHandler string
	// Labels are the pod's.
	Labels map[string]string
}

// Container is what policy knows of a container.
type Container struct {
	// ID is the runtime's id of the container.
	ID string
	// CgroupsPath is the container's cgroup as the runtime names it.
	CgroupsPath string
	// HostPID is that it sees the processes of the machine.
	HostPID bool
	// Privileged is that it has the devices of the machine, or may have.
	Privileged bool
	// Annotations are the values of those of [Annotations] that the pod has for this
	// container.
	Annotations map[string]string
}

// Assignment is what policy gives a container.
type Assignment struct {
	// Partition is the one that it belongs to. It is empty if there is none.
	Partition string
	// Reason says why there is none.
	Reason string
	// Because says what has chosen the one that there is.
	Because string
	// Interval is how often it is to be merged. Zero leaves that to the engine.
	Interval time.Duration
	// OnDemand has it merged only when somebody asks for it.
	OnDemand bool
	// Secrets merges memory that its programs have marked as secret.
	Secrets bool
	// Ignored are the annotations that ask for what cannot be.
	Ignored []Ignored
}

// Ignored is an annotation whose value does not count.
type Ignored struct {
	Annotation, Value string
	// Why says what is wrong with it, and what holds instead.
	Why string
}

// widths are the scopes from the narrowest to the widest. Each lies inside of all that
// come after it, but for a pod whose containers are in different groups.
var widths = []Scope{ScopeContainer, ScopePod, ScopeGroup, ScopeNamespace}

// The kernel reads 31 bytes of a partition's name. Of a runtime's id there is room
// for 88 bits, more than the 13 digits that crictl prints. What users name is hashed,
// and they may look for two names of the same hash: so those get all the characters
// that the kernel takes, which makes 132 bits.
const nameDigits = 22

var (
	runtimeID = regexp.MustCompile(`^[0-9a-f]{64}$`)
	ownName   = regexp.MustCompile(`^sksm-((pod|ctr)-[0-9a-f]{22}|(ns|grp)-[A-Za-z0-9_-]{22})$`)
	groupName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)
)

// Owned reports whether a partition's name has the shape that [Config.Assign]
// gives. Only such partitions may be removed by us.
func Owned(partition string) bool {
	return ownName.MatchString(partition)
}

// Assign says which partition a container of a sandbox belongs to, and how it is
// merged in it. The same arguments give the same partition in every version of this
// package, so that one plugin finds what another one left.
func (c Config) Assign(s Sandbox, ctr Container) Assignment {
	if reason := c.leavesOut(s, ctr); reason != "" {
		return Assignment{Reason: reason}
	}
	a := Assignment{Secrets: c.Secrets}
	on := !c.Pods.OnlyAnnotated
	a.read(ctr, AnnotationMerge, "it is not merged", func(value string) (wrong string) {
		on = value == "on" || value == "on-demand"
		a.OnDemand = value == "on-demand"
		switch value {
		case "on", "on-demand":
		case "off":
			a.Reason = AnnotationMerge + ` is "off"`
		default:
			a.Reason = AnnotationMerge + " is not known"
			return "write on, on-demand or off"
		}
		return ""
	})
	if !on && a.Reason == "" {
		a.Reason = fmt.Sprintf("pods.onlyAnnotated of the configuration leaves it out, as it has no annotation %s: \"on\"", AnnotationMerge)
	}
	if a.Reason != "" {
		return a
	}
	a.read(ctr, AnnotationInterval, "that of the configuration holds", func(value string) (wrong string) {
		d, err := time.ParseDuration(value)
		if err != nil || d < minInterval {
			return fmt.Sprintf("write a duration of %s or more, such as 90s or 10m", minInterval)
		}
		a.Interval = d
		return ""
	})
	a.read(ctr, AnnotationIncludeSecrets, "they are not merged", func(value string) (wrong string) {
		a.Secrets = value == "true"
		if value != "true" && value != "false" {
			return "write true or false"
		}
		return ""
	})
	c.place(s, ctr, &a)
	return a
}

// leavesOut says why a container is not merged, whatever its annotations are.
func (c Config) leavesOut(s Sandbox, ctr Container) (reason string) {
	switch {
	case s.ID == "":
		return "the runtime gave no sandbox id"
	case ctr.ID == "":
		return "the runtime gave no container id"
	case !strings.HasSuffix(ctr.CgroupsPath, "/"+ctr.ID) && !strings.HasSuffix(ctr.CgroupsPath, ":"+ctr.ID):
		// A cgroup that is not the container's alone would bring the processes of
		// others into its partition.
		return fmt.Sprintf("its cgroup %q is not named after the container, so that its processes cannot be told from others", ctr.CgroupsPath)
	case ctr.HostPID && !c.Pods.HostPID:
		return "it sees the processes of the machine, and pods.hostPID of the configuration is false"
	case ctr.Privileged && !c.Pods.Privileged:
		return "it is privileged, and pods.privileged of the configuration is false"
	}
	return c.Pods.leaveOut(s)
}

// place finds the container's partition. Annotations may narrow it, and widen it only
// into a shared group that the configuration has.
func (c Config) place(s Sandbox, ctr Container, a *Assignment) {
	scope, group := c.PartitionBy, ""
	if scope == ScopeGroup {
		// That of a container that names no group.
		scope = ScopePod
	}
	unasked, shared := scope, false
	byConfiguration := fmt.Sprintf("partitionBy of the configuration is %s", c.PartitionBy)
	a.Because = byConfiguration
	a.read(ctr, AnnotationPartition, "it is merged with itself alone", func(value string) (wrong string) {
		name, isGroup := strings.CutPrefix(value, "group:")
		a.Because = fmt.Sprintf("%s is %q", AnnotationPartition, value)
		switch {
		case isGroup && groupName.MatchString(name):
			scope, group = ScopeGroup, name
			shared = matchAny(c.SharedGroups[name], s.Namespace)
		case value != string(ScopeGroup) && slices.Contains(widths, Scope(value)):
			scope = Scope(value)
		default:
			scope = ScopeContainer
			a.Because = AnnotationPartition + " is not known"
			return "write container, pod, namespace or group:NAME"
		}
		return ""
	})
	if !shared && slices.Index(widths, scope) > slices.Index(widths, c.PartitionBy) {
		a.ignore(ctr, AnnotationPartition, fmt.Sprintf("the configuration has partitionBy: %s, which may not be widened: that holds", c.PartitionBy))
		scope, a.Because = unasked, byConfiguration
	}
	switch scope {
	case ScopeContainer:
		a.Partition = "sksm-ctr-" + shortID(ctr.ID)
	case ScopePod:
		a.Partition = "sksm-pod-" + shortID(s.ID)
	case ScopeGroup, ScopeNamespace:
		switch {
		case s.Namespace == "":
			a.Reason = "the runtime gave no namespace of its pod"
		case shared:
			a.Because += ", and sharedGroups of the configuration has its namespace"
			a.Partition = "sksm-grp-" + hashed("shared group", group)
		case scope == ScopeGroup:
			a.Partition = "sksm-grp-" + hashed("group", s.Namespace, group)
		default:
			a.Partition = "sksm-ns-" + hashed("namespace", s.Namespace)
		}
	}
}

// hashed is what a partition's name has of names that users give. Each kind and each
// name goes in with its length, so that no two lists are the same bytes.
func hashed(kind string, names ...string) string {
	h := sha256.New()
	for _, s := range append([]string{"selective-ksm " + kind}, names...) {
		// A hash never returns an error.
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(s))))
		h.Write([]byte(s))
	}
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil))[:nameDigits]
}

// shortID is the beginning of a runtime's id, so that an operator finds a
// partition's pod by it. An id of another form is hashed first.
func shortID(id string) string {
	if !runtimeID.MatchString(id) {
		sum := sha256.Sum256([]byte(id))
		id = hex.EncodeToString(sum[:])
	}
	return id[:nameDigits]
}
