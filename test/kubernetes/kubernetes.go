// Package kubernetes renders the examples for Kubernetes, and its tests check them
// against the schemas that the API server has.
//
// It is a module of its own: what it needs is many times what the product does.
package kubernetes

import (
	"fmt"
	"path/filepath"

	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// Object is what a manifest has one of or more: its name for people, and its YAML.
type Object struct {
	Name string
	YAML []byte
}

// Kustomizations returns the directories of the base and of the overlays.
func Kustomizations(examples string) ([]string, error) {
	overlays, err := filepath.Glob(filepath.Join(examples, "overlays", "*"))
	if err != nil {
		return nil, err
	}
	return append(overlays, filepath.Join(examples, "base")), nil
}

// Render returns what kubectl apply -k would apply.
func Render(kustomization string) ([]Object, error) {
	all, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), kustomization)
	if err != nil {
		return nil, fmt.Errorf("render %s: %w", kustomization, err)
	}
	var objects []Object
	for _, r := range all.Resources() {
		text, err := r.AsYAML()
		if err != nil {
			return nil, fmt.Errorf("render %s: %w", kustomization, err)
		}
		objects = append(objects, Object{Name: r.GetKind() + " " + r.GetName(), YAML: text})
	}
	return objects, nil
}
