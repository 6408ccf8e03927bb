package estimate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/frame"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/memory"
	"github.com/selective-ksm/selective-ksm/engine/process"
)

// batch is how many entries of a page table are read at a time. The kernel holds the
// memory map of the process for one page at a time.
const batch = 256

var pageSize = uint64(os.Getpagesize())

// held is what is remembered of a process: the hash of each page that is in the sample,
// 8 bytes, and where they are.
type held struct {
	pid       int
	container int
	start     uint64 // tells it from another process of the same number
	runs      []run
	hashes    []uint64
	// stable is how many hashes at the beginning are of pages that did not change.
	stable int
}

// run is a number of pages behind each other, whose hashes are, too.
type run struct {
	address uint64
	pages   uint64
}

// zero is the hash of a page of zeros. All of these are in the sample.
const zero = 0

// reader reads the memory of processes.
type reader struct {
	flags  *frame.Flags
	digest *xxhash.Digest
	seed   uint64
	zeros  uint64 // what a page of zeros hashes to
	// mask has those bits of a hash that are zero for what is in the sample.
	mask uint64
	// seen are frames that several processes map, merged or by fork.
	seen frames

	entries [batch]frame.Entry
	buf     []byte
	wanted  []uint64 // addresses
}

func newReader(flags *frame.Flags, seed, mask uint64) *reader {
	r := &reader{flags: flags, digest: xxhash.NewWithSeed(seed), seed: seed, mask: mask, seen: frames{}, buf: make([]byte, batch*pageSize)}
	r.zeros = r.sum(make([]byte, pageSize))
	return r
}

// sum hashes a page. A Digest never returns an error.
func (r *reader) sum(page []byte) uint64 {
	r.digest.ResetWithSeed(r.seed)
	r.digest.Write(page)
	return r.digest.Sum64()
}

// hash is that of a page, with zero kept for pages of zeros. Another that hashes to zero
// is given a value that is in the sample, too.
func (r *reader) hash(page []byte) uint64 {
	switch h := r.sum(page); h {
	case r.zeros:
		return zero
	case zero:
		return r.mask + 1
	default:
		return h
	}
}

// counts is what was seen of a process, in pages.
type counts struct {
	read   uint64 // looked at: each copy counts that a merge could save
	zeros  uint64 // of them, pages of zeros that were written
	merged uint64 // of them, pages that are merged already
	frames uint64 // in how many frames those are
}

// first looks at a process for the first time. The error is that it could not; that it
// is gone matches [fs.ErrNotExist] or [unix.ESRCH].
func (r *reader) first(ctx context.Context, pid int, o memory.Options, read func(pages uint64)) (*held, memory.Offer, counts, error) {
	var n counts
	activity, err := memory.ActivityOf(pid)
	if err != nil {
		return nil, memory.Offer{}, n, err
	}
	offer, err := memory.Find(ctx, pid, o)
	if err != nil {
		return nil, offer, n, err
	}
	table, mem, err := open(pid)
	if err != nil {
		return nil, offer, n, err
	}
	defer table.Close()
	defer mem.Close()
	// One that came to merged pages by fork has none of this count.
	merged, err := memory.MergedRanges(ctx, pid)
	if err != nil {
		return nil, offer, n, err
	}
	h := &held{pid: pid, start: activity.Start}
	// Where the kernel does not tell what is present, the offer is all that may be. What is
	// resident it does not know to the page.
	h.hashes = make([]uint64, 0, min(offer.Bytes/pageSize, activity.Resident*9/8)/(r.mask+1))
	for _, part := range offer.Ranges {
		for at := part.Start; at < part.End; at += batch * pageSize {
			if err := ctx.Err(); err != nil {
				return nil, offer, n, err
			}
			pages := min(batch, (part.End-at)/pageSize)
			if err := r.choose(table, at, pages, merged, &n); err != nil {
				return nil, offer, n, err
			}
			err := r.read(mem, func(address uint64, page []byte) {
				n.read++
				sum := r.hash(page)
				if sum == zero {
					n.zeros++
				}
				if sum&r.mask == 0 {
					h.add(address, sum)
				}
			})
			if err != nil {
				return nil, offer, n, err
			}
			read(uint64(len(r.wanted)))
		}
	}
	// Whoever has the number now may not be who had it then.
	if now, err := memory.ActivityOf(pid); err != nil {
		return nil, offer, n, err
	} else if now.Start != h.start {
		return nil, offer, n, unix.ESRCH
	}
	return h, offer, n, nil
}

func (h *held) add(address, hash uint64) {
	if last := len(h.runs) - 1; last >= 0 && h.runs[last].address+h.runs[last].pages*pageSize == address {
		h.runs[last].pages++
	} else {
		h.runs = append(h.runs, run{address, 1})
	}
	h.hashes = append(h.hashes, hash)
}

// choose takes note of the pages that are to be read. Those that are not in memory are
// not brought in. A frame that several processes have by fork is one page, and nothing
// is saved by merging it with itself; each mapping of one that is merged is a page that
// would be there otherwise.
func (r *reader) choose(table *frame.Table, at, pages uint64, merged []kernel.Range, n *counts) error {
	r.wanted = r.wanted[:0]
	got, err := table.Read(at, r.entries[:pages])
	if err != nil {
		return err
	}
	for i, e := range r.entries[:got] {
		address := at + uint64(i)*pageSize
		if !e.Own() {
			continue
		}
		again := !e.Exclusive() && r.seen.add(e.Frame())
		if within(merged, address) {
			is, err := r.merged(e, again)
			if err != nil {
				return err
			}
			if is {
				n.merged++
				if !again {
					n.frames++
				}
				again = false
			}
		}
		if !again {
			r.wanted = append(r.wanted, address)
		}
	}
	return nil
}

// merged reports whether a page is merged, that may be. Where the kernel's flags do not
// tell, what is mapped more than once is.
func (r *reader) merged(e frame.Entry, again bool) (bool, error) {
	if !r.flags.TellMerged() {
		return again || !e.Exclusive(), nil
	}
	return r.flags.Merged(e.Frame())
}

// within reports whether an address is in ranges, which are in ascending order.
func within(ranges []kernel.Range, address uint64) bool {
	_, in := slices.BinarySearchFunc(ranges, address, func(r kernel.Range, a uint64) int {
		switch {
		case r.End <= a:
			return -1
		case r.Start > a:
			return 1
		}
		return 0
	})
	return in
}

// read reads those pages that are wanted. A page that cannot be read is left out: it
// went away, or is a device's.
func (r *reader) read(memory *os.File, each func(address uint64, page []byte)) error {
	for rest := r.wanted; len(rest) > 0; {
		n := 1
		for n < len(rest) && rest[n] == rest[n-1]+pageSize {
			n++
		}
		got, err := memory.ReadAt(r.buf[:uint64(n)*pageSize], int64(rest[0]))
		if err != nil && !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EFAULT) && !errors.Is(err, io.EOF) {
			return fmt.Errorf("reading %s: %w", memory.Name(), err)
		}
		whole := got / int(pageSize)
		for i, address := range rest[:whole] {
			each(address, r.buf[uint64(i)*pageSize:][:pageSize])
		}
		if whole < n {
			whole++
		}
		rest = rest[whole:]
	}
	return nil
}

// open opens the page table and the memory of a process. They stay that process's.
//
// The memory is not read by process_vm_readv(2): that pins pages, for which the kernel
// gives the process copies of its own of those that it has merged or by fork (commit
// a7f226604170, "mm/gup: trigger FAULT_FLAG_UNSHARE when R/O-pinning a possibly shared
// anonymous page").
func open(pid int) (*frame.Table, *os.File, error) {
	table, err := frame.Open(pid)
	if err != nil {
		return nil, nil, err
	}
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return nil, nil, errors.Join(err, table.Close())
	}
	return table, memory, nil
}

// second looks at a process again, and puts the hashes of pages that have not changed
// before those of pages that have, or are gone.
func (r *reader) second(ctx context.Context, h *held) error {
	defer func() { h.runs = nil }()
	now, err := memory.ActivityOf(h.pid)
	if err != nil || now.Start != h.start {
		return process.UnlessGone(err)
	}
	table, mem, err := open(h.pid)
	if err != nil {
		return process.UnlessGone(err)
	}
	defer table.Close()
	defer mem.Close()
	at := 0 // the first hash that is not compared yet
	for _, run := range h.runs {
		for done := uint64(0); done < run.pages; done += batch {
			if err := ctx.Err(); err != nil {
				return err
			}
			address := run.address + done*pageSize
			n, err := table.Read(address, r.entries[:min(batch, run.pages-done)])
			if err != nil {
				return err
			}
			r.wanted = r.wanted[:0]
			for i, e := range r.entries[:n] {
				if e.Own() {
					r.wanted = append(r.wanted, address+uint64(i)*pageSize)
				}
			}
			first := at + int(done)
			err = r.read(mem, func(a uint64, page []byte) {
				if i := first + int((a-address)/pageSize); h.hashes[i] == r.hash(page) {
					// What gives way was compared before, and has changed.
					h.hashes[i], h.hashes[h.stable] = h.hashes[h.stable], h.hashes[i]
					h.stable++
				}
			})
			if err != nil {
				return err
			}
		}
		at += int(run.pages)
	}
	if now, err := memory.ActivityOf(h.pid); err != nil || now.Start != h.start {
		h.stable = 0
		return process.UnlessGone(err)
	}
	return nil
}

// frames is a set of frames: a bit for each of the machine's, 32 KiB for a GiB.
type frames map[uint64]*[4096]byte

// add adds a frame, and reports whether it was there.
func (f frames) add(number uint64) bool {
	part, bit := f[number>>15], byte(1)<<(number&7)
	if part == nil {
		part = new([4096]byte)
		f[number>>15] = part
	}
	at := &part[number>>3&4095]
	was := *at&bit != 0
	*at |= bit
	return was
}
