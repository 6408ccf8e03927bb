package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"go.yaml.in/yaml/v3"
)

// Pod is what of a pod decides whom its containers are merged with.
type Pod struct {
	Name, Namespace string
	Annotations     map[string]string
	// Containers are their names.
	Containers []string
}

type pod struct {
	APIVersion ignored `yaml:"apiVersion"`
	Kind       string
	Metadata   metadata
	Spec       struct {
		Containers []struct {
			Name  string
			Image ignored
		}
	}
}

// ReadPods reads a file of pods, as strictly as [Read].
func ReadPods(path string) ([]Pod, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var all []Pod
	for documents := yaml.NewDecoder(bytes.NewReader(text)); ; {
		documents.KnownFields(true)
		var p pod
		if err := documents.Decode(&p); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if p.Kind != "Pod" {
			return nil, fmt.Errorf("%s: %q is not a Pod", path, p.Kind)
		}
		one := Pod{Name: p.Metadata.Name, Namespace: p.Metadata.Namespace, Annotations: p.Metadata.Annotations}
		for _, c := range p.Spec.Containers {
			one.Containers = append(one.Containers, c.Name)
		}
		all = append(all, one)
	}
}
