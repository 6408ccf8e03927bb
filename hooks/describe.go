package hooks

import (
	"errors"

	"github.com/containerd/nri/pkg/api"
	nri "github.com/containerd/nri/pkg/plugin"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
)

// Description is what the annotations of a container say of it.
type Description struct {
	// Container has its id and names, and those of its pod.
	engine.Container
	// Pause is that it is the sandbox of a pod.
	Pause bool
	// Annotations are the values of those of [config.Annotations] that it has.
	Annotations map[string]string
}

// Describe reads the annotations that a runtime gives a container. The error is that
// they are of two runtimes, or have no pod.
func Describe(id string, annotations map[string]string) (Description, error) {
	d := Description{Container: engine.Container{ID: id}, Annotations: map[string]string{}}
	pod, err := podOf(specs.State{ID: id, Annotations: annotations})
	if errors.Is(err, errNotOurs) {
		d.Pause, d.SandboxID = true, id
		return d, nil
	} else if err != nil {
		return d, err
	}
	d.Name, d.Pod, d.Namespace, d.SandboxID = pod.container, pod.name, pod.namespace, pod.sandbox
	for _, key := range config.Annotations() {
		if value, ok := nri.GetEffectiveAnnotation(&api.PodSandbox{Annotations: annotations}, key, pod.container); ok {
			d.Annotations[key] = value
		}
	}
	return d, nil
}
