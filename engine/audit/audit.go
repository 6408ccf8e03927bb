// Package audit proves, by the numbers of physical pages, that no merged page is shared
// across the border of a partition. It goes by the page tables of all processes, and not
// by what the engine or the kernel's counters say, and changes nothing.
//
// It looks at the pages that are in memory while it does. A page that the kernel moves
// between the looks at two processes is not found to be the same, so that what counts is
// that looks are made again and again.
package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/selective-ksm/selective-ksm/engine/frame"
	"github.com/selective-ksm/selective-ksm/engine/memory"
	"github.com/selective-ksm/selective-ksm/engine/process"
	"github.com/selective-ksm/selective-ksm/hooks/inventory"
)

// Report is what was looked at, and what was found.
type Report struct {
	At time.Time `json:"time"`
	// Engine is that the partitions are those of the running engine.
	Engine bool `json:"engine"`
	// Containers is how many there are, Partitions in how many partitions they are, and
	// Processes how many of the machine were looked at.
	Containers int `json:"containers"`
	Partitions int `json:"partitions"`
	Processes  int `json:"processes"`
	// Unread are the numbers of processes outside of containers that the caller may not
	// look at: those that have capabilities which it has not.
	Unread []int `json:"unread,omitempty"`
	// Pages is how many may have been merged, and were compared.
	Pages uint64 `json:"pages"`
	// Flags is that the kernel tells of each page whether it is merged. Where it does
	// not, what two containers share in mappings that have merged pages is taken for
	// merged: containers have no page in common by fork.
	Flags bool `json:"page_flags"`
	// Crossings are pairs of containers of different partitions that share pages, or of
	// which one is in a partition and one in none.
	Crossings []Crossing `json:"crossings"`
	// Outside are containers in a partition that share pages with a process which is in
	// no container.
	Outside []Crossing `json:"outside"`
	// More is that there are more than are listed.
	More bool `json:"more,omitempty"`
	// Missing says what could not be asked for containers.
	Missing []string `json:"missing,omitempty"`
}

// Crossing is that two have merged pages in common and must not.
type Crossing struct {
	A Side `json:"a"`
	B Side `json:"b"`
	// Pages is how many physical pages were the same at the first look. At least Frame,
	// one of them, was in both, merged, when each was looked at again.
	Pages int    `json:"pages"`
	Frame uint64 `json:"frame"`
}

// Side is a container, or a process outside of any.
type Side struct {
	// Container is the name of the container, and ID its id. They are empty for a process
	// that is in none.
	Container string `json:"container,omitempty"`
	ID        string `json:"id,omitempty"`
	// Partition is empty for one that is in none.
	Partition string `json:"partition,omitempty"`
	// PID and Program are the process that has the page, at Address.
	PID     int    `json:"pid"`
	Program string `json:"program"`
	Address uint64 `json:"address"`
}

func (s Side) String() string {
	where := fmt.Sprintf("process %d (%s), which is in no container", s.PID, s.Program)
	if s.ID != "" {
		where = fmt.Sprintf("container %s (%s)", s.Container, s.ID)
		if s.Partition == "" {
			where += " of no partition"
		} else {
			where += " of " + s.Partition
		}
	}
	return where
}

func (c Crossing) String() string {
	return fmt.Sprintf("%s and %s share %d merged pages, such as %#x, at %#x of process %d and %#x of process %d",
		c.A, c.B, c.Pages, c.Frame, c.A.Address, c.A.PID, c.B.Address, c.B.PID)
}

// Limits of what is found, so that a machine where everything is merged with each other
// can be looked at, too.
const (
	maxCrossings = 1000 // pairs
	maxFrames    = 32   // that are looked at again, of each pair
)

// owner is a process that was looked at.
type owner struct {
	pid       int
	start     uint64
	container int // the index, or host
}

// host is the container of processes that are in none.
const host = -1

// A page is remembered as its frame and its owner, in 8 bytes: 40 bits make 4 PiB.
const ownerBits = 24

// audit is one look.
type audit struct {
	containers []inventory.Container
	partitions []string // by container; empty for one that is in none
	flags      *frame.Flags
	owners     []owner
	unread     []int
	pages      []uint64
}

// Run looks at all containers of an inventory, and at all other processes of the machine.
// A container's partition is what the function says; it is in none if that is empty.
// Errors are that of ctx, [frame.ErrHidden], and those of reading for another reason than
// that a process is gone: then nothing is proved.
func Run(ctx context.Context, all inventory.Inventory, partition func(inventory.Container) string) (Report, error) {
	flags, err := frame.OpenFlags()
	if err != nil {
		return Report{}, err
	}
	defer flags.Close()
	a := &audit{containers: all.Containers, flags: flags}
	r := Report{At: time.Now().UTC(), Engine: all.Engine, Containers: len(all.Containers), Flags: flags.TellMerged(), Missing: all.Missing,
		Crossings: []Crossing{}, Outside: []Crossing{}}
	distinct := map[string]bool{}
	for _, c := range all.Containers {
		p := partition(c)
		a.partitions = append(a.partitions, p)
		if p != "" {
			distinct[p] = true
		}
	}
	r.Partitions = len(distinct)
	if err := a.look(ctx); err != nil {
		return Report{}, err
	}
	r.Processes, r.Pages, r.Unread = len(a.owners), uint64(len(a.pages)), a.unread
	suspects, more := a.compare()
	r.More = more
	for pair, s := range suspects {
		c, confirmed, err := a.confirm(ctx, pair, s)
		switch {
		case err != nil:
			return Report{}, err
		case !confirmed:
		case pair.b == host:
			r.Outside = append(r.Outside, c)
		default:
			r.Crossings = append(r.Crossings, c)
		}
	}
	for _, found := range [][]Crossing{r.Crossings, r.Outside} {
		slices.SortFunc(found, func(x, y Crossing) int { return strings.Compare(x.String(), y.String()) })
	}
	return r, ctx.Err()
}

// look reads which frames all processes have that may be merged.
func (a *audit) look(ctx context.Context) error {
	// Before the containers' own: what one forks meanwhile is not taken for the machine's.
	all, err := process.All()
	if err != nil {
		return err
	}
	inContainer := map[int]bool{}
	for i, c := range a.containers {
		pids, err := c.Pids()
		if err != nil && !process.Gone(err) {
			return fmt.Errorf("container %s: %w", c, err)
		}
		for _, pid := range pids {
			if inContainer[pid] {
				continue
			}
			inContainer[pid] = true
			if err := a.read(ctx, pid, i); err != nil {
				return err
			}
		}
	}
	for _, pid := range all {
		if inContainer[pid] {
			continue
		}
		if err := a.read(ctx, pid, host); errors.Is(err, fs.ErrPermission) {
			a.unread = append(a.unread, pid)
		} else if err != nil {
			return err
		}
	}
	slices.Sort(a.pages)
	a.pages = slices.Compact(a.pages)
	return nil
}

// batch is how many entries of a page table are read at a time.
const batch = 4096

var pageSize = uint64(os.Getpagesize())

// read reads which frames of a process may be merged.
func (a *audit) read(ctx context.Context, pid, container int) error {
	activity, err := memory.ActivityOf(pid)
	if err != nil {
		return process.UnlessGone(err)
	}
	if len(a.owners) >= 1<<ownerBits {
		return fmt.Errorf("more than %d processes", 1<<ownerBits)
	}
	id := uint64(len(a.owners))
	before := len(a.pages)
	err = walk(ctx, pid, func(_ uint64, e frame.Entry) bool {
		// A page that is mapped once is nobody else's, merged or not.
		if !e.Exclusive() {
			a.pages = append(a.pages, e.Frame()<<ownerBits|id)
		}
		return true
	})
	if now, again := memory.ActivityOf(pid); process.Gone(err) || again != nil || now.Start != activity.Start {
		a.pages = a.pages[:before]
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	a.owners = append(a.owners, owner{pid, activity.Start, container})
	return nil
}

// walk tells of each page of a process that may be merged, until the function has seen
// enough.
func walk(ctx context.Context, pid int, each func(address uint64, e frame.Entry) bool) error {
	ranges, err := memory.MergedRanges(ctx, pid)
	if err != nil || len(ranges) == 0 {
		return err
	}
	table, err := frame.Open(pid)
	if err != nil {
		return err
	}
	defer table.Close()
	entries := make([]frame.Entry, batch)
	for _, r := range ranges {
		for at := r.Start; at < r.End; at += batch * pageSize {
			if err := ctx.Err(); err != nil {
				return err
			}
			n, err := table.Read(at, entries[:min(batch, (r.End-at)/pageSize)])
			if err != nil {
				return err
			}
			for i, e := range entries[:n] {
				if e.Own() && !each(at+uint64(i)*pageSize, e) {
					return nil
				}
			}
		}
	}
	return nil
}

// pair is two containers, or one and the host, which is then the second.
type pair struct{ a, b int }

// suspicion is what a pair seems to have in common.
type suspicion struct {
	pages  int
	frames []sharing
}

// sharing is a frame and two of its owners.
type sharing struct {
	frame  uint64
	owners [2]int
}

// compare finds pairs that have frames in common.
func (a *audit) compare() (found map[pair]*suspicion, more bool) {
	found = map[pair]*suspicion{}
	first := map[int]int{} // by container, its first owner of the frame
	for rest := a.pages; len(rest) > 0; {
		number := rest[0] >> ownerBits
		n := 1
		for n < len(rest) && rest[n]>>ownerBits == number {
			n++
		}
		same := rest[:n]
		rest = rest[n:]
		if n == 1 {
			continue
		}
		clear(first)
		for _, p := range same {
			id := int(p & (1<<ownerBits - 1))
			if c := a.owners[id].container; first[c] == 0 {
				first[c] = id + 1 // 0 is none
			}
		}
		if len(first) == 1 {
			continue
		}
		for c, i := range first {
			for d, j := range first {
				if c < d && a.apart(c, d) {
					p := pair{c, d}
					of := sharing{number, [2]int{i - 1, j - 1}}
					if c == host {
						p, of.owners = pair{d, c}, [2]int{j - 1, i - 1}
					}
					s := found[p]
					if s == nil && len(found) == maxCrossings {
						more = true
						continue
					} else if s == nil {
						s = &suspicion{}
						found[p] = s
					}
					if s.pages++; len(s.frames) < maxFrames {
						s.frames = append(s.frames, of)
					}
				}
			}
		}
	}
	return found, more
}

// apart reports whether two may have no page in common: they are in different partitions,
// or one of them is in none. Those that are in none are nobody's business.
func (a *audit) apart(c, d int) bool {
	of := func(i int) string {
		if i == host {
			return ""
		}
		return a.partitions[i]
	}
	return of(c) != of(d)
}

// confirm looks at a pair again. Its processes were looked at one after the other, and a
// page that one had given up may have been the other's then. A page is in both only if
// the one still has it after the other was seen to have it, and is merged all the while.
func (a *audit) confirm(ctx context.Context, p pair, s *suspicion) (Crossing, bool, error) {
	for _, of := range s.frames {
		var sides [2]Side
		found := true
		for i, id := range of.owners {
			address, there, err := a.find(ctx, a.owners[id].pid, of.frame)
			if err != nil {
				return Crossing{}, false, err
			}
			found = found && there
			sides[i] = a.side(a.owners[id], address)
		}
		if !found {
			continue
		}
		for _, i := range []int{0, 1, 0} {
			still, err := a.still(a.owners[of.owners[i]], sides[i].Address, of.frame)
			if err != nil {
				return Crossing{}, false, err
			}
			found = found && still
		}
		if found {
			return Crossing{A: sides[0], B: sides[1], Pages: s.pages, Frame: of.frame}, true, nil
		}
	}
	return Crossing{}, false, nil
}

// find finds the address of a frame in a process.
func (a *audit) find(ctx context.Context, pid int, number uint64) (address uint64, found bool, err error) {
	err = walk(ctx, pid, func(at uint64, e frame.Entry) bool {
		if e.Frame() == number {
			address, found = at, true
		}
		return !found
	})
	return address, found, process.UnlessGone(err)
}

// still reports whether a process has a frame at an address, and the page is merged.
func (a *audit) still(o owner, address, number uint64) (bool, error) {
	table, err := frame.Open(o.pid)
	if err != nil {
		return false, process.UnlessGone(err)
	}
	defer table.Close()
	e, err := table.At(address)
	if err != nil {
		return false, err
	}
	merged, err := a.flags.Merged(number)
	if err != nil {
		return false, err
	}
	now, err := memory.ActivityOf(o.pid)
	return err == nil && now.Start == o.start && e.Own() && e.Frame() == number && merged, process.UnlessGone(err)
}

func (a *audit) side(o owner, address uint64) Side {
	s := Side{PID: o.pid, Address: address}
	// One that is gone has no name, and is not found to have the page.
	name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", o.pid))
	s.Program = strings.TrimSpace(string(name))
	if o.container != host {
		c := a.containers[o.container]
		s.Container, s.ID, s.Partition = c.String(), c.ID, a.partitions[o.container]
	}
	return s
}
