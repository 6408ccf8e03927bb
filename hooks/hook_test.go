package hooks

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/selective-ksm/selective-ksm/config"
)

// What a hook refuses is written down nowhere, and no engine is started for it.
func TestRunRefuses(t *testing.T) {
	dir := t.TempDir()
	on := fakeMachine(t, "0::/"+id+"\n", id)
	o := Options{Dir: dir, Policy: config.Default(), Spawn: func(id string) error {
		t.Errorf("an engine was started for %q", id)
		return nil
	}}
	bundle := bundleOf(t, t.TempDir(), id, ordinary)
	for name, state := range map[string]string{
		"malformed":                 "{",
		"truncated":                 fmt.Sprintf(`{"id":%q,"pid":%d`, id, pid),
		"oversized":                 fmt.Sprintf(`{"id":%q,"pid":%d,"bundle":%q}`, id, pid, strings.Repeat("x", maxState)),
		"path":                      fmt.Sprintf(`{"id":"../%s","pid":%d}`, id, pid),
		"line":                      fmt.Sprintf(`{"id":"%s\n","pid":%d}`, id, pid),
		"no process":                fmt.Sprintf(`{"id":%q,"pid":0}`, id),
		"init":                      fmt.Sprintf(`{"id":%q,"pid":1}`, id),
		"dead":                      fmt.Sprintf(`{"id":%q,"pid":%d}`, id, pid+1),
		"other cgroup":              fmt.Sprintf(`{"id":"other","pid":%d,"bundle":%q}`, pid, bundle),
		"no bundle":                 fmt.Sprintf(`{"id":%q,"pid":%d}`, id, pid),
		"other bundle":              fmt.Sprintf(`{"id":%q,"pid":%d,"bundle":"/proc/self"}`, id, pid),
		"line in the bundle's path": fmt.Sprintf(`{"id":%q,"pid":%d,"bundle":"/a\nb"}`, id, pid),
	} {
		t.Run(name, func(t *testing.T) {
			err := run(t.Context(), CreateRuntime, strings.NewReader(state), o, on)
			if err == nil || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want one line", err)
			}
			// These ask for less: what they do not take amiss is not known to them.
			for _, stage := range []Stage{Poststart, Poststop} {
				if err := run(t.Context(), stage, strings.NewReader(state), o, on); err != nil && strings.Contains(err.Error(), "\n") {
					t.Errorf("%s: got %v, want one line", stage, err)
				}
			}
		})
	}
	// Nobody has told of this one before.
	for _, stage := range []Stage{Poststart, Poststop} {
		if err := run(t.Context(), stage, strings.NewReader(fmt.Sprintf(`{"id":%q,"pid":%d}`, id, pid)), o, on); err != nil {
			t.Errorf("%s: %v", stage, err)
		}
	}
	if files, err := filepath.Glob(filepath.Join(dir, "hooks", "*.json")); err != nil || len(files) > 0 {
		t.Errorf("written down is %q, %v", files, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left are %v, %v", left, err)
	}
}
