package hooks

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/config"
)

// maxConfig is how many bytes of a bundle's configuration are read.
const maxConfig = 4 << 20

// readConfig reads the configuration of a bundle, which its runtime has read before the
// hook (runtime-spec, config.md).
func readConfig(bundle string) (s specs.Spec, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("configuration of bundle %q: %w", shown(bundle), err)
		}
	}()
	if !path.IsAbs(bundle) || strings.ContainsFunc(bundle, unicode.IsControl) {
		return s, errors.New("not an absolute path")
	}
	// What is no file is not waited for.
	file, err := os.OpenFile(filepath.Join(bundle, "config.json"), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return s, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxConfig+1))
	if err != nil {
		return s, err
	}
	if len(data) > maxConfig {
		return s, fmt.Errorf("larger than %d bytes", maxConfig)
	}
	return s, json.Unmarshal(data, &s)
}

// privileged reports whether a container is privileged, or may be, as NRI's plugin
// does: the runtime specification has no word for it. Runtimes make sysfs writable for
// privileged containers, and for no others. Where something else is mounted in its place
// that cannot be seen, and the container is taken for privileged. So is one that may use
// all devices.
func privileged(s specs.Spec) bool {
	readOnly := false
	for _, m := range s.Mounts {
		if m.Type != "sysfs" {
			continue
		}
		if !slices.Contains(m.Options, "ro") {
			return true
		}
		readOnly = true
	}
	if !readOnly {
		return true
	}
	if s.Linux == nil || s.Linux.Resources == nil {
		return false
	}
	return slices.ContainsFunc(s.Linux.Resources.Devices, func(d specs.LinuxDeviceCgroup) bool {
		return d.Allow && (d.Type == "" || d.Type == "a") && all(d.Major) && all(d.Minor) && strings.Contains(d.Access, "w")
	})
}

// all reports whether the number of a device is that of all.
func all(number *int64) bool { return number == nil || *number == -1 }

// hostPID reports whether a process sees those of the machine: whether it is in the
// pid namespace that we are in.
func (m machine) hostPID(pid int) (bool, error) {
	var of [2]unix.Stat_t
	for i, process := range []string{"self", strconv.Itoa(pid)} {
		path := filepath.Join(m.proc, process, "ns/pid")
		if err := unix.Stat(path, &of[i]); err != nil {
			return false, &os.PathError{Op: "stat", Path: path, Err: err}
		}
	}
	return of[0].Dev == of[1].Dev && of[0].Ino == of[1].Ino, nil
}

// labelKeys are the keys of the labels that a rule asks for.
func labelKeys(rule config.Rule) []string {
	var keys []string
	for _, pattern := range slices.Concat(rule.Include, rule.Exclude) {
		key, _, _ := strings.Cut(pattern, "=")
		keys = append(keys, key)
	}
	return keys
}

// labelsOf tells those labels of a container's pod that a rule asks for: none for a key
// that the pod has not, and no such key where that cannot be told. Only CRI-O writes them
// down: among the annotations of the sandbox, whose bundle is beside the container's.
// It has the pod's annotations there, too, in whose place it puts labels. The container
// has all of these annotations, and none of the labels: so what the container has not is
// a label (sandbox_run_linux.go and internal/factory/container in CRI-O's source).
func labelsOf(s specs.State, rule config.Rule) map[string]*string {
	keys, id := labelKeys(rule), s.Annotations[crio.sandbox]
	parts := strings.Split(s.Bundle, "/")
	at := slices.Index(parts, s.ID)
	if len(keys) == 0 || at < 0 || !isID(id) {
		return nil
	}
	parts[at] = id
	sandbox, err := readConfig(strings.Join(parts, "/"))
	if err != nil || sandbox.Annotations[crio.sandbox] != id || sandbox.Annotations[crio.kind] != "sandbox" {
		return nil
	}
	labels := map[string]*string{}
	for _, key := range keys {
		if _, annotated := s.Annotations[key]; annotated {
			continue
		}
		labels[key] = nil
		if value, there := sandbox.Annotations[key]; there {
			labels[key] = &value
		}
	}
	return labels
}
