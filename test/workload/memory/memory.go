// Package memory holds the data of a test container: anonymous memory whose
// every word is known in advance, so that a change nobody asked for is found
// wherever it is.
package memory

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// PageSize is the unit in which a Region is filled and written.
var PageSize = os.Getpagesize()

// Region is private anonymous memory together with a model of what it must
// hold. The model is one seed a page, so that the memory itself is the only
// copy of the data. A Region is for one goroutine at a time.
type Region struct {
	data     []byte
	seeds    []uint64
	distinct int
}

// CorruptionError says where memory differs from what was last written there.
type CorruptionError struct {
	Page, Offset int
	Got, Want    uint64
}

func (e *CorruptionError) Error() string {
	return fmt.Sprintf("page %d is corrupt at byte %d: %#016x where %#016x was written", e.Page, e.Offset, e.Got, e.Want)
}

// Map maps a region of the given number of pages and fills it from seed.
// Regions of the same seed and size hold the same data, which cannot be
// compressed. The first pages, as many as distinct says, all differ from one
// another; those behind them repeat them.
//
// If it is secret, it is marked so before it holds anything, as cryptographic
// libraries do.
func Map(pages, distinct int, seed uint64, secret bool) (*Region, error) {
	data, err := unix.Mmap(-1, 0, pages*PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map %d pages: %w", pages, err)
	}
	if secret {
		if err := unix.Madvise(data, unix.MADV_DONTDUMP); err != nil {
			return nil, errors.Join(fmt.Errorf("mark %d pages as secret: %w", pages, err), unix.Munmap(data))
		}
	}
	r := &Region{data: data, seeds: make([]uint64, pages), distinct: distinct}
	r.Write(0, pages, seed)
	return r, nil
}

// Close unmaps the region.
func (r *Region) Close() error {
	if err := unix.Munmap(r.data); err != nil {
		return fmt.Errorf("unmap: %w", err)
	}
	return nil
}

// Pages returns the size of the region.
func (r *Region) Pages() int { return len(r.seeds) }

// Range returns the addresses of the region's first byte and of the byte
// behind its last one.
func (r *Region) Range() (start, end uint64) {
	start = uint64(uintptr(unsafe.Pointer(&r.data[0])))
	return start, start + uint64(len(r.data))
}

// Write fills count pages from page first on from seed. What a page then
// holds depends on the seed and on the page's place, and on nothing else: the
// same Write makes pages of two regions equal again.
func (r *Region) Write(first, count int, seed uint64) {
	for p := first; p < first+count; p++ {
		page := r.page(p)
		next := words(seed, p%r.distinct)
		for i := 0; i < len(page); i += 8 {
			binary.LittleEndian.PutUint64(page[i:], next())
		}
		r.seeds[p] = seed
	}
}

// Check compares every word of the region with what was written there. It
// returns a sum of the data, equal for regions with equal data, or a
// *CorruptionError.
func (r *Region) Check() (sum uint64, err error) {
	for p := range r.seeds {
		page := r.page(p)
		next := words(r.seeds[p], p%r.distinct)
		for i := 0; i < len(page); i += 8 {
			got, want := binary.LittleEndian.Uint64(page[i:]), next()
			if got != want {
				return 0, &CorruptionError{Page: p, Offset: i, Got: got, Want: want}
			}
			sum = bits.RotateLeft64(sum, 5) ^ got
		}
	}
	return sum, nil
}

func (r *Region) page(p int) []byte {
	return r.data[p*PageSize : (p+1)*PageSize]
}

// words returns the generator of a page's contents: xorshift64, started where
// splitmix64 puts neighbouring seeds and pages far apart.
func words(seed uint64, page int) func() uint64 {
	x := mix(mix(seed) + uint64(page))
	if x == 0 {
		x = 1 // xorshift would stay at zero
	}
	return func() uint64 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		return x
	}
}

func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
