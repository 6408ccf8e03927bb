package watch

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

const patience = 30 * time.Second

// watching runs one of the functions until the test ends.
func watching(t *testing.T, watch func(context.Context, chan<- struct{})) <-chan struct{} {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	changed := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() { watch(ctx, changed) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return changed
}

func expect(t *testing.T, changed <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-changed:
	case <-time.After(patience):
		t.Fatalf("not told of %s", what)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.yaml")
	write(t, path, "interval: 1m\n")
	changed := watching(t, func(ctx context.Context, changed chan<- struct{}) {
		if err := File(ctx, path, changed); err != nil {
			t.Error(err)
		}
	})
	// There is no telling when it watches: this goes on until it is told of, and until
	// no more is.
	for told := false; !told; {
		write(t, path, time.Now().String())
		for more := true; more; {
			select {
			case <-changed:
				told = true
			case <-time.After(4 * quiet):
				more = false
			}
		}
	}
	write(t, path+"~", "interval: 2m\n")
	rename(t, path+"~", path)
	expect(t, changed, "a file in its place")

	// What changes nothing is not told of, nor a file that is emptied to be written:
	// the next that is heard of is the last.
	write(t, path, "")
	write(t, filepath.Join(dir, "other.yaml"), "interval: 3m\n")
	write(t, path, "interval: 2m\n")
	select {
	case <-changed:
		t.Error("told of what changes nothing")
	case <-time.After(4 * quiet):
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	expect(t, changed, "a file that is gone")
	write(t, path, "interval: 2m\n")
	expect(t, changed, "a file that is back")
}

// Kubernetes has the files of a ConfigMap behind a link that it replaces.
func TestConfigMap(t *testing.T) {
	dir := t.TempDir()
	link := func(version string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, version), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, version, "config.yaml"), "# "+version)
		if err := os.Symlink(version, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		rename(t, filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data"))
	}
	link("..1")
	path := filepath.Join(dir, "config.yaml")
	if err := os.Symlink("..data/config.yaml", path); err != nil {
		t.Fatal(err)
	}
	changed := watching(t, func(ctx context.Context, changed chan<- struct{}) {
		if err := File(ctx, path, changed); err != nil {
			t.Error(err)
		}
	})
	began := time.Now()
	for version := 2; ; version++ {
		link(".." + strconv.Itoa(version))
		select {
		case <-changed:
			return
		case <-time.After(2 * quiet):
			if time.Since(began) > patience {
				t.Fatal("not told of a link in the place of the old one")
			}
		}
	}
}

func TestNothingToWatch(t *testing.T) {
	err := File(t.Context(), filepath.Join(t.TempDir(), "none", "config.yaml"), nil)
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error is %v", err)
	}
}

func TestSignal(t *testing.T) {
	// One that nobody waits for yet would end the test.
	keep := make(chan os.Signal, 1)
	signal.Notify(keep, syscall.SIGHUP)
	defer signal.Stop(keep)
	changed := watching(t, func(ctx context.Context, changed chan<- struct{}) { Signal(ctx, syscall.SIGHUP, changed) })
	for {
		if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		select {
		case <-changed:
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}
