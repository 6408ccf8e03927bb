// Package pages reads, from /proc/PID/pagemap and /proc/kpageflags, which
// physical pages a process's memory is in. It is how the tests see what was
// merged: it asks the page tables, not the counters of KSM, and shares no code
// with the engine.
package pages

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// Bits of an entry of /proc/PID/pagemap; see
// Documentation/admin-guide/mm/pagemap.rst.
const (
	frameMask = 1<<55 - 1
	fileBit   = 1 << 61 // a page of a file, or of shared memory
	present   = 1 << 63
)

// Bits of an entry of /proc/kpageflags; see include/uapi/linux/kernel-page-flags.h.
const (
	flagSlab      = 1 << 7
	flagAnonymous = 1 << 12
	flagKSM       = 1 << 21
	flagZeroPage  = 1 << 24
)

var pageSize = uint64(os.Getpagesize())

// Page is a page of a process's memory and the physical page, the frame, that
// it is in.
type Page struct {
	Address, Frame uint64
}

// Range returns the pages of a process that begin between two addresses and
// are present and anonymous, in the order of their addresses.
func Range(pid int, start, end uint64) ([]Page, error) {
	f, err := openPagemap(pid)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readRange(f, nil, start, end)
}

// All returns all pages of a process that are present and anonymous. It leaves
// out mappings without any access right, where Go reserves gigabytes.
func All(pid int) ([]Page, error) {
	return all(pid, func(rights string) bool { return !strings.HasPrefix(rights, "---") })
}

// AllAndProtected returns all pages of a process that are present and
// anonymous, those without any access right too.
func AllAndProtected(pid int) ([]Page, error) {
	return all(pid, func(string) bool { return true })
}

func all(pid int, wanted func(rights string) bool) ([]Page, error) {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	defer maps.Close()
	f, err := openPagemap(pid)
	if err != nil {
		return nil, err
	}
	defer f.Close()

	var found []Page
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		var start, end uint64
		var rights string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &start, &end, &rights); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", maps.Name(), lines.Text(), err)
		}
		if !wanted(rights) || strings.HasSuffix(lines.Text(), "[vsyscall]") {
			continue
		}
		if found, err = readRange(f, found, start, end); err != nil {
			return nil, err
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", maps.Name(), err)
	}
	return found, nil
}

func openPagemap(pid int) (*os.File, error) {
	return os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
}

// readRange appends the pages between start and end to found.
func readRange(pagemap *os.File, found []Page, start, end uint64) ([]Page, error) {
	buf := make([]byte, 64<<10)
	for address := start; address < end; {
		n := min(uint64(len(buf)), (end-address+pageSize-1)/pageSize*8)
		read, err := pagemap.ReadAt(buf[:n], int64(address/pageSize*8))
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("read page table at %#x: %w", address, err)
		}
		if read < 8 {
			break // the process is gone, and its memory with it
		}
		for entry := buf[:read&^7]; len(entry) > 0; entry = entry[8:] {
			e := binary.NativeEndian.Uint64(entry)
			if e&present != 0 && e&fileBit == 0 && e&frameMask != 0 {
				found = append(found, Page{Address: address, Frame: e & frameMask})
			}
			address += pageSize
		}
	}
	return found, nil
}

// Pair is a page of one process and one of another that are in one frame.
type Pair struct {
	Frame uint64
	A, B  uint64 // addresses
}

// Common returns the frames that are in both a and b, each once. Both must be as
// ByFrame returns them.
func Common(a, b []Page) []Pair {
	var common []Pair
	for len(a) > 0 && len(b) > 0 {
		switch {
		case a[0].Frame < b[0].Frame:
			a = a[1:]
		case a[0].Frame > b[0].Frame:
			b = b[1:]
		default:
			common = append(common, Pair{Frame: a[0].Frame, A: a[0].Address, B: b[0].Address})
			a, b = a[1:], b[1:]
		}
	}
	return common
}

// Merged returns how many frames KSM has merged that are in both a and b.
func Merged(a, b []Page) (int, error) {
	common := Common(ByFrame(a), ByFrame(b))
	frames := make([]uint64, len(common))
	for i, c := range common {
		frames[i] = c.Frame
	}
	flags, err := FlagsOf(frames...)
	if err != nil {
		return 0, err
	}
	merged := 0
	for _, f := range flags {
		if f.KSM() {
			merged++
		}
	}
	return merged, nil
}

// ByFrame returns pages in the order of their frames, one for each frame.
func ByFrame(pages []Page) []Page {
	pages = slices.Clone(pages)
	slices.SortStableFunc(pages, func(x, y Page) int { return cmp.Compare(x.Frame, y.Frame) })
	return slices.CompactFunc(pages, func(x, y Page) bool { return x.Frame == y.Frame })
}

// Flags tells what kind of page a frame holds.
type Flags uint64

// KSM tells whether KSM has merged the page. A page of the kernel's own objects
// may have the bit as well: what it holds in the place of a user's page's
// mapping can look like a merged one's.
func (f Flags) KSM() bool { return f&flagKSM != 0 && f&flagSlab == 0 }

// Anonymous tells whether the page holds data of a process: not the zero page
// that all processes read what they never wrote from, nor a page that the
// kernel maps into every process for itself.
func (f Flags) Anonymous() bool { return f&flagAnonymous != 0 && f&flagZeroPage == 0 }

// FlagsOf reads the flags of frames.
func FlagsOf(frames ...uint64) ([]Flags, error) {
	f, err := os.Open("/proc/kpageflags")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	flags := make([]Flags, len(frames))
	var entry [8]byte
	for i, frame := range frames {
		if _, err := f.ReadAt(entry[:], int64(frame*8)); err != nil {
			return nil, fmt.Errorf("read flags of frame %#x: %w", frame, err)
		}
		flags[i] = Flags(binary.NativeEndian.Uint64(entry[:]))
	}
	return flags, nil
}
