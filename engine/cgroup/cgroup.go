// Package cgroup finds the processes of a container by its cgroup, on cgroup v1
// and v2, whether the runtime or systemd made the cgroup.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// DefaultRoot is where the cgroup file systems are mounted.
const DefaultRoot = "/sys/fs/cgroup"

// preferred are the v1 hierarchies that a container is sought in first: those
// that runtimes put every container in. unified is the v2 hierarchy beside them.
var preferred = []string{"memory", "pids", "systemd", "unified"}

// Find returns the directory of a cgroup below root, by the path that the runtime
// gives as cgroupsPath (runtime-spec, config-linux.md): one below the mounts, or
// slice:prefix:name for systemd, as runc takes it. It returns an error that
// matches [fs.ErrNotExist] where there is no such cgroup, and another for a path
// that is not one cgroup below the root.
func Find(root, cgroupsPath string) (string, error) {
	path, err := relative(cgroupsPath)
	if err != nil {
		return "", fmt.Errorf("cgroup %q: %w", cgroupsPath, err)
	}
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err == nil {
		dir := filepath.Join(root, path)
		_, err := os.Stat(dir)
		return dir, err
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return "", err
	}
	hierarchies := slices.Clone(preferred)
	for _, e := range entries {
		hierarchies = append(hierarchies, e.Name())
	}
	for _, h := range hierarchies {
		dir := filepath.Join(root, h, path)
		if _, err := os.Stat(dir); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("cgroup %q: in no hierarchy of %s: %w", cgroupsPath, root, fs.ErrNotExist)
}

// Pids returns the processes of a cgroup and of those below it, in ascending
// order. Processes that the caller's pid namespace does not have are left out. It
// returns an error that matches [fs.ErrNotExist] when the cgroup is gone; those below
// it may come and go meanwhile.
func Pids(dir string) ([]int, error) {
	// Most have none below. A directory has a link for each, and its files are many.
	var stat unix.Stat_t
	if err := unix.Stat(dir, &stat); err == nil && stat.Nlink == 2 {
		pids, err := pidsOf(dir)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			err = fmt.Errorf("cgroup %s: %w", dir, fs.ErrNotExist)
		}
		slices.Sort(pids)
		return slices.Compact(pids), err
	}
	var pids []int
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			if path != dir && errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if !e.IsDir() {
			return nil
		}
		found, err := pidsOf(path)
		switch {
		case errors.Is(err, unix.EOPNOTSUPP):
			// A threaded cgroup: its processes are listed at the root of its domain.
			return nil
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV):
			if path == dir {
				return fmt.Errorf("cgroup %s: %w", dir, fs.ErrNotExist)
			}
			return nil
		}
		pids = append(pids, found...)
		return err
	})
	if err != nil {
		return nil, err
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

// pidsOf returns the processes of a cgroup, without those below it.
func pidsOf(dir string) ([]int, error) {
	path := filepath.Join(dir, "cgroup.procs")
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var pids []int
	for line := range strings.FieldsSeq(string(data)) {
		pid, err := strconv.Atoi(line)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", path, err)
		}
		if pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Populated reports whether a cgroup or one below it has a process, of whatever pid
// namespace, or may have, as it cannot be read.
func Populated(dir string) bool {
	populated := false
	filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		var data []byte
		switch {
		case err != nil:
		case !e.IsDir():
			return nil
		default:
			data, err = os.ReadFile(filepath.Join(path, "cgroup.procs"))
		}
		// What has gone meanwhile has no process, and those of a threaded cgroup are listed
		// at the root of its domain.
		gone := errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP)
		if len(data) > 0 || err != nil && !gone {
			populated = true
			return fs.SkipAll
		}
		return nil
	})
	return populated
}

// relative turns a cgroupsPath into a path below the mount of a hierarchy. The
// root itself is refused like all that would leave it: it holds the processes of
// the whole machine.
func relative(cgroupsPath string) (string, error) {
	path := cgroupsPath
	if parts := strings.Split(cgroupsPath, ":"); len(parts) == 3 && !strings.Contains(cgroupsPath, "/") {
		slice, err := expandSlice(parts[0])
		if err != nil {
			return "", err
		}
		unit := parts[2]
		if unit == "" {
			return "", errors.New("no name of a unit")
		}
		if !strings.HasSuffix(unit, ".slice") {
			unit = parts[1] + "-" + unit + ".scope"
		}
		path = filepath.Join(slice, unit)
	}
	path = strings.TrimLeft(path, "/")
	if path == "." || !filepath.IsLocal(path) {
		return "", errors.New("not below the root of the hierarchy")
	}
	return path, nil
}

// expandSlice gives the path of a systemd slice, whose name holds those of its
// parents (systemd.slice(5)): a-b.slice is a.slice/a-b.slice. No name is
// system.slice, as for runc.
func expandSlice(slice string) (string, error) {
	switch slice {
	case "":
		return "system.slice", nil
	case "-.slice":
		return "", nil
	}
	name, ok := strings.CutSuffix(slice, ".slice")
	if !ok || slices.Contains(strings.Split(name, "-"), "") {
		return "", fmt.Errorf("%q is not the name of a slice", slice)
	}
	var path string
	for i, r := range name + "-" {
		if r == '-' {
			path = filepath.Join(path, name[:i]+".slice")
		}
	}
	return path, nil
}
