package memory

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// The PAGEMAP_SCAN ioctl of include/uapi/linux/fs.h, which golang.org/x/sys/unix
// does not have yet; see Documentation/admin-guide/mm/pagemap.rst.
const (
	ioctlPagemapScan = 0xc0606610 // _IOWR('f', 16, struct pm_scan_arg)

	pageIsFile      = 1 << 2
	pageIsPresent   = 1 << 3
	pageIsPFNZero   = 1 << 5
	pageIsHuge      = 1 << 6
	pageIsSoftDirty = 1 << 7
)

// span is the most that is scanned in one call, in bytes, which cannot be ended.
const span = 1 << 30

// pageRegion is struct page_region.
type pageRegion struct {
	start, end, categories uint64
}

// pmScanArg is struct pm_scan_arg.
type pmScanArg struct {
	size             uint64
	flags            uint64
	start            uint64
	end              uint64
	walkEnd          uint64
	vec              uint64
	vecLen           uint64
	maxPages         uint64
	categoryInverted uint64
	categoryMask     uint64
	categoryAnyOf    uint64
	returnMask       uint64
}

// scanned is what a scan of a mapping found.
type scanned struct {
	// present are the parts that qualify, in ascending order.
	present []kernel.Range
	// zero is how many bytes of zero pages there are that were never written.
	zero uint64
}

func (s *scanned) add(start, end uint64) {
	if last := len(s.present) - 1; last >= 0 && s.present[last].End == start {
		s.present[last].End = end
	} else {
		s.present = append(s.present, kernel.Range{Start: start, End: end})
	}
}

// scan finds the parts of a mapping that are present and the process's own. The
// zero page that reading unwritten memory maps is none; those that a huge page
// brought along are told by what they hold. It returns [unix.ENOTTY] where the kernel
// has no PAGEMAP_SCAN, and the error of ctx when that has ended.
func scan(ctx context.Context, pagemap *os.File, pid int, m kernel.Range, o Options) (scanned, error) {
	var (
		found scanned
		vec   [512]pageRegion
		pin   runtime.Pinner
	)
	// The kernel is given the address as a number, which does not keep vec alive
	// nor in its place.
	pin.Pin(&vec)
	defer pin.Unpin()

	must := uint64(pageIsPresent)
	if o.Dirty {
		must |= pageIsSoftDirty
	}
	for start := m.Start; start < m.End; {
		if ctx.Err() != nil {
			return scanned{}, ctx.Err()
		}
		end := min(start+span, m.End)
		arg := pmScanArg{
			start:            start,
			end:              end,
			vec:              uint64(uintptr(unsafe.Pointer(&vec))),
			vecLen:           uint64(len(vec)),
			categoryInverted: pageIsFile,
			categoryMask:     must | pageIsFile,
			returnMask:       pageIsPresent | pageIsPFNZero | pageIsHuge,
		}
		arg.size = uint64(unsafe.Sizeof(arg))
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, pagemap.Fd(), ioctlPagemapScan, uintptr(unsafe.Pointer(&arg)))
		if errno == unix.EINTR {
			continue
		} else if errno != 0 {
			return scanned{}, errno
		}
		for _, r := range vec[:n] {
			switch {
			case r.categories&pageIsPFNZero != 0:
				found.zero += r.end - r.start
			case r.categories&pageIsHuge != 0 && !o.Zero:
				if err := found.addWritten(ctx, pid, r.start, r.end); err != nil {
					return scanned{}, err
				}
			default:
				found.add(r.start, r.end)
			}
		}
		if arg.walkEnd <= start {
			break
		}
		start = arg.walkEnd
	}
	return found, nil
}

// addWritten adds the pages of a part of a process's memory that are not zero. It is read
// by way of a file: process_vm_readv(2) would part what the process has by fork (commit
// a7f226604170, "mm/gup: trigger FAULT_FLAG_UNSHARE when R/O-pinning a possibly shared
// anonymous page").
func (s *scanned) addWritten(ctx context.Context, pid int, start, end uint64) error {
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return err
	}
	defer mem.Close()
	page := os.Getpagesize()
	zero := make([]byte, page)
	buf := make([]byte, 64*page)
	for at := start; at < end; {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		part := buf[:min(uint64(len(buf)), end-at)]
		n, err := mem.ReadAt(part, int64(at))
		if n < page {
			// It has been unmapped, or may not be read: the kernel will find out.
			s.add(at, end)
			if errors.Is(err, unix.ESRCH) {
				return err
			}
			return nil
		}
		for have := range slices.Chunk(part[:n/page*page], page) {
			if bytes.Equal(have, zero) {
				s.zero += uint64(page)
			} else {
				s.add(at, at+uint64(page))
			}
			at += uint64(page)
		}
	}
	return nil
}

// TellsDirty reports whether the kernel knows which pages were written to
// (CONFIG_MEM_SOFT_DIRTY), and finds them.
func TellsDirty() (bool, error) {
	mem, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return false, err
	}
	defer unix.Munmap(mem)
	mem[0] = 1
	pagemap, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return false, err
	}
	defer pagemap.Close()
	start := uint64(uintptr(unsafe.Pointer(&mem[0])))
	found, err := scan(context.Background(), pagemap, os.Getpid(), kernel.Range{Start: start, End: start + uint64(len(mem))}, Options{Dirty: true, Zero: true})
	if errors.Is(err, unix.ENOTTY) {
		return false, nil
	}
	return len(found.present) > 0, err
}
