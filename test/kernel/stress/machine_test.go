package stress_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
	"github.com/selective-ksm/selective-ksm/test/kernel/swap"
	"github.com/selective-ksm/selective-ksm/test/pages"
)

// prepareMachine gives the kernel a swap to write to, and so many pids that
// none is used twice: one that is read from a list is never that of another
// process a moment later. Whether pages merge across nodes is up to the seed,
// as it cannot be changed while there are partitions.
func prepareMachine(t *testing.T) {
	t.Helper()
	for _, w := range []struct{ file, value string }{
		{"/proc/sys/kernel/pid_max", "4194304"},
		{"/sys/kernel/mm/transparent_hugepage/enabled", "always"},
		// khugepaged is slow by default, and with it what it may do wrong.
		{"/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs", "100"},
		{filepath.Join(ksm.Root, "merge_across_nodes"), strconv.FormatUint(*seed%2, 10)},
	} {
		if err := ksm.WriteFile(w.file, []byte(w.value)); err != nil {
			t.Fatal(err)
		}
	}
	if err := swap.Make(); err != nil {
		t.Fatal(err)
	}
}

// shakeMachine does what concerns all of its memory, until ctx ends.
func (s *stress) shakeMachine(ctx context.Context, r *rand.Rand) {
	const pause = 2 * time.Second
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s.still.RLock()
		switch r.IntN(4) {
		case 0: // all that is in the swap comes back
			if err := errors.Join(swap.Off(), swap.On()); err != nil {
				s.t.Error(err)
			}
		default:
			if err := ksm.WriteFile("/proc/sys/vm/compact_memory", []byte("1")); err != nil {
				s.t.Error(err)
			}
		}
		s.still.RUnlock()
	}
}

// migratePages is migrate_pages(2) from all of two nodes to one.
func migratePages(pid, node int) error {
	const maxNode = 8
	from, to := uint64(3), uint64(1)<<node
	_, _, errno := unix.Syscall6(unix.SYS_MIGRATE_PAGES, uintptr(pid), maxNode,
		uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&to)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// The caches of what KSM allocates for pages and processes.
var caches = []string{"ksm_rmap_item", "ksm_stable_node", "ksm_mm_slot"}

// kernelObjects counts the objects that KSM has allocated.
func kernelObjects(t *testing.T) map[string]int {
	t.Helper()
	objects := make(map[string]int)
	for _, cache := range caches {
		n, err := slabObjects(cache)
		if err != nil {
			t.Fatal(err)
		}
		objects[cache] = n
	}
	return objects
}

func slabObjects(cache string) (int, error) {
	dir := filepath.Join("/sys/kernel/slab", cache)
	link, err := os.Readlink(dir)
	if err != nil && !errors.Is(err, unix.EINVAL) {
		return 0, err
	}
	if err == nil {
		return 0, fmt.Errorf("%s is one with %s; boot with slab_nomerge", cache, link)
	}
	// Each CPU keeps free objects, that count as used until it gives them back.
	if err := os.WriteFile(filepath.Join(dir, "shrink"), []byte("1"), 0); err != nil {
		return 0, err
	}
	data, err := os.ReadFile(filepath.Join(dir, "objects"))
	if err != nil {
		return 0, err
	}
	// Behind the sum are the numbers of each node.
	sum, _, _ := strings.Cut(strings.TrimSpace(string(data)), " ")
	return strconv.Atoi(sum)
}

// wantNothingLeft looks for what the kernel has kept of partitions that are
// gone.
func wantNothingLeft(t *testing.T, before map[string]int) {
	t.Helper()
	// Pages stay in the cache of the swap when nobody has them any more.
	if err := swap.Off(); err != nil {
		t.Error(err)
	}
	for _, counter := range []string{"pages_shared", "pages_sharing", "pages_unshared"} {
		n, err := ksm.Counter(counter)
		if err != nil || n != 0 {
			t.Errorf("%s is %d, %v, and there is no partition", counter, n, err)
		}
	}
	for _, cache := range caches {
		if err := eventually(func() error {
			n, err := slabObjects(cache)
			if err == nil && n != before[cache] {
				err = fmt.Errorf("%d objects, %d before", n, before[cache])
			}
			return err
		}); err != nil {
			t.Errorf("%s: %v", cache, err)
		}
	}
	if err := eventually(wantNoFrames); err != nil {
		t.Error(err)
	}
	wantNoLeak(t)
}

// wantNoFrames looks for ksm pages in all of the machine's memory.
func wantNoFrames() error {
	// Each CPU has lists of pages that wait to be sorted, and so to be freed:
	// compaction drains them.
	if err := ksm.WriteFile("/proc/sys/vm/compact_memory", []byte("1")); err != nil {
		return err
	}
	data, err := os.ReadFile("/proc/kpageflags")
	if err != nil {
		return err
	}
	var found []string
	for frame := 0; len(data) >= 8; frame++ {
		if flags := pages.Flags(binary.NativeEndian.Uint64(data)); flags.KSM() {
			found = append(found, fmt.Sprintf("%#x with flags %#x", frame, flags))
		}
		data = data[8:]
	}
	if len(found) > 0 {
		return fmt.Errorf("%d ksm pages of nobody: %s", len(found), strings.Join(found[:min(len(found), 8)], ", "))
	}
	return nil
}

// wantNoLeak asks kmemleak, where the kernel has it.
func wantNoLeak(t *testing.T) {
	t.Helper()
	if !configured(t, "CONFIG_DEBUG_KMEMLEAK") {
		return
	}
	const debugfs = "/sys/kernel/debug"
	if err := unix.Mount("debugfs", debugfs, "debugfs", 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
		t.Fatal(err)
	}
	// What is on its way between two places is found again the second time.
	for range 2 {
		if err := os.WriteFile(debugfs+"/kmemleak", []byte("scan"), 0); err != nil {
			t.Fatal(err)
		}
	}
	leaks, err := os.ReadFile(debugfs + "/kmemleak")
	if err != nil || len(leaks) > 0 {
		t.Errorf("kmemleak: %v\n%s", err, leaks)
	}
}

// configured tells whether an option was on when the kernel was built.
func configured(t *testing.T, option string) bool {
	t.Helper()
	f, err := os.Open("/proc/config.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	config, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(bytes.Split(config, []byte{'\n'}), func(line []byte) bool {
		return string(line) == option+"=y"
	})
}
