// Package border watches that no physical page is ever in two tenants.
package border

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
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

// Guard looks at processes, over and over, until it is stopped.
type Guard struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu        sync.Mutex // protects what follows
	wake      *sync.Cond // on every change of sweeps and finished
	processes []Process
	sweeps    int
	finished  bool

	// For the guard's goroutine until done is closed.
	found []Crossing
	err   error
}

// pause between two sweeps, so that the guard leaves the processors to what it
// watches.
const pause = 100 * time.Millisecond

// Watch starts a guard.
func Watch() *Guard {
	ctx, cancel := context.WithCancel(context.Background())
	g := &Guard{cancel: cancel, done: make(chan struct{})}
	g.wake = sync.NewCond(&g.mu)
	go g.run(ctx)
	return g
}

// Add gives the guard processes to look at, for as long as they live.
func (g *Guard) Add(processes ...Process) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.processes = append(g.processes, processes...)
}

// guarded returns the processes to look at.
func (g *Guard) guarded() []Process {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.processes)
}

// Sweep waits for one whole look that began after the call.
func (g *Guard) Sweep() {
	g.mu.Lock()
	defer g.mu.Unlock()
	// The sweep that is under way began before.
	for until := g.sweeps + 2; g.sweeps < until && !g.finished; {
		g.wake.Wait()
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
	seen := make(map[int]bool)
	for g.err == nil && ctx.Err() == nil {
		var found []Crossing
		if found, g.err = sweep(g.guarded(), seen); g.err != nil {
			return
		}
		g.found = append(g.found, found...)
		g.mu.Lock()
		g.sweeps++
		g.wake.Broadcast()
		g.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	for _, p := range g.guarded() {
		if !seen[p.PID] {
			// A guard that sees nothing would find nothing.
			g.err = errors.Join(g.err, fmt.Errorf("no memory of %s/%s (pid %d) was ever seen", p.Tenant, p.Name, p.PID))
		}
	}
}

// Crossings looks once.
func Crossings(processes ...Process) ([]Crossing, error) {
	return sweep(processes, make(map[int]bool))
}

// sweep looks at all processes once, and notes in seen whose memory it saw.
func sweep(processes []Process, seen map[int]bool) ([]Crossing, error) {
	memory := make([][]pages.Page, len(processes))
	for i, p := range processes {
		all, err := pages.All(p.PID)
		if err != nil && !gone(err) {
			return nil, err
		}
		memory[i] = pages.ByFrame(all)
		if len(memory[i]) > 0 {
			seen[p.PID] = true
		}
	}
	var found []Crossing
	for i, a := range processes {
		for j, b := range processes[:i] {
			if a.Tenant == b.Tenant {
				continue
			}
			for _, pair := range pages.Common(memory[i], memory[j]) {
				crossed, err := confirm(a, b, pair)
				if err != nil {
					return nil, err
				}
				if crossed {
					found = append(found, Crossing{A: a, B: b, Frame: pair.Frame})
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
