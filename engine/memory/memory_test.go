package memory

import (
	"errors"
	"math"
	"os"
	"reflect"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

func TestCandidates(t *testing.T) {
	maps := `00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/dbus-daemon
00651000-00652000 rw-p 00051000 08:02 173521      /usr/bin/dbus-daemon
00652000-00655000 rw-p 00000000 00:00 0
00e03000-00e24000 rw-p 00000000 00:00 0           [heap]
35b1800000-35b1820000 r--p 00000000 00:00 0       [anon:Go: heap]
35b1a21000-35b1a22000 ---p 00000000 00:00 0
7f0000000000-7f0000100000 rw-s 00000000 00:01 4096 /dev/zero (deleted)
7f0000200000-7f0000300000 rw-p 00000000 00:0f 77  /anon_hugepage (deleted)
7f0000400000-7f0000500000 rw-s 00000000 00:00 0
7fffb2c0d000-7fffb2c2e000 rw-p 00000000 00:00 0   [stack]
7fffb2d48000-7fffb2d49000 r--p 00000000 00:00 0   [vvar]
7fffb2d49000-7fffb2d4a000 r-xp 00000000 00:00 0   [vdso]
7fffb2d4a000-7fffb2d4b000 --xp 00000000 00:00 0   [uprobes]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]
`
	got, err := candidates(strings.NewReader(maps))
	want := []kernel.Range{
		{Start: 0x652000, End: 0x655000}, {Start: 0xe03000, End: 0xe24000}, {Start: 0x35b1800000, End: 0x35b1820000},
		{Start: 0x7fffb2c0d000, End: 0x7fffb2c2e000},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %x, %v; want %x", got, err, want)
	}
	for bad, want := range map[string]string{
		"nonsense":                        `line of another form: "nonsense"`,
		"xyz-1000 rw-p 00000000 00:00 0":  `not a range of addresses: "xyz-1000"`,
		"2000-1000 rw-p 00000000 00:00 0": `not a range of addresses: "2000-1000"`,
	} {
		if _, err := candidates(strings.NewReader(bad)); err == nil || err.Error() != want {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestAnyMergeable(t *testing.T) {
	for smaps, want := range map[string]bool{
		"VmFlags: rd ex mr mw me\nVmFlags: rd wr mr mw me ac mg\n": true,
		"VmFlags: rd ex mr mw me mg \n":                            true,
		"VmFlags: rd ex mr mw me\nAnonymous:  8 kB\n":              false,
		"": false,
	} {
		if got, err := anyMergeable(strings.NewReader(smaps)); err != nil || got != want {
			t.Errorf("%q: got %v, %v", smaps, got, err)
		}
	}
}

func TestJoin(t *testing.T) {
	got := join([]kernel.Range{
		{Start: 0x1000, End: 0x2000}, {Start: 0x2000 + maxGap, End: 0x3000 + maxGap},
		{Start: 0x4000 + 2*maxGap, End: 0x5000 + 2*maxGap},
	})
	want := []kernel.Range{{Start: 0x1000, End: 0x3000 + maxGap}, {Start: 0x4000 + 2*maxGap, End: 0x5000 + 2*maxGap}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
}

func TestWhole(t *testing.T) {
	mappings := []kernel.Range{{Start: 0x1000, End: 0x3000}, {Start: 0x5000, End: 0x6000}}
	if got := whole(mappings); got.Bytes != 0x3000 || !reflect.DeepEqual(got.Ranges, mappings) {
		t.Errorf("got %+v", got)
	}
}

// mapping is anonymous memory of this process.
func mapping(t *testing.T, pages int) ([]byte, kernel.Range) {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, pages*os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	if err := unix.Madvise(mem, unix.MADV_NOHUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
		t.Fatal(err)
	}
	start := uint64(uintptr(unsafe.Pointer(&mem[0])))
	return mem, kernel.Range{Start: start, End: start + uint64(len(mem))}
}

// TestScan asks the running kernel: pages that were written are found, pages that
// were only read (the zero page) or never touched are not, and there may be more
// ranges than one call returns.
func TestScan(t *testing.T) {
	page := os.Getpagesize()
	mem, at := mapping(t, 4096)
	var want []kernel.Range
	for i := 0; i < 4096; i += 4 {
		mem[i*page] = 1
		_ = mem[(i+1)*page]
		start := at.Start + uint64(i*page)
		want = append(want, kernel.Range{Start: start, End: start + uint64(page)})
	}
	pagemap, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer pagemap.Close()
	got, err := scan(pagemap, at)
	if errors.Is(err, unix.ENOTTY) {
		missing.Skip(t, "this kernel has no PAGEMAP_SCAN (it came with 6.7)")
	}
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("found %d ranges, want %d", len(got), len(want))
	}
}

func TestFind(t *testing.T) {
	mem, at := mapping(t, 64)
	for i := range mem {
		mem[i] = 1
	}
	offer, err := Find(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	covered := false
	var sum uint64
	for _, r := range offer.Ranges {
		sum += r.Len()
		covered = covered || r.Start <= at.Start && at.End <= r.End
	}
	if !covered {
		t.Errorf("written mapping %x is not in the offer %x", at, offer.Ranges)
	}
	if offer.Bytes == 0 || offer.Bytes > sum {
		t.Errorf("%d bytes offered in ranges of %d", offer.Bytes, sum)
	}
}

func TestMergeable(t *testing.T) {
	mem, _ := mapping(t, 1)
	if err := unix.Madvise(mem, unix.MADV_MERGEABLE); err != nil {
		missing.Skip(t, "this kernel has no KSM: %v", err)
	}
	if ok, err := Mergeable(os.Getpid()); err != nil || !ok {
		t.Errorf("a process with a mergeable mapping: %v, %v", ok, err)
	}
	if _, err := Merged(os.Getpid()); err != nil {
		t.Error(err)
	}
}

func TestProcessGone(t *testing.T) {
	if _, err := Find(math.MaxInt32); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Find: %v", err)
	}
	if _, err := Mergeable(math.MaxInt32); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Mergeable: %v", err)
	}
	if _, err := Merged(math.MaxInt32); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Merged: %v", err)
	}
}
