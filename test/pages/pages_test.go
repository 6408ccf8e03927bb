package pages

import (
	"os"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/missing"
)

// mapping maps anonymous memory, small pages only, and returns it with the
// address it begins at.
func mapping(t *testing.T, pages int) ([]byte, uint64) {
	t.Helper()
	if os.Getuid() != 0 {
		missing.Skip(t, "only root is shown the frames of a page table")
	}
	m, err := unix.Mmap(-1, 0, pages*os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(m); err != nil {
			t.Error(err)
		}
	})
	// A kernel without huge pages answers EINVAL, and then needs no advice.
	if err := unix.Madvise(m, unix.MADV_NOHUGEPAGE); err != nil && err != unix.EINVAL {
		t.Fatal(err)
	}
	return m, uint64(uintptr(unsafe.Pointer(&m[0])))
}

func TestRangeFindsWhatWasWritten(t *testing.T) {
	m, start := mapping(t, 64)
	written := []int{0, 7, 8, 63}
	for _, p := range written {
		m[p*os.Getpagesize()] = 1
	}
	found, err := Range(os.Getpid(), start, start+uint64(len(m)))
	if err != nil {
		t.Fatal(err)
	}
	if len(found) != len(written) {
		t.Fatalf("found %d pages, wrote %d", len(found), len(written))
	}
	for i, p := range written {
		if want := start + uint64(p*os.Getpagesize()); found[i].Address != want {
			t.Errorf("page %d found at %#x, is at %#x", p, found[i].Address, want)
		}
		flags, err := FlagsOf(found[i].Frame)
		if err != nil {
			t.Fatal(err)
		}
		if !flags[0].Anonymous() || flags[0].KSM() {
			t.Errorf("page %d has flags %#x", p, flags[0])
		}
	}
	all, err := All(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range found {
		if !slices.Contains(all, p) {
			t.Errorf("page at %#x is not among all pages", p.Address)
		}
	}

	// What nobody may touch is there all the same.
	if err := unix.Mprotect(m, unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	if all, err = All(os.Getpid()); err != nil || slices.Contains(all, found[0]) {
		t.Errorf("a page without access rights is among all pages, %v", err)
	}
	if all, err = AllAndProtected(os.Getpid()); err != nil || !slices.Contains(all, found[0]) {
		t.Errorf("a page without access rights is not among all pages and protected ones, %v", err)
	}
}

func TestZeroPageIsNobodys(t *testing.T) {
	m, start := mapping(t, 1)
	if m[0] != 0 { // reading maps the zero page
		t.Fatal("new memory is not zero")
	}
	found, err := Range(os.Getpid(), start, start+uint64(len(m)))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range found {
		flags, err := FlagsOf(p.Frame)
		if err != nil {
			t.Fatal(err)
		}
		if flags[0].Anonymous() {
			t.Errorf("the zero page has flags %#x", flags[0])
		}
	}
}

func TestCommon(t *testing.T) {
	a := []Page{{0x1000, 5}, {0x2000, 3}, {0x3000, 9}, {0x4000, 3}}
	b := []Page{{0x9000, 3}, {0x8000, 4}, {0x7000, 9}}
	want := []Pair{{Frame: 3, A: 0x2000, B: 0x9000}, {Frame: 9, A: 0x3000, B: 0x7000}}
	if got := Common(ByFrame(a), ByFrame(b)); !slices.Equal(got, want) {
		t.Errorf("Common returned %v, want %v", got, want)
	}
	if got := Common(ByFrame(a), nil); len(got) != 0 {
		t.Errorf("Common with nothing returned %v", got)
	}
}
