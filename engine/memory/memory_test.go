package memory

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

// smaps has one mapping of each kind. All have memory that is present.
const smaps = `00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/dbus-daemon
Anonymous:             0 kB
VmFlags: rd ex mr mw me mg
00651000-00653000 rw-p 00051000 08:02 173521      /usr/bin/dbus daemon
Size:                  8 kB
Anonymous:             8 kB
KSM:                   4 kB
VmFlags: rd wr mr mw me ac mg
00e03000-00e24000 rw-p 00000000 00:00 0           [heap]
Anonymous:           132 kB
VmFlags: rd wr mr mw me ac mg
35b1800000-35b1820000 r--p 00000000 00:00 0       [anon:Go: heap]
Anonymous:             8 kB
KSM:                   8 kB
VmFlags: rd mr mw me ac mg
35b1a21000-35b1a22000 ---p 00000000 00:00 0
Anonymous:             4 kB
VmFlags: mr mw me mg
7f0000000000-7f0000100000 rw-s 00000000 00:01 4096 /dev/zero (deleted)
Anonymous:             4 kB
VmFlags: rd wr sh mr mw me ms mg
7f0000200000-7f0000400000 rw-p 00000000 00:0f 77  /anon_hugepage (deleted)
Anonymous:             4 kB
VmFlags: rd wr mr mw me de ht mg
7f0000400000-7f0000401000 rw-p 00000000 00:00 0
Anonymous:             4 kB
VmFlags: rd wr mr mw me dd mg
7f0000402000-7f0000403000 rw-p 00000000 00:00 0
Anonymous:             4 kB
VmFlags: rd wr mr mw me wf mg
7f0000404000-7f0000405000 rw-p 00000000 00:00 0
Anonymous:             4 kB
VmFlags: rd wr mr mw me
7fffb2c0d000-7fffb2c2e000 rw-p 00000000 00:00 0   [stack]
Anonymous:             4 kB
VmFlags: rd wr mr mw me gd ac mg
7fffb2d48000-7fffb2d49000 r--p 00000000 00:00 0   [vvar]
Anonymous:             4 kB
VmFlags: rd mr pf io de dd mg
7fffb2d49000-7fffb2d4a000 r-xp 00000000 00:00 0   [vdso]
Anonymous:             4 kB
VmFlags: rd ex mr mw me de mg
7fffb2d4a000-7fffb2d4b000 --xp 00000000 00:00 0   [uprobes]
Anonymous:             4 kB
VmFlags: ex mg
`

func TestQualifies(t *testing.T) {
	mappings, err := parse(t.Context(), strings.NewReader(smaps))
	if err != nil {
		t.Fatal(err)
	}
	ordinary := []uint64{0x651000, 0xe03000, 0x7fffb2c0d000}
	for name, tc := range map[string]struct {
		o    Options
		more []uint64
	}{
		"by default":  {Options{}, nil},
		"secrets":     {Options{Secrets: true}, []uint64{0x7f0000400000, 0x7f0000402000}},
		"any":         {Options{Any: true}, []uint64{0x7f0000404000}},
		"only dirty":  {Options{Dirty: true}, []uint64{0x35b1800000}},
		"whole zeros": {Options{Zero: true, Exact: true}, nil},
	} {
		var got []uint64
		for _, m := range mappings {
			if m.qualifies(tc.o) {
				got = append(got, m.Start)
			}
		}
		want := slices.Sorted(slices.Values(append(tc.more, ordinary...)))
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %x, want %x", name, got, want)
		}
	}
	if m := mappings[1]; m.anonymous != 8<<10 || m.merged != 4<<10 || m.End != 0x653000 {
		t.Errorf("got %+v", m)
	}

	for bad, want := range map[string]string{
		"nonsense":                        `line of another form: "nonsense"`,
		"1000-2000 rw-p":                  `line of another form: "1000-2000 rw-p"`,
		"xyz-1000 rw-p 00000000 00:00 0":  `not a range of addresses: "xyz-1000"`,
		"2000-1000 rw-p 00000000 00:00 0": `not a range of addresses: "2000-1000"`,
		"1000-2000 rw-p 00000000 00:00 0\nAnonymous: much kB\n": `line of another form: "Anonymous: much kB"`,
	} {
		if _, err := parse(t.Context(), strings.NewReader(bad)); err == nil || err.Error() != want {
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

// A process that cannot be looked at may be mergeable.
func TestAllMergeable(t *testing.T) {
	for name, tc := range map[string]struct {
		err    error
		failed bool
	}{"gone": {unix.ESRCH, false}, "no such file": {os.ErrNotExist, false}, "refused": {unix.EACCES, true}, "no descriptor": {unix.EMFILE, true}} {
		got, err := ofThese([]int{1, 2, 3}, func(pid int) (bool, error) {
			if pid == 2 {
				return false, fmt.Errorf("smaps: %w", tc.err)
			}
			return pid == 3, nil
		})
		if (err != nil) != tc.failed || err == nil && !slices.Equal(got, []int{3}) {
			t.Errorf("%s: got %v, %v", name, got, err)
		}
	}
}

func TestJoin(t *testing.T) {
	ranges := []kernel.Range{
		{Start: 0x1000, End: 0x2000}, {Start: 0x2000 + maxGap, End: 0x3000 + maxGap},
		{Start: 0x4000 + 2*maxGap, End: 0x5000 + 2*maxGap},
	}
	want := []kernel.Range{{Start: 0x1000, End: 0x3000 + maxGap}, {Start: 0x4000 + 2*maxGap, End: 0x5000 + 2*maxGap}}
	if got := join(ranges, maxGap); !reflect.DeepEqual(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
	if got := join(ranges, 0); !reflect.DeepEqual(got, ranges) {
		t.Errorf("got %x, want %x", got, ranges)
	}
}

// mapped is anonymous memory of this process.
func mapped(t *testing.T, pages int) ([]byte, kernel.Range) {
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
	mem, at := mapped(t, 4096)
	var want []kernel.Range
	var read byte
	for i := 0; i < 4096; i += 4 {
		mem[i*page] = 1
		read += mem[(i+1)*page]
		start := at.Start + uint64(i*page)
		want = append(want, kernel.Range{Start: start, End: start + uint64(page)})
	}
	pagemap, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer pagemap.Close()
	found, err := scan(t.Context(), pagemap, os.Getpid(), at, Options{})
	if errors.Is(err, unix.ENOTTY) {
		missing.Skip(t, "this kernel has no PAGEMAP_SCAN (it came with 6.7)")
	}
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(found.present, want) || found.zero != uint64(1024*page) || read != 0 {
		t.Errorf("found %d ranges, want %d, and %d bytes of zero pages, want %d", len(found.present), len(want), found.zero, 1024*page)
	}
}

// The rest of a huge page that was written to in part is zero, and counted apart.
func TestZeroPartsOfHugePages(t *testing.T) {
	const huge = 2 << 20
	page := uint64(os.Getpagesize())
	mem, err := unix.Mmap(-1, 0, 4*huge, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	at := uint64(uintptr(unsafe.Pointer(&mem[0])))
	from := (at+huge-1)/huge*huge - at
	if err := unix.Madvise(mem, unix.MADV_HUGEPAGE); err != nil {
		missing.Skip(t, "no huge pages: %v", err)
	}
	mem[from+3*page] = 1
	pagemap, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer pagemap.Close()
	whole := kernel.Range{Start: at + from, End: at + from + huge}
	written := kernel.Range{Start: whole.Start + 3*page, End: whole.Start + 4*page}
	all, err := scan(t.Context(), pagemap, os.Getpid(), whole, Options{Zero: true})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(all.present, []kernel.Range{whole}) {
		missing.Skip(t, "the kernel gave no huge page, but %x", all.present)
	}
	got, err := scan(t.Context(), pagemap, os.Getpid(), whole, Options{})
	if err != nil || !reflect.DeepEqual(got.present, []kernel.Range{written}) || got.zero != huge-page {
		t.Errorf("got %x and %d bytes of zeros, %v; want %x", got.present, got.zero, err, written)
	}
}

func TestDirty(t *testing.T) {
	if tells, err := TellsDirty(); err != nil {
		t.Fatal(err)
	} else if !tells {
		missing.Skip(t, "this kernel was built without CONFIG_MEM_SOFT_DIRTY, or is older than 6.7")
	}
	page := uint64(os.Getpagesize())
	mem, at := mapped(t, 8)
	for i := range mem {
		mem[i] = 1
	}
	alive := true
	if err := ClearDirty(os.Getpid(), func() bool { return alive }); err != nil {
		t.Fatal(err)
	}
	mem[3*page]++
	pagemap, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer pagemap.Close()
	found, err := scan(t.Context(), pagemap, os.Getpid(), at, Options{Dirty: true})
	if want := []kernel.Range{{Start: at.Start + 3*page, End: at.Start + 4*page}}; err != nil || !reflect.DeepEqual(found.present, want) {
		t.Errorf("got %x, %v; want %x", found.present, err, want)
	}
}

func TestActivity(t *testing.T) {
	look := func() Activity {
		t.Helper()
		a, err := ActivityOf(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	before := look()
	mem, _ := mapped(t, 1024)
	for i := 0; i < len(mem); i += os.Getpagesize() {
		mem[i] = 1
	}
	if after := look(); after == before || after.Start != before.Start {
		t.Errorf("before %+v, after %+v", before, after)
	}
}

// ending is a context that ends when it has been asked a number of times.
type ending struct {
	context.Context
	left int
}

func (e *ending) Err() error {
	if e.left--; e.left < 0 {
		return context.Canceled
	}
	return nil
}

// A look ends wherever it is: in the list of mappings, or in one that is large.
func TestFindEnds(t *testing.T) {
	const large = 8 * span
	mem, err := unix.Mmap(-1, 0, large, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	mem[0], mem[large-1] = 1, 1
	ctx := &ending{t.Context(), math.MaxInt}
	if _, err := Find(ctx, os.Getpid(), Options{Any: true}); err != nil {
		t.Fatal(err)
	}
	whole := math.MaxInt - ctx.left
	if whole < 2*8 {
		t.Errorf("the context was looked at %d times", whole)
	}
	// Fewer than for what is mapped here: the program's own memory is not always the same.
	for _, left := range []int{0, 8, 2*8 - 1} {
		if _, err := Find(&ending{t.Context(), left}, os.Getpid(), Options{Any: true}); !errors.Is(err, context.Canceled) {
			t.Errorf("after %d looks at the context: %v", left, err)
		}
	}
}

func TestFind(t *testing.T) {
	mem, at := mapped(t, 64)
	for i := range mem {
		mem[i] = 1
	}
	offer, err := Find(t.Context(), os.Getpid(), Options{Any: true})
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
	mem, _ := mapped(t, 1)
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
	if _, err := Find(t.Context(), math.MaxInt32, Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Find: %v", err)
	}
	if _, err := Mergeable(math.MaxInt32); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Mergeable: %v", err)
	}
	if _, err := ActivityOf(math.MaxInt32); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("ActivityOf: %v", err)
	}
	if err := ClearDirty(math.MaxInt32, func() bool { return true }); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("ClearDirty: %v", err)
	}
	if _, err := Merged(math.MaxInt32); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Merged: %v", err)
	}
}
