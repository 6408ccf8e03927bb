package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/swap"
)

// press has the machine run short of memory again and again, until the test ends: it takes
// what is available, and more for which the kernel has to swap. It returns what tells for
// how long something has waited for memory so far.
func press(t *testing.T) (stalled func() time.Duration) {
	t.Helper()
	if err := swap.Make(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var working sync.WaitGroup
	working.Go(func() {
		for ctx.Err() == nil {
			if err := squeeze(ctx); err != nil {
				t.Error(err)
				return
			}
		}
	})
	t.Cleanup(func() {
		cancel()
		working.Wait()
	})
	before := waited(t)
	return func() time.Duration { return waited(t) - before }
}

// squeeze does so once. It leaves enough for the kernel not to have to kill a process.
func squeeze(ctx context.Context) (err error) {
	const (
		step  = 4 << 20
		pause = 10 * time.Millisecond
		held  = 5 * time.Second
		// Of the swap, in KiB: what is to be used, and what has to stay.
		use, spare = 96 << 10, 32 << 10
	)
	free := func() (int, error) { return fields("/proc/meminfo", "SwapFree") }
	left, err := free()
	if err != nil {
		return err
	}
	until := max(left-use, spare)
	var taken [][]byte
	defer func() {
		for _, m := range taken {
			err = errors.Join(err, unix.Munmap(m))
		}
	}()
	for ctx.Err() == nil && left > until {
		m, err := unix.Mmap(-1, 0, step, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return err
		}
		taken = append(taken, m)
		for at := 0; at < step; at += os.Getpagesize() {
			m[at] = 1
		}
		sleep(ctx, pause)
		if left, err = free(); err != nil {
			return err
		}
	}
	if len(taken) == 0 && ctx.Err() == nil {
		return fmt.Errorf("no memory to be short of: %d KiB of swap are left", left)
	}
	sleep(ctx, held)
	return nil
}

// sleep is how load is spread over time.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

var totalStall = regexp.MustCompile(`(?m)^some .* total=(\d+)$`)

// waited is for how long any process has waited for memory since the machine started.
func waited(t *testing.T) time.Duration {
	t.Helper()
	data, err := os.ReadFile("/proc/pressure/memory")
	if err != nil {
		t.Fatal(err)
	}
	found := totalStall.FindSubmatch(data)
	if found == nil {
		t.Fatalf("pressure of another form: %q", data)
	}
	n, err := strconv.ParseInt(string(found[1]), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(n) * time.Microsecond
}
