package hooks

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/hooks/member"
)

const (
	// again is the pause before what another process does is looked at again.
	again = 20 * time.Millisecond
	// ready is how long an engine may take to start, or to end.
	ready = 10 * time.Second
	// idle is how long nothing must have happened before a worker ends.
	idle = 2 * time.Second
	// patience is how long a worker waits for a container that has been created to run,
	// and for a partition to go.
	patience = 10 * time.Minute
	// late is how long it waits for the merge of a container for which there is a
	// reason not to be merged.
	late = 2 * time.Minute
	// longest is the most that it waits for any merge.
	longest = time.Hour
)

// Lock is [engine.Lock], but for that a worker that has it is asked to end, and waited
// for. Its containers are in the files.
func Lock(ctx context.Context, dir string) (*os.File, error) {
	return lock(ctx, dir, func(ctx context.Context, locked error) (done bool, err error) {
		yields, err := control.Yield(ctx, dir)
		return err == nil && !yields, locked
	})
}

// LockOrSync is [engine.Lock] for a worker that is to look at one container. It returns
// no lock where another engine has been found that looks at it.
func LockOrSync(ctx context.Context, dir, containerID string) (*os.File, error) {
	return lock(ctx, dir, func(ctx context.Context, _ error) (done bool, err error) {
		// It may have looked before it had the lock, or just ended.
		err = control.Sync(ctx, dir, containerID)
		return !errors.Is(err, control.ErrNoEngine), err
	})
}

// lock is [engine.Lock], again and again until whoever has it has let it go, or says that
// this is all.
func lock(ctx context.Context, dir string, held func(ctx context.Context, locked error) (done bool, err error)) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, ready)
	defer cancel()
	for {
		file, err := engine.Lock(dir)
		if !errors.Is(err, engine.ErrLocked) {
			return file, err
		}
		if done, err := held(ctx, err); done {
			return nil, err
		}
		select {
		case <-time.After(again):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// Detach starts a program that outlives the caller, with what the caller's own runtime
// might wait for, or end, left behind: its open files, its session, and its cgroup. For
// the last, the program calls [Leave].
func Detach(path string, args ...string) error {
	// A file that the runtime has not closed for its hook.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("starting an engine: %w", err)
	}
	cmd := exec.Command(path, args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting an engine: %w", err)
	}
	return cmd.Process.Release()
}

// Leave parts the caller from the runtime that it comes from: its memory is not mergeable
// if that of the runtime is, and it moves to the root of the cgroups. systemd ends what
// is left in the cgroup of a service that stops, and a container may be one. An error is
// that of the last that was refused.
func Leave() error {
	last := unix.Prctl(unix.PR_SET_MEMORY_MERGE, 0, 0, 0, 0)
	for _, h := range []string{"", "unified", "systemd"} {
		file, err := os.OpenFile(filepath.Join(cgroup.DefaultRoot, h, "cgroup.procs"), os.O_WRONLY, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		} else if err == nil {
			_, err = file.WriteString("0")
			err = errors.Join(err, file.Close())
		}
		if err != nil {
			last = err
		}
	}
	return last
}

// Worker is the registry of an engine that hooks have started, which ends when there is
// nothing to do any more.
type Worker struct {
	*Registry
	delays []time.Duration
	yield  chan struct{}
	yields func()
}

// NewWorker makes a worker for an engine that merges containers after the start delays
// of the policy, and then not again. Where the kernel has one merge space, the engine has
// to know of all who may have it.
func NewWorker(e Engine, dir *member.Dir, policy config.Config, log logrus.FieldLogger, oneSpace bool) *Worker {
	w := &Worker{Registry: NewRegistry(e, dir, policy, log), delays: policy.StartDelays, yield: make(chan struct{})}
	w.once = !oneSpace
	w.yields = sync.OnceFunc(func() { close(w.yield) })
	return w
}

// Yield has [Worker.Work] return.
func (w *Worker) Yield() bool {
	w.yields()
	return true
}

// Work waits until each container that hooks have told of, and that runs, has been
// merged after the last of the delays. These are noted as done for the next worker. It
// returns earlier when ctx ends, or another engine wants to be the machine's; what was
// not done is then the next one's. Hooks are refused from then on.
func (w *Worker) Work(ctx context.Context) error {
	tick := time.NewTicker(idle / 4)
	defer tick.Stop()
	var done []*entry
	for busy := true; busy; {
		select {
		case <-tick.C:
		case <-w.yield:
			busy = false
		case <-ctx.Done():
			busy = false
		}
		w.mu.Lock()
		if busy {
			if done, busy = w.progress(time.Now()); !busy && w.sweep(ctx) {
				// Containers that have ended without a hook, whose partition has to go.
				w.asked, busy = time.Now(), true
			}
		}
		w.ended = !busy
		w.mu.Unlock()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), ready)
	defer cancel()
	var errs []error
	for _, have := range done {
		_, err := w.dir.Change(ctx, have.ID, func(m *member.Member) {
			m.Done = m.Created.Equal(have.Created)
		})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// progress tells the members that are done, and whether there is anything to do. w.mu is
// held.
func (w *Worker) progress(now time.Time) (done []*entry, busy bool) {
	var last time.Duration
	for _, d := range w.delays {
		last = max(last, d)
	}
	busy = now.Sub(w.asked) < idle
	type progress struct {
		merged time.Time
		reason string
	}
	containers := map[string]progress{}
	for _, p := range w.engine.Status() {
		if len(p.Containers) == 0 {
			// It is being removed.
			busy = busy || now.Sub(w.asked) < patience
		}
		for _, c := range p.Containers {
			containers[c.ID] = progress{c.Result.At, cmp.Or(c.Reason, p.Reason)}
		}
	}
	for id, have := range w.known {
		c, there := containers[id]
		due := have.running.Add(last)
		switch {
		case !there, !w.wanted(have):
		case have.running.IsZero():
			busy = busy || now.Sub(have.waits) < patience
		case len(w.delays) == 0, c.merged.After(due),
			c.reason != "" && now.Sub(due) > late, now.Sub(due) > longest:
			done = append(done, have)
		default:
			busy = true
		}
	}
	return done, busy
}
