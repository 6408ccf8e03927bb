package engine

import (
	"cmp"
	"slices"
	"time"
)

// Result is what the last merge of a container came to. Sizes are in bytes.
type Result struct {
	// Offered is how much the container offered that was not merged before.
	Offered uint64
	// Merged is how much of it is merged with another page.
	Merged uint64
	// Saved is the container's share of what its partition saves, where the kernel
	// counts by partition.
	Saved uint64
	// Zero is how much it has of zero pages that were never written, which are not
	// in the others.
	Zero uint64
	// Processes is how many there were.
	Processes int
	// Took is how long it took.
	Took time.Duration
	// At is when it was done; zero before the first.
	At time.Time
}

// ContainerStatus is a container as the engine has it.
type ContainerStatus struct {
	Container
	// Running is that it has been started.
	Running bool
	// Reason is why it is not merged, or not all of it. It is empty if it is.
	Reason string
	// Result is of the last merge.
	Result Result
}

// PartitionStatus is a partition as the engine has it.
type PartitionStatus struct {
	Name string
	// Reason is why the kernel has it not. It is empty if it has.
	Reason string
	// Next is when it is merged by the interval; zero if no container runs that is.
	Next time.Time
	// Containers are its members, in the order of their ids.
	Containers []ContainerStatus
}

// Status tells of all partitions, in the order of their names.
func (e *Engine) Status() []PartitionStatus {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := []PartitionStatus{}
	for _, p := range e.partitions {
		s := PartitionStatus{Name: p.name}
		if len(p.running(false)) > 0 {
			s.Next = p.next
		}
		if p.refused != nil {
			s.Reason = p.refused.Error()
		}
		for _, m := range p.members {
			c := ContainerStatus{Container: m.Container, Running: !m.started.IsZero(), Reason: m.reason, Result: m.result}
			s.Containers = append(s.Containers, c)
		}
		slices.SortFunc(s.Containers, func(a, b ContainerStatus) int { return cmp.Compare(a.ID, b.ID) })
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b PartitionStatus) int { return cmp.Compare(a.Name, b.Name) })
	return all
}
