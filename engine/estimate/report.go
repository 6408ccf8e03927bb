package estimate

import "time"

// Report is what a merge would come to. Sizes are in bytes.
type Report struct {
	At time.Time `json:"time"`
	// IntervalSeconds is the time between the two looks; zero if there was one.
	IntervalSeconds float64 `json:"interval_seconds"`
	// Rate is which part of all contents was counted: a power of a half.
	Rate float64 `json:"sample_rate"`
	// Engine is that an engine runs.
	Engine bool `json:"engine"`
	// Missing says what could not be asked for containers.
	Missing []string `json:"missing,omitempty"`

	// Offered is what a merge would be offered, merged already or not.
	Offered uint64 `json:"offered_bytes"`
	// Volatile is how much of it changed between the looks.
	Volatile uint64 `json:"volatile_bytes"`
	// WrittenZero is how much of it are pages of zeros.
	WrittenZero uint64 `json:"written_zero_bytes"`
	// Zero are zero pages that were never written. They are in Offered only if the
	// configuration has them merged.
	Zero uint64 `json:"zero_bytes"`
	// Huge is what is in huge pages, which a merge splits.
	Huge uint64 `json:"huge_bytes"`
	// Merged is how much of Offered is merged now, and SavedNow what that saves.
	Merged   uint64 `json:"merged_bytes"`
	SavedNow uint64 `json:"saved_now_bytes"`

	// Policies are in the order from the narrowest to the widest, which is that of the
	// whole node.
	Policies []Policy `json:"policies"`
	// FirstMerge is what the first merge of all takes: about that by ksmd, and less by a kernel
	// with the series. It is told by what it took to read the same memory.
	FirstMerge Cost `json:"first_merge"`
	// Own is what this took.
	Own Own `json:"own"`

	Containers []Container `json:"containers"`
}

// Policy is what would be saved if containers were merged by it.
type Policy struct {
	// Policy is a configuration's partitionBy, "running engine" for the partitions that
	// this has, or "node" for all in one.
	Policy     string `json:"policy"`
	Partitions int    `json:"partitions"`
	// Saved is what is saved of memory that did not change, off by Error at most with a
	// probability of 95 %. Volatile is what would come to it if the rest did not change
	// either.
	Saved    uint64 `json:"saved_bytes"`
	Error    uint64 `json:"error_bytes"`
	Volatile uint64 `json:"volatile_saved_bytes"`
	// IsolationCosts is how much less that is than with the whole node in one partition.
	IsolationCosts uint64 `json:"isolation_costs_bytes"`
	// Unknown is why containers are left out of it that are merged by others.
	Unknown string `json:"unknown,omitempty"`
}

// Cost is the time of a merge.
type Cost struct {
	CPUSeconds float64 `json:"cpu_seconds"`
	// Seconds is how long it takes within the configuration's budgets, that of each
	// partition included.
	Seconds float64 `json:"seconds"`
}

// Own is what an estimate takes.
type Own struct {
	// ReadSeconds is how long the first look took, and CPUSeconds what both did.
	ReadSeconds float64 `json:"first_look_seconds"`
	CPUSeconds  float64 `json:"cpu_seconds"`
	// MemoryBytes is the memory in use after the looks, when it is most.
	MemoryBytes uint64 `json:"memory_bytes"`
}

// Container is what one container has.
type Container struct {
	ID        string `json:"id"`
	Name      string `json:"name"`
	Pod       string `json:"pod,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	// Partition is that of the running engine.
	Partition string `json:"partition,omitempty"`
	// LeftOut is why the policy does not merge it.
	LeftOut   string `json:"left_out,omitempty"`
	Processes int    `json:"processes"`

	Offered     uint64 `json:"offered_bytes"`
	Volatile    uint64 `json:"volatile_bytes"`
	WrittenZero uint64 `json:"written_zero_bytes"`
	Zero        uint64 `json:"zero_bytes"`
	Huge        uint64 `json:"huge_bytes"`
	Merged      uint64 `json:"merged_bytes"`
}
