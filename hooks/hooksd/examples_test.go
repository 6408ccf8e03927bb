package hooksd

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

const examples = "../../examples/hooks"

// The examples are what Install writes.
func TestExamples(t *testing.T) {
	args := []string{"-config", "/etc/selective-ksm.yaml"}
	for name, annotations := range map[string]map[string]string{
		"hooks.d": nil, "hooks-annotated.d": {"selective-ksm.dev/merge": "yes"},
	} {
		dir := t.TempDir()
		written, err := Install(dir, Options{Binary: "/usr/local/bin/selective-ksm", Args: args, Annotations: annotations})
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range written {
			example := filepath.Join(examples, name, filepath.Base(path))
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(example); err != nil || string(got) != string(want) {
				t.Errorf("%s is %s, %v, want %s", example, got, err, want)
			}
		}
	}

	// A bundle has the same hooks.
	dir := t.TempDir()
	if _, err := Install(dir, Options{Binary: "/usr/local/bin/selective-ksm", Args: args}); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(examples, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	var bundle specs.Spec
	if err := json.Unmarshal(data, &bundle); err != nil {
		t.Fatal(err)
	}
	for stage, got := range map[string][]specs.Hook{
		"createruntime": bundle.Hooks.CreateRuntime, "poststart": bundle.Hooks.Poststart, "poststop": bundle.Hooks.Poststop,
	} {
		var want struct{ Hook specs.Hook }
		data, err := os.ReadFile(filepath.Join(dir, "90-selective-ksm-"+stage+".json"))
		if err == nil {
			err = json.Unmarshal(data, &want)
		}
		if err != nil || !reflect.DeepEqual(got, []specs.Hook{want.Hook}) {
			t.Errorf("%s: got %+v, %v, want %+v", stage, got, err, want)
		}
	}
}
