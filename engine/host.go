package engine

import (
	"context"
	"path/filepath"

	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/memory"
	"github.com/selective-ksm/selective-ksm/engine/pressure"
	"github.com/selective-ksm/selective-ksm/engine/process"
)

// host is the processes of the machine, which tests of the engine replace.
type host interface {
	// open opens the processes of a container, as [process.Open] does.
	open(cgroupsPath string) ([]handle, error)
	// list is [process.List]: the numbers alone.
	list(cgroupsPath string) ([]int, error)
	// member and waitEmpty are [process.Member] and [process.WaitEmpty].
	member(cgroupsPath string, pid int) (bool, error)
	waitEmpty(ctx context.Context, cgroupsPath string) error
	// exists returns an error that matches [fs.ErrNotExist] where there is no such
	// cgroup.
	exists(cgroupsPath string) error
	// pressed is [pressure.Watch] for the pod of a container, or for the machine
	// where there is no path.
	pressed(ctx context.Context, cgroupsPath string, scarce func()) error
	// mergeableOnes are all processes of the machine whose memory is mergeable.
	mergeableOnes() ([]int, error)
	// contained is [process.Contained].
	contained(pid int) bool
	// The others are the functions of package memory.
	mergeable(pid int) (bool, error)
	find(ctx context.Context, pid int, o memory.Options) (memory.Offer, error)
	merged(pid int) (uint64, error)
	activity(pid int) (memory.Activity, error)
	clearDirty(pid int, alive func() bool) error
}

// handle is a [process.Process].
type handle interface {
	Pid() int
	Alive() bool
	Close()
}

// linux is the host that we run on.
type linux struct {
	cgroupRoot string
}

func (l linux) open(cgroupsPath string) ([]handle, error) {
	processes, err := process.Open(l.cgroupRoot, cgroupsPath)
	handles := make([]handle, len(processes))
	for i, p := range processes {
		handles[i] = p
	}
	return handles, err
}

func (l linux) list(cgroupsPath string) ([]int, error) {
	return process.List(l.cgroupRoot, cgroupsPath)
}

func (l linux) member(cgroupsPath string, pid int) (bool, error) {
	return process.Member(l.cgroupRoot, cgroupsPath, pid)
}

func (l linux) waitEmpty(ctx context.Context, cgroupsPath string) error {
	return process.WaitEmpty(ctx, l.cgroupRoot, cgroupsPath)
}

func (l linux) exists(cgroupsPath string) error {
	_, err := cgroup.Find(l.cgroupRoot, cgroupsPath)
	return err
}

func (l linux) pressed(ctx context.Context, cgroupsPath string, scarce func()) error {
	if cgroupsPath == "" {
		return pressure.Watch(ctx, pressure.Node, scarce)
	}
	dir, err := cgroup.Find(l.cgroupRoot, cgroupsPath)
	if err != nil {
		return err
	}
	return pressure.Watch(ctx, filepath.Join(filepath.Dir(dir), "memory.pressure"), scarce)
}

func (linux) mergeableOnes() ([]int, error)   { return memory.AllMergeable() }
func (linux) contained(pid int) bool          { return process.Contained(pid) }
func (linux) mergeable(pid int) (bool, error) { return memory.Mergeable(pid) }
func (linux) find(ctx context.Context, pid int, o memory.Options) (memory.Offer, error) {
	return memory.Find(ctx, pid, o)
}
func (linux) merged(pid int) (uint64, error)            { return memory.Merged(pid) }
func (linux) activity(pid int) (memory.Activity, error) { return memory.ActivityOf(pid) }
func (linux) clearDirty(pid int, alive func() bool) error {
	return memory.ClearDirty(pid, alive)
}
