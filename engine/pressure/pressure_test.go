package pressure

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/test/missing"
)

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestCancelled(t *testing.T) {
	if _, err := os.Stat(Node); err != nil {
		missing.Skip(t, "no pressure stall information: %v", err)
	}
	if os.Getuid() != 0 {
		missing.Skip(t, "not root")
	}
	var before int
	for i := range 4 {
		if i == 1 {
			before = descriptors(t) // with the poller's own
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- Watch(ctx, Node, func() {}) }()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
}

func TestNoPressureInformation(t *testing.T) {
	if err := Watch(t.Context(), filepath.Join(t.TempDir(), "memory.pressure"), func() {}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

// A cgroup above its soft limit has to wait for memory, again and again, and is watched
// until it is gone.
func TestScarce(t *testing.T) {
	const root = "/sys/fs/cgroup"
	if _, err := os.Stat(root + "/cgroup.controllers"); err != nil {
		missing.Skip(t, "no cgroup v2, which the VM has: %v", err)
	}
	dir := filepath.Join(root, "sksm-test-pressure")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	})
	if err := os.WriteFile(dir+"/memory.high", []byte("4M"), 0); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	told := make(chan struct{}, 1)
	ended := make(chan error, 1)
	go func() {
		defer close(ended)
		ended <- Watch(ctx, dir+"/memory.pressure", func() {
			select {
			case told <- struct{}{}:
			default:
			}
		})
	}()
	defer func() {
		cancel()
		for range ended {
		}
	}()
	// It takes more and more, as it has to wait only while it does.
	hog := exec.CommandContext(ctx, "sh", "-c", fmt.Sprintf(`echo $$ >%s/cgroup.procs; exec tail /dev/zero`, dir))
	if err := hog.Start(); err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(func() {
		hog.Process.Kill()
		hog.Wait()
	})
	defer stop()
	for range 3 {
		select {
		case <-told:
		case err := <-ended:
			t.Fatalf("the watch ended: %v", err)
		case <-ctx.Done():
			t.Fatal("nobody was told that memory is scarce")
		}
	}
	stop()
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, os.ErrNotExist) {
		t.Errorf("when the cgroup is gone: %v", err)
	}
}
