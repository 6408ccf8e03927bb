package frame

import (
	"errors"
	"math"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/missing"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		missing.Skip(t, "not root: the kernel hides the numbers of physical pages")
	}
}

// mapped is anonymous memory of this process.
func mapped(t *testing.T, pages int) (mem []byte, at uint64) {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, pages*int(pageSize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	if err := unix.Madvise(mem, unix.MADV_NOHUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
		t.Fatal(err)
	}
	return mem, uint64(uintptr(unsafe.Pointer(&mem[0])))
}

// Pages that were written have frames, each one of its own; others have none.
func TestTable(t *testing.T) {
	needRoot(t)
	const pages = 100
	mem, at := mapped(t, pages)
	for i := 0; i < pages; i += 2 {
		mem[i*int(pageSize)] = 1
	}
	table, err := Open(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	entries := make([]Entry, pages)
	n, err := table.Read(at, entries)
	if err != nil || n != pages {
		t.Fatalf("read %d entries, %v", n, err)
	}
	seen := map[uint64]bool{}
	for i, e := range entries {
		if written := i%2 == 0; e.Own() != written || written && (!e.Exclusive() || seen[e.Frame()]) {
			t.Errorf("page %d: entry %#x", i, uint64(e))
		}
		seen[e.Frame()] = true
		if one, err := table.At(at + uint64(i)*pageSize); err != nil || one != e {
			t.Errorf("page %d: entry %#x alone, %v", i, uint64(one), err)
		}
	}
	if _, err := Open(math.MaxInt32); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a process that is not there: %v", err)
	}
}

// A page that nobody merged is merged only where the flags do not tell; the zero page is
// never.
func TestFlags(t *testing.T) {
	needRoot(t)
	mem, at := mapped(t, 2)
	mem[0] = 1
	zero := mem[pageSize]
	flags, err := OpenFlags()
	if err != nil {
		t.Fatal(err)
	}
	defer flags.Close()
	table, err := Open(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	for i, want := range []bool{!flags.TellMerged(), false} {
		e, err := table.At(at + uint64(i)*pageSize)
		if err != nil || !e.Own() {
			t.Fatalf("entry %#x, %v", uint64(e), err)
		}
		if merged, err := flags.Merged(e.Frame()); err != nil || merged != want {
			t.Errorf("page %d is merged: %v, %v", i, merged, err)
		}
	}
	t.Logf("flags tell what is merged: %v", flags.TellMerged())
	if zero != 0 {
		t.Error("memory was not zero")
	}
}
