package member

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine"
)

func open(t *testing.T, path string, gone ...string) *Dir {
	t.Helper()
	d, err := Open(path, func(cgroup string) bool {
		for _, g := range gone {
			if g == cgroup {
				return true
			}
		}
		return false
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func member(id string) Member {
	return Member{
		Container: engine.Container{ID: id, CgroupsPath: "/" + id, Partition: "sksm-pod-" + id},
		Facts:     &Facts{HostPID: true, Labels: map[string]*string{"app": &id, "tier": nil}},
		PID:       7, Init: Program{Device: 1, Inode: 2}, Created: time.Now().Round(0),
	}
}

func TestDir(t *testing.T) {
	ctx, path := t.Context(), filepath.Join(t.TempDir(), "hooks")
	d := open(t, path)
	want := member("a")
	if err := d.Put(ctx, want); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory is %v, %v", info, err)
	}
	// Another process sees it.
	d = open(t, path)
	if got, found, err := d.Get(ctx, "a"); err != nil || !found || got.Container != want.Container || !got.Created.Equal(want.Created) || got.Init != want.Init || !reflect.DeepEqual(got.Facts, want.Facts) {
		t.Errorf("got %+v, %v, %v", got, found, err)
	}
	if found, err := d.Change(ctx, "a", func(m *Member) { m.Started = true }); err != nil || !found {
		t.Errorf("changed %v, %v", found, err)
	}
	if got, _, _ := d.Get(ctx, "a"); !got.Started {
		t.Error("a change is lost")
	}
	for _, want := range []bool{true, false} {
		if found, err := d.Remove(ctx, "a"); err != nil || found != want {
			t.Errorf("removed %v, %v", found, err)
		}
	}
	if _, found, err := d.Get(ctx, "a"); err != nil || found {
		t.Errorf("got %v, %v", found, err)
	}
	if found, err := d.Change(ctx, "a", func(*Member) { t.Error("changes what is not there") }); err != nil || found {
		t.Errorf("changed %v, %v", found, err)
	}
}

// What killed hooks, ended containers and earlier boots have left goes.
func TestAll(t *testing.T) {
	ctx, path := t.Context(), t.TempDir()
	d := open(t, path, "/gone")
	for _, id := range []string{"here", "gone"} {
		if err := d.Put(ctx, member(id)); err != nil {
			t.Fatal(err)
		}
	}
	before := open(t, path)
	before.boot = "earlier"
	if err := before.Put(ctx, member("earlier")); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{temporary + "1": "{", "truncated.json": `{"Boot":`} {
		if err := os.WriteFile(filepath.Join(path, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// A file that says it is of another container.
	data, err := os.ReadFile(d.file("here"))
	if err == nil {
		err = os.WriteFile(d.file("other"), data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, found, err := d.Get(ctx, "earlier"); err != nil || found {
		t.Errorf("of another boot: %v, %v", found, err)
	}

	// One of a version that named things otherwise.
	if err := os.WriteFile(d.file("old"), fmt.Appendf(nil, `{"Boot":%q,"Member":{"ID":"old","CgroupsPath":"/old"}}`, d.boot), 0o600); err != nil {
		t.Fatal(err)
	}
	names := func() (all []string) {
		entries, err := os.ReadDir(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			all = append(all, e.Name())
		}
		return all
	}

	// Whoever only reads changes nothing, and does not know whose cgroup is gone.
	files := names()
	var read []string
	for _, m := range List(path) {
		read = append(read, m.ID)
	}
	if slices.Sort(read); !slices.Equal(read, []string{"gone", "here"}) || !slices.Equal(names(), files) {
		t.Errorf("read %q, and there are %q, %q before", read, names(), files)
	}
	if all := List(filepath.Join(path, "none")); all != nil {
		t.Errorf("read %+v", all)
	}

	all, err := d.All(ctx)
	if len(all) != 1 || all[0].ID != "here" {
		t.Errorf("got %+v", all)
	}
	for _, want := range []string{"truncated.json: unexpected end of JSON input", `is not the file of container "here"`, "of another version"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not say %q", err, want)
		}
	}
	left := names()
	if len(left) != 2 || left[0] != filepath.Base(d.file("here")) || left[1] != lockName {
		t.Errorf("left are %q", left)
	}
	if all, err := d.All(ctx); err != nil || len(all) != 1 {
		t.Errorf("then got %+v, %v", all, err)
	}
}

// What cannot be read just now is there later.
func TestUnreadable(t *testing.T) {
	ctx, path := t.Context(), t.TempDir()
	d := open(t, path)
	if err := d.Put(ctx, member("a")); err != nil {
		t.Fatal(err)
	}
	moved := filepath.Join(path, "moved")
	if err := errors.Join(os.Rename(d.file("a"), moved), os.Symlink(d.file("a"), d.file("a"))); err != nil {
		t.Fatal(err)
	}
	if all, err := d.All(ctx); !errors.Is(err, unix.ELOOP) || len(all) != 0 {
		t.Errorf("got %v, %v", all, err)
	}
	if err := os.Rename(moved, d.file("a")); err != nil {
		t.Fatal(err)
	}
	if all, err := d.All(ctx); err != nil || len(all) != 1 {
		t.Errorf("then got %v, %v", all, err)
	}
}

func TestConcurrent(t *testing.T) {
	ctx, path := t.Context(), t.TempDir()
	var running sync.WaitGroup
	for i := range 20 {
		running.Go(func() {
			d, id := open(t, path), fmt.Sprint("c", i)
			if err := d.Put(ctx, member(id)); err != nil {
				t.Error(err)
			}
			if found, err := d.Change(ctx, id, func(m *Member) { m.Started = true }); err != nil || !found {
				t.Error(found, err)
			}
			if _, err := d.All(ctx); err != nil {
				t.Error(err)
			}
			if i%2 == 0 {
				if found, err := d.Remove(ctx, id); err != nil || !found {
					t.Error(found, err)
				}
			}
		})
	}
	running.Wait()
	all, err := open(t, path).All(ctx)
	if err != nil || len(all) != 10 {
		t.Errorf("%d are left, %v", len(all), err)
	}
	for _, m := range all {
		if !m.Started {
			t.Errorf("%s has lost a change", m.ID)
		}
	}
}

// One that hangs with the lock keeps others no longer than they want.
func TestLocked(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	file, err := os.Create(filepath.Join(path, lockName))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := d.Put(ctx, member("a")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}
