package engine

import (
	"github.com/selective-ksm/selective-ksm/engine/memory"
	"github.com/selective-ksm/selective-ksm/engine/process"
)

// host is the processes of the machine, which tests of the engine replace.
type host interface {
	// open opens the processes of a container, as [process.Open] does.
	open(cgroupsPath string) ([]handle, error)
	// mergeable, find and merged are the functions of package memory.
	mergeable(pid int) (bool, error)
	find(pid int) (memory.Offer, error)
	merged(pid int) (uint64, error)
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

func (linux) mergeable(pid int) (bool, error)    { return memory.Mergeable(pid) }
func (linux) find(pid int) (memory.Offer, error) { return memory.Find(pid) }
func (linux) merged(pid int) (uint64, error)     { return memory.Merged(pid) }
