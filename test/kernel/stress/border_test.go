package stress_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
	"github.com/selective-ksm/selective-ksm/test/pages"
)

// ownedPage is a page of a process of a family.
type ownedPage struct {
	pages.Page
	pid int
}

// pagesOf reads the page tables of all processes of a family, in the order of
// the frames. A process that goes meanwhile is left out.
func pagesOf(f *family) []ownedPage {
	var all []ownedPage
	for _, pid := range f.pids() {
		found, err := pages.AllAndProtected(pid)
		if err != nil {
			continue
		}
		for _, p := range found {
			all = append(all, ownedPage{p, pid})
		}
	}
	slices.SortFunc(all, func(a, b ownedPage) int { return cmp.Compare(a.Frame, b.Frame) })
	return all
}

// watchBorders looks, until ctx ends, for physical pages in two families:
// mostly at processes that run, since what they do may be what goes wrong, now
// and then at all of them standing still.
func (s *stress) watchBorders(ctx context.Context) {
	const runningLooks = 4
	for i := 0; ctx.Err() == nil; i++ {
		if i%(runningLooks+1) == runningLooks {
			s.lookAtRest()
		} else {
			s.look()
		}
	}
}

func (s *stress) look() [][]ownedPage {
	of := make([][]ownedPage, len(s.families))
	for i, f := range s.families {
		of[i] = pagesOf(f)
	}
	for i := range of {
		for j := range i {
			s.compare(of[i], of[j])
		}
	}
	s.looks.Add(1)
	return of
}

// compare looks for frames that are in both a and b.
func (s *stress) compare(a, b []ownedPage) {
	for len(a) > 0 && len(b) > 0 {
		switch c := cmp.Compare(a[0].Frame, b[0].Frame); {
		case c < 0:
			a = a[1:]
		case c > 0:
			b = b[1:]
		default:
			s.suspect(a[0], b[0])
			a, b = a[1:], b[1:]
		}
	}
}

// suspect is called for two entries of page tables that had the same frame.
// They were not read at the same time: the frame may have been given back and
// have come to the other process since. So it reads both in turn, several
// times, and no frame goes to and fro in step with that; what is merged stays
// until one of them writes.
func (s *stress) suspect(a, b ownedPage) {
	flags, err := pages.FlagsOf(a.Frame)
	if err != nil {
		s.t.Error(err)
		return
	}
	if !flags[0].Anonymous() {
		return // the zero page, or a page that the kernel maps into all
	}
	for range 8 {
		for _, p := range []ownedPage{a, b} {
			now, err := pages.Range(p.pid, p.Address, p.Address+1)
			if err != nil || len(now) != 1 || now[0].Frame != p.Frame {
				s.inDoubt.Add(1)
				return
			}
		}
	}
	s.t.Errorf("frame %#x is at %#x in process %d and at %#x in process %d of another family; flags %#x",
		a.Frame, a.Address, a.pid, b.Address, b.pid, flags[0])
}

// lookAtRest looks when no process runs and nobody calls the kernel, so that
// nothing escapes it, and compares the counters with the page tables.
func (s *stress) lookAtRest() {
	s.still.Lock()
	defer s.still.Unlock()
	for _, f := range s.families {
		f.freeze(true)
	}
	defer func() {
		for _, f := range s.families {
			f.freeze(false)
		}
	}()
	of := s.look()
	s.looksAtRest.Add(1)
	for i, f := range s.families {
		all := of[i]
		// The kernel itself may still move a page, or close a partition.
		if err := eventually(func() error {
			err := s.wantCounters(f, all)
			if err != nil {
				all = pagesOf(f)
			}
			return err
		}); err != nil {
			s.t.Errorf("%s: %v", f.name, err)
		}
	}
}

// wantCounters compares a partition's counters with the page tables of its
// family.
func (s *stress) wantCounters(f *family, all []ownedPage) error {
	var counters [2]int
	for i, name := range []string{"pages_shared", "pages_sharing"} {
		n, err := ksm.Counter(f.name + "/" + name)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
		counters[i] = n
	}
	frames := make([]uint64, len(all))
	for i, p := range all {
		frames[i] = p.Frame
	}
	flags, err := pages.FlagsOf(frames...)
	if err != nil {
		return err
	}
	mappings, shared := 0, 0
	for i, fl := range flags {
		if !fl.KSM() {
			continue
		}
		mappings++
		if i == 0 || frames[i] != frames[i-1] {
			shared++
		}
	}
	if counters[0] != shared || counters[0]+counters[1] != mappings {
		return fmt.Errorf("%d shared and %d sharing pages, but %d entries of page tables map %d ksm pages",
			counters[0], counters[1], mappings, shared)
	}
	s.saved(counters[1])
	return nil
}

// saved keeps the greatest number of pages that a partition saved.
func (s *stress) saved(pages int) {
	for old := s.mostSaved.Load(); int64(pages) > old; old = s.mostSaved.Load() {
		if s.mostSaved.CompareAndSwap(old, int64(pages)) {
			return
		}
	}
}
