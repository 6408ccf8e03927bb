package kubernetes

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/kubectl-validate/pkg/openapiclient"
	"sigs.k8s.io/kubectl-validate/pkg/validator"
)

const examples = "../../examples/kubernetes"

// release is the newest of Kubernetes whose schemas the validator brings, and the first
// that has all fields of the examples.
const release = "1.30"

func newValidator(t *testing.T) *validator.Validator {
	t.Helper()
	v, err := validator.New(openapiclient.NewHardcodedBuiltins(release))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// validate says what the API server has against an object, by its schemas.
func validate(v *validator.Validator, text []byte) error {
	_, object, err := v.Parse(text)
	if err != nil {
		return err
	}
	return v.Validate(object)
}

func TestManifests(t *testing.T) {
	v := newValidator(t)
	all, err := Kustomizations(examples)
	if err != nil {
		t.Fatal(err)
	}
	for _, kustomization := range all {
		objects, err := Render(kustomization)
		if err != nil {
			t.Error(err)
		}
		for _, o := range objects {
			t.Run(filepath.Base(kustomization)+"/"+o.Name, func(t *testing.T) {
				if err := validate(v, o.YAML); err != nil {
					t.Errorf("%v\n%s", err, o.YAML)
				}
			})
		}
	}
}

// documents splits a file of YAML.
func documents(t *testing.T, path string) [][]byte {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var all [][]byte
	r := utilyaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(text)))
	defer r.Close()
	for {
		document := make([]byte, len(text))
		n, err := r.Read(document)
		if errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, document[:n])
	}
}

func TestPods(t *testing.T) {
	v := newValidator(t)
	files, err := filepath.Glob(examples + "/pods/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		for _, pod := range documents(t, file) {
			if err := validate(v, pod); err != nil {
				t.Errorf("%s: %v", file, err)
			}
		}
	}
}

// What is wrong with a manifest is found.
func TestWrongManifests(t *testing.T) {
	v := newValidator(t)
	objects, err := Render(filepath.Join(examples, "base"))
	if err != nil {
		t.Fatal(err)
	}
	var right string
	for _, o := range objects {
		if o.Name == "DaemonSet selective-ksm" {
			right = string(o.YAML)
		}
	}
	for name, tc := range map[string]struct{ from, to string }{
		"unknown field":    {"hostPID:", "hostPid:"},
		"wrong type":       {"hostPID: true", "hostPID: often"},
		"missing field":    {"  selector:\n    matchLabels:\n      app.kubernetes.io/instance: selective-ksm\n      app.kubernetes.io/name: selective-ksm\n", ""},
		"not a name":       {"  name: selective-ksm\n  namespace", "  name: selective_ksm\n  namespace"},
		"not a capability": {"- SYS_PTRACE", "- {SYS_PTRACE: yes}"},
	} {
		t.Run(name, func(t *testing.T) {
			wrong := strings.Replace(right, tc.from, tc.to, 1)
			if wrong == right {
				t.Fatalf("%q is not in\n%s", tc.from, right)
			}
			err := validate(v, []byte(wrong))
			if err == nil {
				t.Error("is taken for valid")
			}
			t.Log(err)
		})
	}
}
