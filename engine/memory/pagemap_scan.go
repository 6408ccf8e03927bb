package memory

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// The PAGEMAP_SCAN ioctl of include/uapi/linux/fs.h, which golang.org/x/sys/unix
// does not have yet; see Documentation/admin-guide/mm/pagemap.rst.
const (
	ioctlPagemapScan = 0xc0606610 // _IOWR('f', 16, struct pm_scan_arg)

	pageIsFile    = 1 << 2
	pageIsPresent = 1 << 3
	pageIsPFNZero = 1 << 5
)

// pageRegion is struct page_region.
type pageRegion struct {
	start, end uint64
	_          uint64 // categories
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

// scan returns the parts of a mapping that are present, anonymous, and not the
// zero page. It returns [unix.ENOTTY] where the kernel has no PAGEMAP_SCAN.
func scan(pagemap *os.File, mapping kernel.Range) ([]kernel.Range, error) {
	var (
		found []kernel.Range
		vec   [512]pageRegion
		pin   runtime.Pinner
	)
	// The kernel is given the address as a number, which does not keep vec alive
	// nor in its place.
	pin.Pin(&vec)
	defer pin.Unpin()

	for start := mapping.Start; start < mapping.End; {
		arg := pmScanArg{
			start:            start,
			end:              mapping.End,
			vec:              uint64(uintptr(unsafe.Pointer(&vec))),
			vecLen:           uint64(len(vec)),
			categoryInverted: pageIsFile | pageIsPFNZero,
			categoryMask:     pageIsPresent | pageIsFile | pageIsPFNZero,
			returnMask:       pageIsPresent,
		}
		arg.size = uint64(unsafe.Sizeof(arg))
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, pagemap.Fd(), ioctlPagemapScan, uintptr(unsafe.Pointer(&arg)))
		if errno == unix.EINTR {
			continue
		} else if errno != 0 {
			return nil, errno
		}
		for _, r := range vec[:n] {
			found = append(found, kernel.Range{Start: r.start, End: r.end})
		}
		if arg.walkEnd <= start {
			break
		}
		start = arg.walkEnd
	}
	return found, nil
}
