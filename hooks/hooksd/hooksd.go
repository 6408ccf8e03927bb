// Package hooksd puts hooks into a directory that CRI-O and podman read, hooks.d, and
// checks what is there with their own reader (oci-hooks(5)).
package hooksd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	podman "go.podman.io/common/pkg/hooks"
	form "go.podman.io/common/pkg/hooks/1.0.0"

	"github.com/selective-ksm/selective-ksm/hooks"
)

// DefaultDir is the directory that both read if they are not told of another.
const DefaultDir = podman.DefaultDir

// Timeout is what a runtime gives a hook. It fails the container then, so this is far
// beyond the deadline that the hook has itself: on a machine that is short of CPU time
// a process may take long to get as far as that.
const Timeout = 2 * time.Minute

// Options are what hooks are made of.
type Options struct {
	// Binary is the path of this program.
	Binary string
	// Args are arguments that each hook is given.
	Args []string
	// Annotations are those that a container must have, with their values, to have the
	// hooks. Where there are none, every container has them.
	Annotations map[string]string
}

// file is the name of a hook's file. Hooks run in the order of these names: ours come
// last, when the others have done what they do to a container.
func file(dir string, stage hooks.Stage) string {
	return filepath.Join(dir, "90-selective-ksm-"+strings.ToLower(string(stage))+".json")
}

// Install writes the hooks into a directory, which is made where it is not there. It
// returns the paths of the files. Those that are there are replaced.
func Install(dir string, o Options) ([]string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("installing hooks: %w", err)
	}
	var written []string
	for _, stage := range hooks.Stages {
		seconds := int(Timeout.Seconds())
		h := form.Hook{
			Version: form.Version,
			Hook: specs.Hook{
				Path:    o.Binary,
				Args:    append([]string{filepath.Base(o.Binary), "hook", string(stage)}, o.Args...),
				Timeout: &seconds,
			},
			When:   when(o.Annotations),
			Stages: []string{string(stage)},
		}
		path := file(dir, stage)
		if err := write(path, h); err != nil {
			return written, fmt.Errorf("installing hooks: %w", err)
		}
		written = append(written, path)
	}
	return written, nil
}

// when is the condition that a container has annotations. The reader takes keys and
// values as regular expressions that need match a part only.
func when(annotations map[string]string) form.When {
	if len(annotations) == 0 {
		always := true
		return form.When{Always: &always}
	}
	patterns := map[string]string{}
	for key, value := range annotations {
		patterns["^"+regexp.QuoteMeta(key)+"$"] = "^" + regexp.QuoteMeta(value) + "$"
	}
	return form.When{Annotations: patterns}
}

// write puts a file in its place, whole or not at all. A name that does not end in .json
// is nothing to those who read the directory.
func write(path string, h form.Hook) error {
	data, err := json.MarshalIndent(h, "", "  ")
	if err != nil {
		return err
	}
	file, err := os.CreateTemp(filepath.Dir(path), ".selective-ksm-")
	if err != nil {
		return err
	}
	_, err = file.Write(append(data, '\n'))
	err = errors.Join(err, file.Chmod(0o644), file.Close())
	if err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	return nil
}

// Uninstall takes the hooks out of a directory, and returns the paths of those that
// were there. Containers that have them keep them.
func Uninstall(dir string) ([]string, error) {
	var removed []string
	for _, stage := range hooks.Stages {
		path := file(dir, stage)
		err := os.Remove(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return removed, fmt.Errorf("uninstalling hooks: %w", err)
		}
		removed = append(removed, path)
	}
	return removed, nil
}

// Validate reads directories as CRI-O and podman do, a later one before an earlier, and
// checks that they give a container that has annotations our hook of each stage, once.
func Validate(ctx context.Context, dirs []string, annotations map[string]string) error {
	for _, dir := range dirs {
		// The reader takes a directory that is not there as an empty one, and passes over
		// hooks whose program is not there.
		if _, err := os.Stat(dir); err != nil {
			return err
		}
		for _, stage := range hooks.Stages {
			path := file(dir, stage)
			if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if _, err := podman.Read(path, nil); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
		}
	}
	manager, err := podman.New(ctx, dirs, nil)
	if err != nil {
		return err
	}
	var given specs.Spec
	if _, err := manager.Hooks(&given, annotations, false); err != nil {
		return err
	}
	if given.Hooks == nil {
		given.Hooks = &specs.Hooks{}
	}
	var errs []error
	for stage, all := range map[hooks.Stage][]specs.Hook{
		hooks.CreateRuntime: given.Hooks.CreateRuntime,
		hooks.Poststart:     given.Hooks.Poststart,
		hooks.Poststop:      given.Hooks.Poststop,
	} {
		ours := 0
		for _, h := range all {
			if len(h.Args) >= 3 && h.Args[1] == "hook" && h.Args[2] == string(stage) {
				ours++
			}
		}
		if ours != 1 {
			errs = append(errs, fmt.Errorf("%s: a container would have %d hooks of ours, not one, from %s", stage, ours, strings.Join(dirs, " and ")))
		}
	}
	return errors.Join(errs...)
}
