// Package frame tells which physical pages, the frames, the memory of a process is in,
// and what the kernel says of them: /proc/PID/pagemap and /proc/kpageflags, as in
// Documentation/admin-guide/mm/pagemap.rst of the kernel's source. It needs root.
package frame

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrHidden says that the kernel does not tell the caller the numbers of frames.
var ErrHidden = errors.New("the kernel hides the numbers of physical pages: run it as root, with CAP_SYS_ADMIN")

// Entry is what a page table says of a page.
type Entry uint64

const (
	numberMask = 1<<55 - 1
	exclusive  = 1 << 56
	ofFile     = 1 << 61
	present    = 1 << 63
)

// Own reports whether the page is in memory, and the process's own: not of a file, nor
// shared memory. The zero page, which is in place of what was never written, is one.
func (e Entry) Own() bool { return e&present != 0 && e&ofFile == 0 }

// Exclusive reports whether the frame is mapped nowhere else.
func (e Entry) Exclusive() bool { return e&exclusive != 0 }

// Frame is the number of the frame of a page that is in memory.
func (e Entry) Frame() uint64 { return uint64(e & numberMask) }

// Table is the page table of a process. It is for one goroutine at a time.
type Table struct {
	file *os.File
	buf  []byte
}

// Open opens the page table of the process that has a number. It stays that process's,
// and is empty when that is gone. The error matches [os.ErrNotExist] where there is none.
func Open(pid int) (*Table, error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return nil, err
	}
	return &Table{file: file}, nil
}

// Close closes the table.
func (t *Table) Close() error { return t.file.Close() }

// Read fills entries with those of the pages from an address on, and returns how many
// there were: fewer where the process, or its address space, ends. The error matches
// [ErrHidden] where the kernel gives no numbers.
func (t *Table) Read(address uint64, entries []Entry) (int, error) {
	if need := len(entries) * 8; len(t.buf) < need {
		t.buf = make([]byte, need)
	}
	n, err := t.file.ReadAt(t.buf[:len(entries)*8], int64(address/pageSize*8))
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, unix.ESRCH) {
		return 0, fmt.Errorf("reading %s: %w", t.file.Name(), err)
	}
	for i := range entries[:n/8] {
		entries[i] = Entry(binary.NativeEndian.Uint64(t.buf[i*8:]))
		if entries[i].Own() && entries[i].Frame() == 0 {
			return 0, ErrHidden
		}
	}
	return n / 8, nil
}

// At reads the entry of one page. That of a page which is not there is zero.
func (t *Table) At(address uint64) (Entry, error) {
	var one [1]Entry
	_, err := t.Read(address, one[:])
	return one[0], err
}

var pageSize = uint64(os.Getpagesize())

// Flags reads what the kernel says of frames. It is for one goroutine at a time.
type Flags struct {
	file *os.File
	ksm  bool
}

// Bits of include/uapi/linux/kernel-page-flags.h.
const (
	flagSlab      = 1 << 7
	flagAnonymous = 1 << 12
	flagKSM       = 1 << 21
	flagZero      = 1 << 24
)

// OpenFlags opens the flags of all frames, and finds out whether they tell what is
// merged.
func OpenFlags() (*Flags, error) {
	file, err := os.Open("/proc/kpageflags")
	if err != nil {
		return nil, err
	}
	f := &Flags{file: file}
	if f.ksm, err = f.tell(); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return f, nil
}

// tell asks for a page of this process that is not merged. Kernels from 6.12 on,
// unless that was mended, give every anonymous page the flag.
func (f *Flags) tell() (bool, error) {
	page, err := unix.Mmap(-1, 0, int(pageSize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return false, fmt.Errorf("mapping a page: %w", err)
	}
	defer unix.Munmap(page)
	// A page like no other, for the case that ksmd merges all that this process has.
	binary.NativeEndian.PutUint64(page, uint64(uintptr(unsafe.Pointer(&page[0]))))
	binary.NativeEndian.PutUint64(page[8:], uint64(os.Getpid()))
	table, err := Open(os.Getpid())
	if err != nil {
		return false, err
	}
	defer table.Close()
	entry, err := table.At(uint64(uintptr(unsafe.Pointer(&page[0]))))
	if err != nil {
		return false, err
	}
	flags, err := f.of(entry.Frame())
	return flags&flagKSM == 0, err
}

// Close closes the flags.
func (f *Flags) Close() error { return f.file.Close() }

// TellMerged reports whether [Flags.Merged] is known.
func (f *Flags) TellMerged() bool { return f.ksm }

func (f *Flags) of(frame uint64) (uint64, error) {
	var entry [8]byte
	if _, err := f.file.ReadAt(entry[:], int64(frame*8)); err != nil {
		return 0, fmt.Errorf("reading flags of physical page %#x: %w", frame, err)
	}
	return binary.NativeEndian.Uint64(entry[:]), nil
}

// Merged reports whether a frame holds a page that KSM has merged. Where the flags do not
// tell, it is so for each page of a process's own, but never for the zero page.
func (f *Flags) Merged(frame uint64) (bool, error) {
	flags, err := f.of(frame)
	return flags&flagKSM != 0 && flags&flagAnonymous != 0 && flags&(flagSlab|flagZero) == 0, err
}
