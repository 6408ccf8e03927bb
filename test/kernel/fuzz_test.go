package kernel_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
)

// Bad input must come back with an error, or do what it says, and soon; what
// the kernel thinks of it, the VM tells.
const (
	fuzzTime  = 20 * time.Second // each
	fuzzSeeds = 4
	fuzzCalls = 2000 // for each seed, if there is time
)

// fuzz calls f with generators of fixed seeds until the time is over.
func fuzz(t *testing.T, f func(r *rand.Rand)) {
	t.Helper()
	began := time.Now()
	for seed := range uint64(fuzzSeeds) {
		r := rand.New(rand.NewPCG(seed, 0))
		n := 0
		for ; n < fuzzCalls && time.Since(began) < fuzzTime*time.Duration(seed+1)/fuzzSeeds; n++ {
			call := time.Now()
			f(r)
			if took := time.Since(call); took > patience {
				t.Errorf("seed %d, call %d took %s", seed, n, took)
			}
		}
		t.Logf("seed %d: %d calls", seed, n)
	}
}

// leaveNoPartition removes all that a test may have made.
func leaveNoPartition(t *testing.T) {
	t.Helper()
	entries, err := os.ReadDir(ksm.Root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() && e.Name() != "control" {
			if err := ksm.Write("control/remove_partition", "%s", e.Name()); err != nil && !isAny(err, unix.ENOENT, unix.EBUSY) {
				t.Errorf("remove %s: %v", e.Name(), err)
			}
			wantGone(t, e.Name())
		}
	}
}

func oneOf[T any](r *rand.Rand, values ...T) T { return values[r.IntN(len(values))] }

// number is one at the edge of something, or any.
func number(r *rand.Rand) uint64 {
	n := oneOf(r, 0, 1, 1<<12, 1<<31, 1<<32, 1<<47, 1<<63, tooHigh, ^uint64(0), r.Uint64())
	return n + oneOf[uint64](r, 0, 1, 1<<12-1, 1<<12, ^uint64(0))
}

func text(r *rand.Rand) string {
	word := func() string {
		return oneOf(r, "", "a", "-", "+", "0x", ".", "..", "/", "control", "features", "\x00", "\n", "%s%n", "\xff\xfe",
			fmt.Sprint(number(r)), fmt.Sprintf("%x", number(r)), fmt.Sprintf("-%d", number(r)), fmt.Sprintf("%#x", number(r)))
	}
	switch r.IntN(4) {
	case 0:
		data := make([]byte, oneOf(r, 1, 31, 32, 33, 4095, 4096, 4097, r.IntN(1<<14)))
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		return string(data)
	case 1:
		return word()
	default:
		s := word()
		for range r.IntN(5) {
			s += oneOf(r, " ", "  ", "\t", "\n", ",", "") + word()
		}
		return s
	}
}

func TestFuzzFiles(t *testing.T) {
	a := partition(t, "a")
	p, q := holding(t, 64, 1), startUnmergeable(t)
	q.hold(64, 64, 1)
	t.Cleanup(func() { leaveNoPartition(t) })
	var files []string
	for _, dir := range []string{"control", a} {
		entries, err := os.ReadDir(filepath.Join(ksm.Root, dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if info, err := e.Info(); err != nil || info.Mode().Perm()&0o200 != 0 {
				files = append(files, filepath.Join(dir, e.Name()))
			}
		}
	}
	files = append(files, "max_page_sharing", "merge_across_nodes", "pages_shared")
	for _, knob := range []string{"max_page_sharing", "merge_across_nodes"} {
		value := counter(t, knob)
		t.Cleanup(func() {
			leaveNoPartition(t)
			if err := ksm.Write(knob, "%d", value); err != nil {
				t.Error(err)
			}
		})
	}
	fuzz(t, func(r *rand.Rand) {
		line := text(r)
		if r.IntN(2) == 0 {
			// Nearly right, for those that take a process.
			line = fmt.Sprintf("%d%s", oneOf(r, p.Pid, q.Pid, 1, kthreadd, noPid, -1), oneOf(r, "", "\n", " "))
			if r.IntN(2) == 0 {
				line += fmt.Sprintf(" %x %x", oneOf(r, p.start, q.start, number(r)), oneOf(r, p.end, q.end, number(r)))
			}
			line += oneOf(r, "", "", "\n", " ", "\x00", text(r))
		}
		_ = ksm.Write(files[r.IntN(len(files))], "%s", line)
		// A pause that the fuzz has set would last for weeks.
		_ = ksm.Write(a+"/sleep_millisecs", "0")
		if !exists(a) {
			_ = ksm.Write("control/add_partition", "%s", a)
		}
	})
	p.ask("check")
	q.ask("check")
}

func TestFuzzSyscalls(t *testing.T) {
	wantFeature(t, syscalls)
	a := partition(t, "a")
	p, q := holding(t, 64, 1), startUnmergeable(t)
	q.hold(64, 64, 1)
	t.Cleanup(func() { leaveNoPartition(t) })
	f := open(t, a, 0)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	fuzz(t, func(r *rand.Rand) {
		if r.IntN(2) == 0 {
			name := append([]byte(text(r)), 0)
			address := oneOf(r, uintptr(unsafe.Pointer(&name[0])), uintptr(number(r)))
			flags := oneOf(r, 0, unix.O_CREAT, unix.O_CREAT|unix.O_EXCL, unix.O_CREAT|unix.O_CLOEXEC, uintptr(r.Uint64()))
			if fd, _, errno := unix.Syscall(ksm.OpenNumber, address, flags, uintptr(r.Uint64())); errno == 0 {
				if err := unix.Close(int(fd)); err != nil {
					t.Error(err)
				}
			}
			return
		}
		_, _, _ = unix.Syscall6(ksm.MergeNumber,
			oneOf(r, f.Fd(), null.Fd(), ^uintptr(0), 1<<20, uintptr(r.Uint64())),
			uintptr(oneOf(r, p.Pid, q.Pid, 1, 0, -1, kthreadd, noPid, int(r.Uint32()))),
			uintptr(oneOf(r, p.start, q.start, number(r))),
			uintptr(oneOf(r, p.end-p.start, number(r))), uintptr(r.Uint64()), 0)
	})
	p.ask("check")
	q.ask("check")
}
