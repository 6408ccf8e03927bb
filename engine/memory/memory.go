// Package memory says what of a process's memory is worth offering for a merge:
// private memory of its own that is present and not merged yet. That is anonymous
// memory, and what a process has written to of private mappings of files.
package memory

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/process"
)

// maxGap is the most memory, in bytes, that does not qualify and is offered
// nevertheless between two parts of a mapping that do: the kernel steps over it
// faster than it takes another command.
const maxGap = 1 << 20

// Options say what to offer. The zero value is what is best for most.
type Options struct {
	// Secrets offers what the program has marked as secret, too: by MADV_DONTDUMP or
	// MADV_WIPEONFORK, as cryptographic libraries do.
	Secrets bool
	// Zero offers zero pages that were never written, too: the rest of a huge page of
	// which a program has used a part.
	Zero bool
	// Dirty offers only what was written to since [ClearDirty].
	Dirty bool
	// Exact offers nothing that does not qualify, however small.
	Exact bool
	// Any offers memory that the kernel says is not mergeable, too.
	Any bool
	// Merged offers what is merged already, too.
	Merged bool
}

// Offer is the memory of a process that is worth merging.
type Offer struct {
	// Ranges hold that memory, and small gaps in it, in ascending order.
	Ranges []kernel.Range
	// Bytes is how much of the ranges qualifies and is not merged yet.
	Bytes uint64
	// Zero is how many bytes of zero pages the process has that were never written.
	// They are in the ranges only if that was asked for.
	Zero uint64
	// Huge is how many bytes of the mappings that the ranges are of are in huge pages,
	// which a merge splits.
	Huge uint64
	// Mergeable says that the kernel may merge some memory of the process: that it,
	// or whoever started it, called prctl(PR_SET_MEMORY_MERGE) or
	// madvise(MADV_MERGEABLE), or that it was bound to a partition.
	Mergeable bool
}

// Find returns what a process has to offer. Where the kernel lacks PAGEMAP_SCAN
// (it came with 6.7), that is its mappings whole, present or not. The error
// matches [os.ErrNotExist] or [unix.ESRCH] when the process is gone.
//
// It ends early with the error of ctx.
//
// The process is looked up by its number: the caller checks that it was the right
// one after the call.
func Find(ctx context.Context, pid int, o Options) (Offer, error) {
	smaps, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return Offer{}, err
	}
	defer smaps.Close()
	mappings, err := parse(ctx, smaps)
	if err != nil {
		return Offer{}, fmt.Errorf("reading %s: %w", smaps.Name(), err)
	}

	pagemap, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return Offer{}, err
	}
	defer pagemap.Close()
	var offer Offer
	scannable := true
	for _, m := range mappings {
		offer.Mergeable = offer.Mergeable || m.mergeable
		if !m.qualifies(o) {
			continue
		}
		found := scanned{present: []kernel.Range{m.Range}}
		if scannable {
			found, err = scan(ctx, pagemap, pid, m.Range, o)
			if errors.Is(err, unix.ENOTTY) {
				scannable, found = false, scanned{present: []kernel.Range{m.Range}}
			} else if err != nil {
				return Offer{}, fmt.Errorf("scanning %s: %w", pagemap.Name(), err)
			}
		}
		var bytes uint64
		for _, r := range found.present {
			bytes += r.Len()
		}
		if !o.Dirty && !o.Merged {
			bytes -= min(bytes, m.merged)
		}
		offer.Bytes += bytes
		offer.Huge += m.huge
		offer.Zero += found.zero
		gap := uint64(maxGap)
		if o.Exact || found.zero > 0 && !o.Zero {
			gap = 0
		}
		offer.Ranges = append(offer.Ranges, join(found.present, gap)...)
	}
	return offer, nil
}

// Mergeable reports whether KSM may merge any memory of a process. Errors are those
// of [Find].
func Mergeable(pid int) (bool, error) {
	// Where ksm_stat tells, as it does not on 6.12, that is faster than smaps.
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/ksm_stat", pid))
	if err == nil {
		if _, after, ok := bytes.Cut(stat, []byte("ksm_mergeable:")); ok {
			return bytes.HasPrefix(bytes.TrimSpace(after), []byte("yes")), nil
		}
	}
	smaps, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return false, err
	}
	defer smaps.Close()
	return anyMergeable(smaps)
}

// AllMergeable are the numbers of all processes of the machine whose memory KSM may merge.
// An error is also that this cannot be told of one that is there.
func AllMergeable() ([]int, error) {
	all, err := process.All()
	if err != nil {
		return nil, err
	}
	return ofThese(all, Mergeable)
}

func ofThese(pids []int, mergeable func(pid int) (bool, error)) ([]int, error) {
	var found []int
	for _, pid := range pids {
		is, err := mergeable(pid)
		if process.UnlessGone(err) != nil {
			return nil, fmt.Errorf("process %d: %w", pid, err)
		}
		if err == nil && is {
			found = append(found, pid)
		}
	}
	return found, nil
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

// Activity tells whether a process has likely used memory between two looks: then
// its two values differ. What it writes to pages that it has already, and that are
// not merged, does not show.
type Activity struct {
	// Faults since its start, pages, and its start in clock ticks since the machine's.
	MinorFaults, MajorFaults, Resident, Start uint64
}

// ActivityOf looks at a process. Errors are those of [Find].
func ActivityOf(pid int) (Activity, error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	data, err := os.ReadFile(path)
	if err != nil {
		return Activity{}, err
	}
	// The name is in parentheses and may hold anything; the fields behind it are
	// numbered from 3 on (proc_pid_stat(5)).
	_, after, ok := bytes.Cut(data[max(0, bytes.LastIndexByte(data, ')')):], []byte(") "))
	f := strings.Fields(string(after))
	if !ok || len(f) < 22 {
		return Activity{}, fmt.Errorf("reading %s: of another form: %q", path, data)
	}
	var a Activity
	for n, into := range map[int]*uint64{10: &a.MinorFaults, 12: &a.MajorFaults, 22: &a.Start, 24: &a.Resident} {
		if *into, err = strconv.ParseUint(f[n-3], 10, 64); err != nil {
			return Activity{}, fmt.Errorf("reading %s: %w", path, err)
		}
	}
	return a, nil
}

// ClearDirty takes all pages of a process as not written to. The process pays for
// it with a fault for each page that it writes to next. Others that go by the same
// bits, as checkpointing does, are misled. It does nothing unless the process that has
// the number is the one that is alive. Errors are those of [Find].
func ClearDirty(pid int, alive func() bool) error {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/clear_refs", pid), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	// The file is that of the process that had the number when it was opened.
	if alive() {
		_, err = f.WriteString("4") // Documentation/admin-guide/mm/soft-dirty.rst
	}
	return errors.Join(err, f.Close())
}

// mapping is one of /proc/PID/smaps.
type mapping struct {
	kernel.Range
	private   bool
	access    bool   // any at all
	special   bool   // one of the kernel's own, or a device's
	mergeable bool   // to KSM
	secret    bool   // the program says so
	anonymous uint64 // bytes present, those merged included
	huge      uint64 // bytes of it in huge pages
	merged    uint64 // bytes
	counted   bool   // the kernel tells what is merged
}

// qualifies reports whether a mapping has memory that may be offered.
func (m mapping) qualifies(o Options) bool {
	switch {
	case !m.private || !m.access || m.special || !o.Any && !m.mergeable:
		return false
	case m.anonymous == 0 || m.merged >= m.anonymous && !o.Dirty && !o.Merged:
		return false
	}
	return !m.secret || o.Secrets
}

// flag takes note of one of a mapping's flags (proc_pid_smaps(5)).
func (m *mapping) flag(name string) {
	switch name {
	case "mg":
		m.mergeable = true
	case "dd", "wf": // MADV_DONTDUMP, MADV_WIPEONFORK
		m.secret = true
	case "sh", "ms", "io", "pf", "mm", "de", "ht":
		// Shared, a device's, or of huge pages that are not split.
		m.special = true
	}
}

// parse reads /proc/PID/smaps. The kernel walks the pages of a mapping when it is read.
func parse(ctx context.Context, smaps io.Reader) ([]mapping, error) {
	var found []mapping
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		line := lines.Bytes()
		key, value, _ := bytes.Cut(line, []byte(":"))
		if bytes.IndexByte(key, ' ') >= 0 || bytes.IndexByte(key, '-') >= 0 {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			m, err := parseHeader(string(line))
			if err != nil {
				return nil, err
			}
			found = append(found, m)
			continue
		}
		if len(found) == 0 {
			return nil, fmt.Errorf("line of another form: %q", line)
		}
		m := &found[len(found)-1]
		var size *uint64
		switch string(key) {
		case "Anonymous":
			size = &m.anonymous
		case "AnonHugePages":
			size = &m.huge
		case "KSM":
			size, m.counted = &m.merged, true
		case "VmFlags":
			for flag := range bytes.FieldsSeq(value) {
				m.flag(string(flag))
			}
		}
		if size != nil {
			kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(string(value)), " kB"), 10, 64)
			if err != nil {
				return nil, fmt.Errorf("line of another form: %q", line)
			}
			*size = kib << 10
		}
	}
	return found, lines.Err()
}

// parseHeader reads the line that begins a mapping:
//
//	7f1c2000-7f1c4000 rw-p 00000000 00:00 0    [heap]
func parseHeader(line string) (mapping, error) {
	f := strings.Fields(line)
	if len(f) < 5 {
		return mapping{}, fmt.Errorf("line of another form: %q", line)
	}
	from, to, _ := strings.Cut(f[0], "-")
	start, err1 := strconv.ParseUint(from, 16, 64)
	end, err2 := strconv.ParseUint(to, 16, 64)
	if err := errors.Join(err1, err2); err != nil || start >= end {
		return mapping{}, fmt.Errorf("not a range of addresses: %q", f[0])
	}
	perms, inode, name := f[1], f[4], strings.Join(f[5:], " ")
	return mapping{
		Range:   kernel.Range{Start: start, End: end},
		private: strings.HasSuffix(perms, "p"),
		access:  !strings.HasPrefix(perms, "---"),
		special: inode == "0" && !ordinary(name),
	}, nil
}

// ordinary reports whether a mapping without a file is memory of the program, and
// not one of the kernel's special mappings ([vdso], [vvar], [uprobes] and others).
func ordinary(name string) bool {
	return name == "" || name == "[heap]" || name == "[stack]" || strings.HasPrefix(name, "[anon:")
}

// join makes one range of ranges with no more than a gap between them.
func join(ranges []kernel.Range, gap uint64) []kernel.Range {
	var joined []kernel.Range
	for _, r := range ranges {
		if last := len(joined) - 1; last >= 0 && r.Start-joined[last].End <= gap {
			joined[last].End = r.End
		} else {
			joined = append(joined, r)
		}
	}
	return joined
}
