package hooks

import (
	"errors"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/selective-ksm/selective-ksm/engine"
)

// Description is what the bundle of a container says of it.
type Description struct {
	// Container has its id and names, and those of its pod.
	engine.Container
	// Pause is that it is the sandbox of a pod.
	Pause bool
	// Annotations are the values of those of [config.Annotations] that count for it.
	Annotations map[string]string
}

// Describe reads what a runtime has written into the bundle of a container. The error is
// that it cannot be read, or that it is of two runtimes or has no pod.
func Describe(id, bundle string) (Description, error) {
	d := Description{Container: engine.Container{ID: id}}
	spec, err := readConfig(bundle)
	if err != nil {
		return d, err
	}
	pod, err := podOf(specs.State{ID: id, Annotations: spec.Annotations})
	if errors.Is(err, errNotOurs) {
		d.Pause, d.SandboxID = true, id
		return d, nil
	} else if err != nil {
		return d, err
	}
	d.Name, d.Pod, d.Namespace, d.SandboxID = pod.container, pod.name, pod.namespace, pod.sandbox
	d.Annotations = annotationsOf(spec.Annotations, pod.container)
	return d, nil
}
