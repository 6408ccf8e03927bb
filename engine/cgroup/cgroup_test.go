package cgroup

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestRelative(t *testing.T) {
	for path, want := range map[string]string{
		"/k8s.io/abc":                   "k8s.io/abc",
		"/kubepods/besteffort/pod1/abc": "kubepods/besteffort/pod1/abc",
		"relative/abc":                  "relative/abc",
		"kubepods-besteffort-pod1.slice:cri-containerd:abc": "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-abc.scope",
		"kubepods.slice:crio:abc":                           "kubepods.slice/crio-abc.scope",
		":docker:abc":                                       "system.slice/docker-abc.scope",
		"-.slice:docker:abc":                                "docker-abc.scope",
		"a.slice:x:b.slice":                                 "a.slice/b.slice",
		"/a:b:c":                                            "a:b:c",
	} {
		if got, err := relative(path); err != nil || got != want {
			t.Errorf("%q: got %q, %v; want %q", path, got, err, want)
		}
	}
	for path, want := range map[string]string{
		"":               "not below the root of the hierarchy",
		"/":              "not below the root of the hierarchy",
		".":              "not below the root of the hierarchy",
		"/a/../..":       "not below the root of the hierarchy",
		"../a":           "not below the root of the hierarchy",
		"..:x:a.slice":   `".." is not the name of a slice`,
		"a.slice:x:":     "no name of a unit",
		"a--b.slice:x:c": `"a--b.slice" is not the name of a slice`,
		".slice:x:c":     `".slice" is not the name of a slice`,
	} {
		if got, err := relative(path); err == nil || err.Error() != want {
			t.Errorf("%q: got %q, %v; want %s", path, got, err, want)
		}
	}
}

// tree makes the directories and files of a cgroup file system. It stands for
// names and parsing only.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestFind(t *testing.T) {
	v2 := tree(t, map[string]string{"cgroup.controllers": "", "k8s.io/a/cgroup.procs": ""})
	hybrid := tree(t, map[string]string{
		"cpu/k8s.io/a/cgroup.procs": "", "memory/k8s.io/a/cgroup.procs": "", "pids/k8s.io/a/cgroup.procs": "",
		"unified/k8s.io/b/cgroup.procs": "", "cpu/k8s.io/c/cgroup.procs": "",
	})
	for _, tc := range []struct{ root, path, want string }{
		{v2, "/k8s.io/a", "k8s.io/a"},
		{v2, "/k8s.io/b", ""},
		{hybrid, "/k8s.io/a", "memory/k8s.io/a"},
		{hybrid, "/k8s.io/b", "unified/k8s.io/b"},
		{hybrid, "/k8s.io/c", "cpu/k8s.io/c"},
		{hybrid, "/k8s.io/d", ""},
	} {
		dir, err := Find(tc.root, tc.path)
		if tc.want == "" {
			if !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: got %s, %v", tc.path, dir, err)
			}
		} else if want := filepath.Join(tc.root, tc.want); err != nil || dir != want {
			t.Errorf("%s: got %s, %v; want %s", tc.path, dir, err, want)
		}
	}
	want := `cgroup "/../etc": not below the root of the hierarchy`
	if _, err := Find(v2, "/../etc"); err == nil || err.Error() != want {
		t.Errorf("hostile path: %v", err)
	}
}

func TestPids(t *testing.T) {
	root := tree(t, map[string]string{
		"a/cgroup.procs": "12\n7\n0\n", "a/init.scope/cgroup.procs": "99\n7\n", "a/memory.max": "max\n", "b/cgroup.procs": "5\n",
		"bad/cgroup.procs": "x\n",
	})
	pids, err := Pids(filepath.Join(root, "a"))
	if err != nil || !slices.Equal(pids, []int{7, 12, 99}) {
		t.Errorf("got %v, %v", pids, err)
	}
	if _, err := Pids(filepath.Join(root, "gone")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no cgroup: %v", err)
	}
	if _, err := Pids(filepath.Join(root, "bad")); err == nil {
		t.Error("bad number: no error")
	}
}

func TestPopulated(t *testing.T) {
	root := tree(t, map[string]string{
		"a/cgroup.procs": "", "a/b/cgroup.procs": "7\n", "c/cgroup.procs": "", "d/cgroup.procs": "0\n",
	})
	// One that cannot be read, here for a link to itself, may have some.
	unread := filepath.Join(root, "e", "cgroup.procs")
	if err := errors.Join(os.Mkdir(filepath.Dir(unread), 0o755), os.Symlink(unread, unread)); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]bool{"a": true, "a/b": true, "c": false, "d": true, "e": true, "gone": false} {
		if got := Populated(filepath.Join(root, dir)); got != want {
			t.Errorf("%s: got %v", dir, got)
		}
	}
}
