package hooks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/hooks/member"
)

// Options are what a hook is made of.
type Options struct {
	// Dir is the directory of the machine's engine.
	Dir string
	// Policy is the configuration.
	Policy config.Config
	// Spawn starts an engine in the background that looks at one container, where none
	// runs. See [Worker].
	Spawn func(containerID string) error
}

// Members opens the members below the directory of the machine's engine.
func Members(dir string) (*member.Dir, error) {
	return member.Open(membersIn(dir), func(cgroupsPath string) bool {
		dir, err := cgroup.Find(cgroup.DefaultRoot, cgroupsPath)
		return errors.Is(err, os.ErrNotExist) || err == nil && !cgroup.Populated(dir)
	})
}

// Told are the members that hooks have written down there. Unlike [Members] it changes
// nothing.
func Told(dir string) []member.Member { return member.List(membersIn(dir)) }

func membersIn(dir string) string { return filepath.Join(dir, "hooks") }

// Run is a hook: it reads the container's state and has the engine know of it. It waits
// for no merge. The error is for a log, and never a reason for the container to fail;
// it matches the context's where that has ended before the hook was done, and
// [ErrLeftOut] where there is nothing wrong.
func Run(ctx context.Context, stage Stage, in io.Reader, o Options) error {
	return run(ctx, stage, in, o, machine{proc: "/proc", cgroups: cgroup.DefaultRoot})
}

func run(ctx context.Context, stage Stage, in io.Reader, o Options, on machine) error {
	s, err := ReadState(in, stage)
	if err != nil {
		return err
	}
	dir, err := Members(o.Dir)
	if err != nil {
		return err
	}
	known := true
	switch stage {
	case CreateRuntime:
		m := member.Member{PID: s.Pid, Created: time.Now().Round(0)}
		m.Container, m.Facts, err = on.container(s, o.Policy.Pods)
		if errors.Is(err, errNotOurs) {
			return nil
		}
		if err == nil {
			m.Container, err = assign(o.Policy, m.Container, m.Facts)
		}
		if err == nil {
			m.Init, err = on.program(s.Pid)
		}
		if err != nil {
			return fmt.Errorf("container %s is not merged: %w", s.ID, err)
		}
		err = dir.Put(ctx, m)
	case Poststart:
		known, err = dir.Change(ctx, s.ID, func(m *member.Member) { m.Started = true })
	case Poststop:
		known, err = dir.Remove(ctx, s.ID)
	default:
		return fmt.Errorf("stage %q is not known", stage)
	}
	if err == nil && !known {
		return nil
	}
	if err == nil {
		err = control.Sync(ctx, o.Dir, s.ID)
	}
	switch {
	case errors.Is(err, control.ErrNoEngine):
		err = o.Spawn(s.ID)
	case ctx.Err() != nil:
		// Who is started now has more time.
		err = errors.Join(err, o.Spawn(s.ID))
	}
	return err
}

// program is the file that a process executes.
func (m machine) program(pid int) (member.Program, error) {
	var stat unix.Stat_t
	path := filepath.Join(m.proc, strconv.Itoa(pid), "exe")
	if err := unix.Stat(path, &stat); err != nil {
		return member.Program{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return member.Program{Device: stat.Dev, Inode: stat.Ino}, nil
}
