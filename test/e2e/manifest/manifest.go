// Package manifest reads a DaemonSet with its ConfigMaps, and says its container in the
// words of CRI, as the kubelet does.
//
// It reads strictly: a field that it would not translate is an error, so that what a test
// runs is what the manifest says. What has no meaning on one node without an API server
// is passed over by name. Only the network is another one: the machine's, as there is no
// network plugin.
package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// DaemonSet is one with a single container.
type DaemonSet struct {
	Container
	// ConfigMaps have the content of files, by the names of the ConfigMap and the file.
	ConfigMaps map[string]map[string]string

	meta metadata
	pod  podSpec
}

// ignored is what has no meaning here.
type ignored any

type metadata struct {
	Name, Namespace     string
	Labels, Annotations map[string]string
}

type daemonSet struct {
	APIVersion ignored `yaml:"apiVersion"`
	Kind       ignored
	Metadata   metadata
	Spec       struct {
		Selector       ignored
		UpdateStrategy ignored `yaml:"updateStrategy"`
		Template       struct {
			Metadata metadata
			Spec     podSpec
		}
	}
}

type configMap struct {
	APIVersion ignored `yaml:"apiVersion"`
	Kind       ignored
	Metadata   metadata
	Data       map[string]string
}

type podSpec struct {
	NodeSelector       ignored `yaml:"nodeSelector"`
	Tolerations        ignored
	PriorityClassName  ignored `yaml:"priorityClassName"`
	EnableServiceLinks ignored `yaml:"enableServiceLinks"`

	AutomountServiceAccountToken *bool `yaml:"automountServiceAccountToken"`
	HostPID                      bool  `yaml:"hostPID"`
	Containers                   []Container
	Volumes                      []volume
}

type volume struct {
	Name      string
	ConfigMap *struct{ Name string }       `yaml:"configMap"`
	HostPath  *struct{ Path, Type string } `yaml:"hostPath"`
}

// Container is as in core/v1.
type Container struct {
	Name            string
	Image           string
	ImagePullPolicy ignored `yaml:"imagePullPolicy"`
	Args            []string
	Ports           []struct {
		Name          string
		ContainerPort int `yaml:"containerPort"`
	}
	SecurityContext securityContext `yaml:"securityContext"`
	Resources       struct{ Requests, Limits resources }
	StartupProbe    Probe `yaml:"startupProbe"`
	ReadinessProbe  Probe `yaml:"readinessProbe"`
	LivenessProbe   Probe `yaml:"livenessProbe"`
	VolumeMounts    []struct {
		Name      string
		MountPath string `yaml:"mountPath"`
		ReadOnly  bool   `yaml:"readOnly"`
	} `yaml:"volumeMounts"`
}

// Probe is as in core/v1, as far as it does not say when.
type Probe struct {
	Exec             struct{ Command []string }
	PeriodSeconds    ignored `yaml:"periodSeconds"`
	TimeoutSeconds   ignored `yaml:"timeoutSeconds"`
	FailureThreshold ignored `yaml:"failureThreshold"`
}

type securityContext struct {
	RunAsUser                *int64 `yaml:"runAsUser"`
	RunAsGroup               *int64 `yaml:"runAsGroup"`
	Privileged               bool
	AllowPrivilegeEscalation *bool `yaml:"allowPrivilegeEscalation"`
	ReadOnlyRootFilesystem   bool  `yaml:"readOnlyRootFilesystem"`
	Capabilities             struct{ Add, Drop []string }
	SeccompProfile           profile `yaml:"seccompProfile"`
	AppArmorProfile          profile `yaml:"appArmorProfile"`
}

type profile struct{ Type string }

type resources struct{ CPU, Memory string }

// Read reads the only DaemonSet in a file, and the ConfigMaps. Other objects are passed
// over.
func Read(path string) (*DaemonSet, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	d, err := parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return d, nil
}

func parse(text []byte) (*DaemonSet, error) {
	d := &DaemonSet{ConfigMaps: map[string]map[string]string{}}
	found := 0
	for documents := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var document yaml.Node
		if err := documents.Decode(&document); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		var what struct{ Kind string }
		if err := document.Decode(&what); err != nil {
			return nil, err
		}
		switch what.Kind {
		case "ConfigMap":
			var m configMap
			if err := strict(&document, &m); err != nil {
				return nil, fmt.Errorf("ConfigMap: %w", err)
			}
			d.ConfigMaps[m.Metadata.Name] = m.Data
		case "DaemonSet":
			var s daemonSet
			if err := strict(&document, &s); err != nil {
				return nil, fmt.Errorf("DaemonSet: %w", err)
			}
			found++
			d.meta, d.pod = s.Spec.Template.Metadata, s.Spec.Template.Spec
			d.meta.Name, d.meta.Namespace = s.Metadata.Name, s.Metadata.Namespace
		}
	}
	if found != 1 || len(d.pod.Containers) != 1 {
		return nil, fmt.Errorf("%d DaemonSets, the last with %d containers: it has to be one of one", found, len(d.pod.Containers))
	}
	if mount := d.pod.AutomountServiceAccountToken; mount == nil || *mount {
		return nil, errors.New("automountServiceAccountToken is not false, and there is no API server")
	}
	d.Container = d.pod.Containers[0]
	return d, nil
}

// strict decodes a document whose fields are all known.
func strict(document *yaml.Node, into any) error {
	text, err := yaml.Marshal(document)
	if err != nil {
		return err
	}
	fields := yaml.NewDecoder(bytes.NewReader(text))
	fields.KnownFields(true)
	return fields.Decode(into)
}

// Sandbox is the sandbox of a pod.
func (d *DaemonSet) Sandbox(uid string) (*runtime.PodSandboxConfig, error) {
	resources, err := d.resources()
	if err != nil {
		return nil, err
	}
	return &runtime.PodSandboxConfig{
		Metadata:    &runtime.PodSandboxMetadata{Name: d.meta.Name, Uid: uid, Namespace: d.meta.Namespace},
		Labels:      d.meta.Labels,
		Annotations: d.meta.Annotations,
		Linux: &runtime.LinuxPodSandboxConfig{
			CgroupParent: "/kubepods/burstable/pod" + uid,
			SecurityContext: &runtime.LinuxSandboxSecurityContext{
				NamespaceOptions: d.namespaces(),
				Privileged:       d.SecurityContext.Privileged,
				Seccomp:          &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault},
			},
			Resources: resources,
		},
	}, nil
}

func (d *DaemonSet) namespaces() *runtime.NamespaceOption {
	n := &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_CONTAINER}
	if d.pod.HostPID {
		n.Pid = runtime.NamespaceMode_NODE
	}
	return n
}

// What the kubelet has the runtime hide of /proc and /sys, and make read-only, unless
// procMount says otherwise (pkg/securitycontext in Kubernetes).
var (
	maskedPaths = []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
		"/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// CRI is the container of a pod. The directories of its ConfigMaps are the caller's, as
// [WriteConfigMap] makes them, by their names; those of the machine have to be there, or
// are made, as the manifest says.
func (d *DaemonSet) CRI(configMaps map[string]string) (*runtime.ContainerConfig, error) {
	c := d.Container
	resources, err := d.resources()
	if err != nil {
		return nil, err
	}
	s := c.SecurityContext
	security := &runtime.LinuxContainerSecurityContext{
		NamespaceOptions: d.namespaces(),
		Privileged:       s.Privileged,
		NoNewPrivs:       s.AllowPrivilegeEscalation != nil && !*s.AllowPrivilegeEscalation,
		ReadonlyRootfs:   s.ReadOnlyRootFilesystem,
		Capabilities:     &runtime.Capability{AddCapabilities: s.Capabilities.Add, DropCapabilities: s.Capabilities.Drop},
		MaskedPaths:      maskedPaths,
		ReadonlyPaths:    readonlyPaths,
	}
	if s.RunAsUser != nil {
		security.RunAsUser = &runtime.Int64Value{Value: *s.RunAsUser}
	}
	if s.RunAsGroup != nil {
		security.RunAsGroup = &runtime.Int64Value{Value: *s.RunAsGroup}
	}
	if security.Seccomp, err = s.SeccompProfile.cri(); err != nil {
		return nil, fmt.Errorf("seccompProfile: %w", err)
	}
	if security.Apparmor, err = s.AppArmorProfile.cri(); err != nil {
		return nil, fmt.Errorf("appArmorProfile: %w", err)
	}
	config := &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: c.Name},
		Image:    &runtime.ImageSpec{Image: c.Image},
		Args:     c.Args,
		Linux:    &runtime.LinuxContainerConfig{Resources: resources, SecurityContext: security},
	}
	for _, m := range c.VolumeMounts {
		path, err := d.directory(m.Name, configMaps)
		if err != nil {
			return nil, fmt.Errorf("volume %s: %w", m.Name, err)
		}
		config.Mounts = append(config.Mounts, &runtime.Mount{HostPath: path, ContainerPath: m.MountPath, Readonly: m.ReadOnly})
	}
	return config, nil
}

// directory is that of a volume on the machine.
func (d *DaemonSet) directory(name string, configMaps map[string]string) (string, error) {
	for _, v := range d.pod.Volumes {
		switch {
		case v.Name != name:
			continue
		case v.ConfigMap != nil:
			if path, ok := configMaps[v.ConfigMap.Name]; ok {
				return path, nil
			}
			return "", fmt.Errorf("there is no directory of ConfigMap %s", v.ConfigMap.Name)
		case v.HostPath != nil && v.HostPath.Type == "DirectoryOrCreate":
			return v.HostPath.Path, os.MkdirAll(v.HostPath.Path, 0o755)
		case v.HostPath != nil && v.HostPath.Type == "Directory":
			if at, err := os.Stat(v.HostPath.Path); err != nil {
				return "", err
			} else if !at.IsDir() {
				return "", fmt.Errorf("%s is not a directory", v.HostPath.Path)
			}
			return v.HostPath.Path, nil
		}
		return "", errors.New("not of a kind that is translated")
	}
	return "", errors.New("there is none of this name")
}

func (p profile) cri() (*runtime.SecurityProfile, error) {
	switch p.Type {
	case "RuntimeDefault":
		return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}, nil
	case "Unconfined":
		return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}, nil
	}
	return nil, fmt.Errorf("type %q is not translated", p.Type)
}

// resources are those of the container, which are its pod's. The kubelet asks for 1024
// shares for each CPU.
func (d *DaemonSet) resources() (*runtime.LinuxContainerResources, error) {
	of := d.Container.Resources
	cpu, err := quantity(of.Requests.CPU, "m")
	if err != nil {
		return nil, fmt.Errorf("requests.cpu: %w", err)
	}
	memory, err := quantity(of.Limits.Memory, "Mi")
	if err != nil {
		return nil, fmt.Errorf("limits.memory: %w", err)
	}
	if of.Limits.CPU != "" {
		return nil, errors.New("limits.cpu is not translated")
	}
	return &runtime.LinuxContainerResources{CpuShares: cpu * 1024 / 1000, MemoryLimitInBytes: memory << 20}, nil
}

// quantity is a number of a unit.
func quantity(text, unit string) (int64, error) {
	digits, ok := strings.CutSuffix(text, unit)
	if !ok {
		return 0, fmt.Errorf("%q is not in %s", text, unit)
	}
	return strconv.ParseInt(digits, 10, 64)
}
