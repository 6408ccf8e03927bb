package inventory

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
)

// hierarchies are those of cgroup v1 that runtimes put every container in, and unified,
// which is v2 beside them.
var hierarchies = []string{"memory", "pids", "systemd", "unified"}

// The name of a container's cgroup is its id, or has it at the end: ID,
// cri-containerd-ID.scope, crio-ID.scope, libpod-ID.scope, docker-ID.scope. That of its
// monitor has it too.
var ofContainer = regexp.MustCompile(`^(?:(.*)-)?([0-9a-f]{64})(?:\.scope)?$`)

const (
	monitor = "conmon"
	// podParent has the pods of podman, which are directories of an id, too.
	podParent = "libpod_parent"
)

// ofPod is the name of a pod's cgroup: podUID, kubepods-burstable-podUID.slice,
// machine-libpod_pod_ID.slice.
var ofPod = regexp.MustCompile(`^(.*-)?pod|libpod_pod_`)

// shownID is how much of an id people are shown, as crictl does.
const shownID = 13

// byCgroup finds containers by the names of their cgroups. What runs below the cgroup
// of a container is that container's.
func byCgroup(root string) (map[string]*Container, error) {
	tops := []string{root}
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err != nil {
		tops = nil
		for _, h := range hierarchies {
			tops = append(tops, filepath.Join(root, h))
		}
	}
	found := map[string]*Container{}
	for _, top := range tops {
		err := filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil // gone, or a hierarchy that is not mounted
			case err != nil:
				return err
			case !e.IsDir():
				return nil
			}
			m := ofContainer.FindStringSubmatch(e.Name())
			if m == nil || strings.HasSuffix(m[1], monitor) {
				return nil
			}
			parent := filepath.Dir(path)
			if filepath.Base(parent) == podParent && m[1] == "" {
				return nil
			}
			if id := m[2]; found[id] == nil {
				pod := "container " + id
				if ofPod.MatchString(filepath.Base(parent)) || filepath.Base(filepath.Dir(parent)) == podParent {
					pod = strings.TrimPrefix(parent, top)
				}
				found[id] = &Container{
					Container: engine.Container{ID: id, Name: id[:shownID], CgroupsPath: strings.TrimPrefix(path, top)},
					Sandbox:   config.Sandbox{ID: pod},
				}
			}
			return fs.SkipDir
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}
