// Package memory says what of a process's memory is worth offering for a merge:
// private anonymous memory that is present.
package memory

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// maxGap is the most memory, in bytes, that does not qualify and is offered
// nevertheless between two parts of a mapping that do: the kernel steps over it
// faster than it takes another command.
const maxGap = 1 << 20

// Offer is the memory of a process that is worth merging.
type Offer struct {
	// Ranges hold that memory, and small gaps in it, in ascending order.
	Ranges []kernel.Range
	// Bytes is how much of the ranges qualifies.
	Bytes uint64
}

// Find returns what a process has to offer. Where the kernel lacks PAGEMAP_SCAN
// (it came with 6.7), that is its mappings whole, present or not. The error
// matches [os.ErrNotExist] or [unix.ESRCH] when the process is gone.
//
// The process is looked up by its number: the caller checks that it was the right
// one after the call.
func Find(pid int) (Offer, error) {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return Offer{}, err
	}
	defer maps.Close()
	mappings, err := candidates(maps)
	if err != nil {
		return Offer{}, fmt.Errorf("reading %s: %w", maps.Name(), err)
	}

	pagemap, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return Offer{}, err
	}
	defer pagemap.Close()
	var offer Offer
	for _, m := range mappings {
		present, err := scan(pagemap, m)
		if errors.Is(err, unix.ENOTTY) {
			return whole(mappings), nil
		} else if err != nil {
			return Offer{}, fmt.Errorf("scanning %s: %w", pagemap.Name(), err)
		}
		for _, r := range present {
			offer.Bytes += r.Len()
		}
		offer.Ranges = append(offer.Ranges, join(present)...)
	}
	return offer, nil
}

// Mergeable reports whether KSM may merge any memory of a process: whether it, or
// whoever started it, called prctl(PR_SET_MEMORY_MERGE) or madvise(MADV_MERGEABLE).
// Errors are those of [Find].
//
// It goes by the flags in smaps, as ksm_stat does not tell on 6.12.
func Mergeable(pid int) (bool, error) {
	smaps, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return false, err
	}
	defer smaps.Close()
	return anyMergeable(smaps)
}

// anyMergeable reads no further than the first mergeable mapping, since the kernel
// walks the pages of all that is read.
func anyMergeable(smaps io.Reader) (bool, error) {
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		if flags, ok := strings.CutPrefix(lines.Text(), "VmFlags:"); ok && slices.Contains(strings.Fields(flags), "mg") {
			return true, nil
		}
	}
	return false, lines.Err()
}

// Merged returns how many bytes of a process are merged with another page. Errors
// are those of [Find].
func Merged(pid int) (uint64, error) {
	path := fmt.Sprintf("/proc/%d/ksm_merging_pages", pid)
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	pages, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("reading %s: %w", path, err)
	}
	return pages * uint64(os.Getpagesize()), nil
}

// candidates reads the private anonymous mappings out of /proc/PID/maps.
func candidates(maps io.Reader) ([]kernel.Range, error) {
	var found []kernel.Range
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		// 7f1c2000-7f1c4000 rw-p 00000000 00:00 0    [heap]
		f := strings.Fields(lines.Text())
		if len(f) < 5 {
			return nil, fmt.Errorf("line of another form: %q", lines.Text())
		}
		perms, inode, name := f[1], f[4], strings.Join(f[5:], " ")
		if !strings.HasSuffix(perms, "p") || strings.HasPrefix(perms, "---") || inode != "0" || !ordinary(name) {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err := errors.Join(err1, err2); err != nil || start >= end {
			return nil, fmt.Errorf("not a range of addresses: %q", f[0])
		}
		found = append(found, kernel.Range{Start: start, End: end})
	}
	return found, lines.Err()
}

// ordinary reports whether a mapping without a file is memory of the program, and
// not one of the kernel's special mappings ([vdso], [vvar], [uprobes] and others).
func ordinary(name string) bool {
	return name == "" || name == "[heap]" || name == "[stack]" || strings.HasPrefix(name, "[anon:")
}

// whole offers mappings as they are.
func whole(mappings []kernel.Range) Offer {
	offer := Offer{Ranges: mappings}
	for _, m := range mappings {
		offer.Bytes += m.Len()
	}
	return offer
}

// join makes one range of ranges with little between them.
func join(ranges []kernel.Range) []kernel.Range {
	var joined []kernel.Range
	for _, r := range ranges {
		if last := len(joined) - 1; last >= 0 && r.Start-joined[last].End <= maxGap {
			joined[last].End = r.End
		} else {
			joined = append(joined, r)
		}
	}
	return joined
}
