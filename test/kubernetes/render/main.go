// Command render writes the examples for Kubernetes as kubectl apply -k would apply
// them, a file for each kustomization.
//
//	render EXAMPLES DIR
package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"

	"github.com/selective-ksm/selective-ksm/test/kubernetes"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: render EXAMPLES DIR")
		os.Exit(2)
	}
	if err := render(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintf(os.Stderr, "render: %v\n", err)
		os.Exit(1)
	}
}

func render(examples, dir string) error {
	all, err := kubernetes.Kustomizations(examples)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, kustomization := range all {
		objects, err := kubernetes.Render(kustomization)
		if err != nil {
			return err
		}
		var text bytes.Buffer
		for _, o := range objects {
			fmt.Fprintf(&text, "---\n%s", o.YAML)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(kustomization)+".yaml"), text.Bytes(), 0o644); err != nil {
			return err
		}
	}
	return nil
}
