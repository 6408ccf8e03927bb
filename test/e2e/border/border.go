// Package border watches that no physical page is ever in two tenants.
package border

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/selective-ksm/selective-ksm/test/pages"
)

// Process is a process and the tenant it belongs to.
type Process struct {
	Tenant, Name string
	PID          int
}

// Crossing is a physical page that two tenants had at once.
type Crossing struct {
	A, B  Process
	Frame uint64
}

func (c Crossing) String() string {
	return fmt.Sprintf("frame %#x is in %s/%s and in %s/%s", c.Frame, c.A.Tenant, c.A.Name, c.B.Tenant, c.B.Name)
}

// watched is a process that a guard looks at.
type watched struct {
	Process
	is    *os.Process // tells it from another that has its number later
	brief bool        // may be gone before it is looked at
	seen  bool        // some memory of it was
}

// watch finds a process by its number, which it has now. One that is gone has no memory.
func watch(p Process, brief bool) *watched {
	is, _ := os.FindProcess(p.PID) // is no error on Linux
	return &watched{Process: p, is: is, brief: brief}
}

// over tells whether the process has exited and is waited for.
func (w *watched) over() bool { return errors.Is(w.is.Signal(syscall.Signal(0)), os.ErrProcessDone) }

// Guard looks at processes, over and over, until it is stopped.
type Guard struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu        sync.Mutex // protects what follows
	wake      *sync.Cond // on every change of sweeps and finished
	processes []*watched
	sweeps    int
	finished  bool
	hurry     chan struct{} // closed while somebody waits for a sweep
	waiting   int

	// For the guard's goroutine until done is closed.
	found []Crossing
	err   error
}

// Between two sweeps it pauses for so long at least, and for so many times what the last
// took, so that the guard leaves the processors to what it watches.
const (
	pause = 100 * time.Millisecond
	share = 4
)

// Watch starts a guard.
func Watch() *Guard {
	ctx, cancel := context.WithCancel(context.Background())
	g := &Guard{cancel: cancel, done: make(chan struct{}), hurry: make(chan struct{})}
	g.wake = sync.NewCond(&g.mu)
	go g.run(ctx)
	return g
}

// Add gives the guard processes to look at, for as long as they live. It is an error of
// the guard's if it never sees memory of one.
func (g *Guard) Add(processes ...Process) { g.add(false, processes) }

// AddBrief gives it processes that may end before it looks at them.
func (g *Guard) AddBrief(processes ...Process) { g.add(true, processes) }

func (g *Guard) add(brief bool, processes []Process) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range processes {
		g.processes = append(g.processes, watch(p, brief))
	}
}

// guarded returns the processes to look at, without those that are over.
func (g *Guard) guarded() []*watched {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.processes = slices.DeleteFunc(g.processes, func(w *watched) bool { return (w.seen || w.brief) && w.over() })
	return slices.Clone(g.processes)
}

// Sweep waits for one whole look that began after the call.
func (g *Guard) Sweep() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.waiting++; g.waiting == 1 {
		close(g.hurry)
	}
	// The sweep that is under way began before.
	for until := g.sweeps + 2; g.sweeps < until && !g.finished; {
		g.wake.Wait()
	}
	if g.waiting--; g.waiting == 0 {
		g.hurry = make(chan struct{})
	}
}

// Stop ends the watch. It returns how often the guard looked, what it found,
// and an error if it could not look at all.
func (g *Guard) Stop() (sweeps int, found []Crossing, err error) {
	g.cancel()
	<-g.done
	return g.sweeps, g.found, g.err
}

func (g *Guard) run(ctx context.Context) {
	defer close(g.done)
	defer func() {
		g.mu.Lock()
		g.finished = true
		g.wake.Broadcast()
		g.mu.Unlock()
	}()
	for g.err == nil && ctx.Err() == nil {
		began := time.Now()
		var found []Crossing
		if found, g.err = sweep(g.guarded()); g.err != nil {
			return
		}
		g.found = append(g.found, found...)
		g.mu.Lock()
		g.sweeps++
		g.wake.Broadcast()
		hurry := g.hurry
		g.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-hurry:
		case <-time.After(max(pause, share*time.Since(began))):
		}
	}
	for _, w := range g.guarded() {
		if !w.seen && !w.brief {
			// A guard that sees nothing would find nothing.
			g.err = errors.Join(g.err, fmt.Errorf("no memory of %s/%s (pid %d) was ever seen", w.Tenant, w.Name, w.PID))
		}
	}
}

// Crossings looks once.
func Crossings(processes ...Process) ([]Crossing, error) {
	var all []*watched
	for _, p := range processes {
		all = append(all, watch(p, false))
	}
	return sweep(all)
}

// sweep looks at all processes once, and takes note of whose memory it saw.
func sweep(processes []*watched) ([]Crossing, error) {
	memory := make([][]pages.Page, len(processes))
	for i, p := range processes {
		all, err := pages.All(p.PID)
		if err != nil && !gone(err) {
			return nil, err
		}
		if !p.over() {
			memory[i] = pages.ByFrame(all)
			p.seen = p.seen || len(all) > 0
		}
	}
	var found []Crossing
	for i, a := range processes {
		for j, b := range processes[:i] {
			if a.Tenant == b.Tenant {
				continue
			}
			for _, pair := range pages.Common(memory[i], memory[j]) {
				crossed, err := confirm(a.Process, b.Process, pair)
				if err != nil {
					return nil, err
				}
				if crossed && !a.over() && !b.over() {
					found = append(found, Crossing{A: a.Process, B: b.Process, Frame: pair.Frame})
				}
			}
		}
	}
	return found, nil
}

// confirm looks at a pair again. The two processes were read one after the
// other: in between, one may have given a page up that the other was then
// given. It was shared only if each still has it when the other one does.
func confirm(a, b Process, pair pages.Pair) (bool, error) {
	flags, err := pages.FlagsOf(pair.Frame)
	if err != nil {
		return false, err
	}
	if !flags[0].Anonymous() {
		return false, nil
	}
	for range 2 {
		for _, at := range []struct {
			pid     int
			address uint64
		}{{a.PID, pair.A}, {b.PID, pair.B}} {
			still, err := pages.Range(at.pid, at.address, at.address+1)
			if err != nil && !gone(err) {
				return false, err
			}
			if len(still) != 1 || still[0].Frame != pair.Frame {
				return false, nil
			}
		}
	}
	return true, nil
}

// gone tells whether reading a process failed because it has exited.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}
