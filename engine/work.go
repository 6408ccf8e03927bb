package engine

import (
	"errors"
	"maps"
	"slices"
	"time"
)

// Bounds are the upper bounds by which [Durations] sorts.
var Bounds = []time.Duration{
	5 * time.Millisecond, 20 * time.Millisecond, 100 * time.Millisecond, 500 * time.Millisecond,
	2 * time.Second, 10 * time.Second, time.Minute,
}

// Durations counts how long things took.
type Durations struct {
	// Count is how many there were, and Sum how long they took together.
	Count uint64        `json:"count"`
	Sum   time.Duration `json:"sum_ns"`
	// Within is how many took no longer than each of [Bounds]. It is nil before the first.
	Within []uint64 `json:"within,omitempty"`
}

func (d *Durations) add(took time.Duration) {
	d.Count++
	d.Sum += took
	if d.Within == nil {
		d.Within = make([]uint64, len(Bounds))
	}
	for i, bound := range Bounds {
		if took <= bound {
			d.Within[i]++
		}
	}
}

// Work is what an engine has done since it was made, for one partition or for all.
type Work struct {
	// CPU is the time that merging took.
	CPU time.Duration `json:"cpu_ns"`
	// Merges are those that were not broken off, with the time that each waited for its
	// turns.
	Merges Durations `json:"merges"`
	// Errors is how often something was refused, by the name of the error's number
	// (errno(3)), or "other".
	Errors map[string]uint64 `json:"errors,omitempty"`
}

func (w *Work) failed(err error) {
	if w.Errors == nil {
		w.Errors = map[string]uint64{}
	}
	w.Errors[errnoOf(err)]++
}

// copy is for somebody who may keep it.
func (w *Work) copy(cpu time.Duration) Work {
	return Work{CPU: cpu, Merges: Durations{w.Merges.Count, w.Merges.Sum, slices.Clone(w.Merges.Within)}, Errors: maps.Clone(w.Errors)}
}

// count counts a refusal. That others are in the way is none.
func (p *partition) count(err error) {
	if errors.Is(err, errStillMergeable) {
		return
	}
	p.engine.mu.Lock()
	defer p.engine.mu.Unlock()
	p.did.failed(err)
	p.engine.did.failed(err)
}
