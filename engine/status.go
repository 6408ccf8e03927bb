package engine

import (
	"cmp"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// Result is what the last merge of a container came to. Sizes are in bytes.
type Result struct {
	// Offered is how much the container offered that was not merged before.
	Offered uint64 `json:"offered_bytes"`
	// Merged is how much of it is merged with another page.
	Merged uint64 `json:"merged_bytes"`
	// Saved is the container's share of what its partition saves, where the kernel
	// counts by partition.
	Saved uint64 `json:"saved_bytes"`
	// Zero is how much it has of zero pages that were never written, which are not
	// in the others.
	Zero uint64 `json:"zero_bytes"`
	// Processes is how many there were.
	Processes int `json:"processes"`
	// Took is how long it took.
	Took time.Duration `json:"took_ns"`
	// At is when it was done; zero before the first.
	At time.Time `json:"at,omitzero"`
}

// ContainerStatus is a container as the engine has it.
type ContainerStatus struct {
	Container
	// Running is that it has been started.
	Running bool `json:"running"`
	// Reason is why it is not merged, or not all of it, and Cause is the kind of that.
	// Both are empty if it is, or will be.
	Reason string `json:"reason,omitempty"`
	Cause  Cause  `json:"cause,omitempty"`
	// Result is of the last merge.
	Result Result `json:"last_merge"`
}

// PartitionStatus is a partition as the engine has it.
type PartitionStatus struct {
	Name string `json:"name"`
	// Reason is why the kernel has it not. It is empty if it has.
	Reason string `json:"reason,omitempty"`
	// Hold is that somebody has had it unmerged.
	Hold Hold `json:"hold,omitempty"`
	// Last is when a merge of it last came to its end; zero before the first.
	Last time.Time `json:"last,omitzero"`
	// Next is when it is merged by the interval; zero if no container runs that is, while
	// it is held, or while the kernel has it not.
	Next time.Time `json:"next,omitzero"`
	// Due are other times at which it is merged, in their order.
	Due []time.Time `json:"due,omitempty"`
	// Retry is how long it is not tried again after a failure; 0 if there was none. That
	// the kernel has no room for it is none.
	Retry time.Duration `json:"retry_ns,omitempty"`
	// Waiting is that it waits for a turn of the budget.
	Waiting bool `json:"waiting,omitempty"`
	// Work is what has been done for it.
	Work Work `json:"work"`
	// Counters are the kernel's, where it counts by partition. They are nil where it does
	// not, or cannot be asked; and in what [Engine.Status] returns.
	Counters *kernel.Counters `json:"counters,omitempty"`
	// Containers are its members, in the order of their ids.
	Containers []ContainerStatus `json:"containers"`
}

// Status tells of all partitions, in the order of their names.
func (e *Engine) Status() []PartitionStatus {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := []PartitionStatus{}
	for _, p := range e.partitions {
		usage := e.budget.Usage(p.name)
		s := PartitionStatus{
			Name: p.name, Hold: p.hold, Last: p.last, Retry: p.retry, Waiting: usage.Waiting > 0, Work: p.did.copy(usage.CPU),
		}
		if errors.Is(p.refused, kernel.ErrKeptOut) {
			s.Retry = 0
		}
		if len(p.running(false)) > 0 && p.hold == HoldNot && p.refused == nil {
			s.Next, s.Due = p.next, slices.SortedFunc(slices.Values(p.due), time.Time.Compare)
		}
		if p.refused != nil {
			s.Reason = p.refused.Error()
		}
		for _, m := range p.members {
			why := m.reason
			switch {
			case p.hold != HoldNot:
				why = heldReason
			case p.refused != nil:
				why = reasonOf(p.refused)
			}
			c := ContainerStatus{Container: m.Container, Running: !m.started.IsZero(), Reason: why.text, Cause: why.cause, Result: m.result}
			s.Containers = append(s.Containers, c)
		}
		slices.SortFunc(s.Containers, func(a, b ContainerStatus) int { return cmp.Compare(a.ID, b.ID) })
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b PartitionStatus) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// Report is what an engine has, and what it has done.
type Report struct {
	// At is when it was made.
	At time.Time `json:"at"`
	// Settings are the engine's.
	Settings Settings `json:"settings"`
	// OptsIn is that the engine makes the memory of containers mergeable itself.
	OptsIn bool `json:"opts_in"`
	// Partitions are all that there are, in the order of their names.
	Partitions []PartitionStatus `json:"partitions"`
	// Outside are the containers that are in no partition, in the order of their ids, with
	// the reason.
	Outside []ContainerStatus `json:"outside"`
	// Work is what has been done for all partitions, for those that are gone, too.
	Work Work `json:"work"`
	// Waiting and Running are how many turns of the budget are waited for and under way.
	Waiting int `json:"turns_waiting"`
	Running int `json:"turns_running"`
	// Machine are the kernel's counters where it counts all partitions together.
	Machine *kernel.Counters `json:"machine,omitempty"`
}

// Report tells of all that the engine has. Unlike [Engine.Status] it asks the kernel for
// its counters.
func (e *Engine) Report() Report {
	usage := e.budget.Usage("")
	r := Report{At: time.Now(), Partitions: e.Status(), Outside: []ContainerStatus{}, Waiting: usage.Waiting, Running: usage.Running}
	e.mu.Lock()
	r.Settings, r.OptsIn = e.settings, e.features.Bind && !e.settings.OptedIn
	r.Work = e.did.copy(usage.CPU)
	for _, id := range slices.Sorted(maps.Keys(e.outside)) {
		c := e.outside[id]
		r.Outside = append(r.Outside, ContainerStatus{Container: c, Reason: c.Because, Cause: cmp.Or(c.Cause, CausePolicy)})
	}
	e.mu.Unlock()
	for i := range r.Partitions {
		p := &r.Partitions[i]
		counters, err := e.kernel.Counters(p.Name)
		switch {
		case err != nil:
			// It is not there yet, or not any more.
		case e.features.SharedCounters:
			r.Machine = &counters
		default:
			p.Counters = &counters
		}
	}
	return r
}
