package hooksd

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	podman "go.podman.io/common/pkg/hooks"
)

// binary is a file that is there: the reader looks.
func binary(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// given is what CRI-O and podman make of a directory for a container.
func given(t *testing.T, dir string, annotations map[string]string) *specs.Hooks {
	t.Helper()
	manager, err := podman.New(t.Context(), []string{dir}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var s specs.Spec
	if _, err := manager.Hooks(&s, annotations, false); err != nil {
		t.Fatal(err)
	}
	return s.Hooks
}

func TestInstall(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "hooks.d")
	o := Options{Binary: binary(t), Args: []string{"-config", "/etc/selective-ksm.yaml"}}
	for range 2 {
		if written, err := Install(dir, o); err != nil || len(written) != 3 {
			t.Fatalf("wrote %q, %v", written, err)
		}
	}
	h := given(t, dir, nil)
	for stage, hooks := range map[string][]specs.Hook{
		"createRuntime": h.CreateRuntime, "poststart": h.Poststart, "poststop": h.Poststop,
	} {
		if len(hooks) != 1 {
			t.Errorf("%s: got %d hooks", stage, len(hooks))
			continue
		}
		want := []string{filepath.Base(o.Binary), "hook", stage, "-config", "/etc/selective-ksm.yaml"}
		if got := hooks[0]; got.Path != o.Binary || !slices.Equal(got.Args, want) || got.Timeout == nil || *got.Timeout != 120 {
			t.Errorf("%s: got %+v", stage, got)
		}
	}
	if len(h.CreateContainer)+len(h.StartContainer) > 0 {
		t.Errorf("got others: %+v", h)
	}
	if err := Validate(t.Context(), []string{dir}, nil); err != nil {
		t.Error(err)
	}

	other := filepath.Join(dir, "10-other.json")
	if err := os.WriteFile(other, []byte(`{"version":"1.0.0","hook":{"path":"/bin/true"},"when":{},"stages":["poststop"]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{3, 0} {
		if removed, err := Uninstall(dir); err != nil || len(removed) != want {
			t.Errorf("removed %q, %v", removed, err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 || left[0].Name() != "10-other.json" {
		t.Errorf("left are %v, %v", left, err)
	}
	if removed, err := Uninstall(filepath.Join(dir, "none")); err != nil || len(removed) > 0 {
		t.Errorf("where there is no directory: removed %q, %v", removed, err)
	}
}

// Only containers with all annotations have the hooks, and none whose annotations
// merely look like them.
func TestAnnotations(t *testing.T) {
	dir := t.TempDir()
	want := map[string]string{"selective-ksm.dev/merge": "yes", "io.kubernetes.pod.namespace": "shop"}
	if _, err := Install(dir, Options{Binary: binary(t), Annotations: want}); err != nil {
		t.Fatal(err)
	}
	with := func(key, value string) map[string]string {
		m := map[string]string{"selective-ksm.dev/merge": "yes", "io.kubernetes.pod.namespace": "shop", "other": "x"}
		delete(m, "")
		m[key] = value
		return m
	}
	without := func(key, other string) map[string]string {
		m := with("other", "x")
		m[other] = m[key]
		delete(m, key)
		return m
	}
	for name, tc := range map[string]struct {
		annotations map[string]string
		match       bool
	}{
		"both":           {want, true},
		"and others":     {with("a", "b"), true},
		"none":           {nil, false},
		"one":            {map[string]string{"selective-ksm.dev/merge": "yes"}, false},
		"other value":    {with("selective-ksm.dev/merge", "no"), false},
		"longer value":   {with("selective-ksm.dev/merge", "yes, please"), false},
		"value in a row": {with("selective-ksm.dev/merge", "no\nyes\n"), false},
		"new line":       {with("selective-ksm.dev/merge", "yes\n"), false},
		"namespace ends": {with("io.kubernetes.pod.namespace", "workshop"), false},
		"longer key":     {without("selective-ksm.dev/merge", "selective-ksm.dev/merge/pod"), false},
		"key in another": {without("selective-ksm.dev/merge", "x/selective-ksm.dev/merge"), false},
		"dot is a dot":   {without("selective-ksm.dev/merge", "selective-ksmXdev/merge"), false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := given(t, dir, tc.annotations); (got != nil) != tc.match {
				t.Errorf("got %+v", got)
			}
			if err := Validate(t.Context(), []string{dir}, tc.annotations); (err == nil) != tc.match {
				t.Errorf("Validate says %v", err)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	dir := t.TempDir()
	if _, err := Install(dir, Options{Binary: filepath.Join(dir, "gone")}); err != nil {
		t.Fatal(err)
	}
	if err := Validate(t.Context(), []string{dir}, nil); err == nil || !strings.Contains(err.Error(), "gone: no such file or directory") {
		t.Errorf("of a binary that is not there: %v", err)
	}
	if err := Validate(t.Context(), []string{filepath.Join(dir, "none")}, nil); !os.IsNotExist(err) {
		t.Errorf("of no directory: %v", err)
	}
}
