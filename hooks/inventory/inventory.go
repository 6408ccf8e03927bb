// Package inventory says what containers run on this machine, whoever runs them, and
// which partition each is in. It looks at the cgroups, at what runtimes write down of a
// container in its bundle, and asks the engine that runs. Runtimes are not asked: a client
// of CRI would double the program.
package inventory

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/engine/process"
	"github.com/selective-ksm/selective-ksm/hooks"
	"github.com/selective-ksm/selective-ksm/hooks/member"
)

// Container is a container that runs.
type Container struct {
	// Container is it as the engine has it. What is not known is empty; the name is
	// then the beginning of the id. The partition is that of the running engine.
	engine.Container
	// Sandbox is what policy knows of its pod. Without a runtime's word, a pod is known
	// by the cgroup of its containers. Labels and the runtime handler are not known.
	Sandbox config.Sandbox
	// Annotations are the values of those of [config.Annotations] that count for it.
	Annotations map[string]string
	// HostPID is that it sees the processes of the machine.
	HostPID bool
	// Pause is that it is the sandbox of a pod, in which no program of the pod runs.
	Pause bool
	// PID is that of the only process, where that was named instead of a container.
	PID int
}

// Assign says which partition a policy gives the container. What makes one privileged
// is not known here, so that the policy does not leave it out for that.
func (c Container) Assign(policy config.Config) config.Assignment {
	return policy.Assign(c.Sandbox, config.Container{
		// The cgroup was found to be the container's own, whatever form its path has.
		ID: c.ID, CgroupsPath: "/" + c.ID, HostPID: c.HostPID, Annotations: c.Annotations,
	})
}

// Pids returns the numbers of the container's processes. Errors are those of
// [process.List].
func (c Container) Pids() ([]int, error) {
	if c.PID != 0 {
		return []int{c.PID}, nil
	}
	return process.List(cgroup.DefaultRoot, c.CgroupsPath)
}

// String is what people call the container.
func (c Container) String() string { return c.Path() }

// Inventory is what runs.
type Inventory struct {
	// Containers are in the order of their names.
	Containers []Container
	// Engine is that an engine runs, so that partitions are known.
	Engine bool
	// Missing says what could not be asked.
	Missing []string
}

// Find finds all containers that run, and asks the engine of a directory. What cannot be
// asked is left out, so that the only errors are those of the cgroups and of ctx.
func Find(ctx context.Context, runDir string) (Inventory, error) {
	var found Inventory
	all, err := byCgroup(cgroup.DefaultRoot)
	if err != nil {
		return found, err
	}
	for id, c := range all {
		pids, err := c.Pids()
		if err != nil || len(pids) == 0 {
			// Gone, or what is left of one.
			delete(all, id)
			continue
		}
		c.describe(pids)
	}
	report, err := control.Ask(ctx, runDir)
	if err == nil {
		found.Engine = true
		told(all, report.Partitions)
	} else if !errors.Is(err, control.ErrNoEngine) {
		found.Missing = append(found.Missing, fmt.Sprintf("engine: %v", err))
	} else {
		written(all, hooks.Told(runDir), func(c *Container) bool {
			pids, err := c.Pids()
			return err == nil && len(pids) > 0
		})
	}
	for _, c := range all {
		found.Containers = append(found.Containers, *c)
	}
	slices.SortFunc(found.Containers, func(a, b Container) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod), cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
	})
	return found, ctx.Err()
}

// told adds what an engine tells of its containers to what is known of all, by their ids.
func told(all map[string]*Container, partitions []engine.PartitionStatus) {
	for _, p := range partitions {
		for _, c := range p.Containers {
			known := all[c.ID]
			if known == nil {
				// Its cgroup bears another name.
				known = &Container{Sandbox: config.Sandbox{ID: c.SandboxID}}
				all[c.ID] = known
			}
			known.Container = c.Container
			known.Sandbox.Namespace = cmp.Or(known.Sandbox.Namespace, c.Namespace)
			known.Sandbox.ID = cmp.Or(c.SandboxID, known.Sandbox.ID)
			// By the id of its sandbox the engine knows the VMM of a pod.
			known.Pause = false
		}
	}
}

// written adds what hooks have written down, and no engine has taken up, of containers whose
// cgroups bear other names.
func written(all map[string]*Container, members []member.Member, runs func(*Container) bool) {
	for _, m := range members {
		if all[m.ID] != nil {
			continue
		}
		c := &Container{
			Container: m.Container, Sandbox: config.Sandbox{ID: m.SandboxID, Namespace: m.Namespace},
			Annotations: m.Facts.Annotations, HostPID: m.Facts.HostPID,
		}
		c.Partition = "" // of no engine
		if runs(c) {
			all[m.ID] = c
		}
	}
}

// Processes are named processes, each for a container of its own; one that is named twice
// is one. An error says which of them is not there.
func Processes(pids ...int) (Inventory, error) {
	var found Inventory
	for i, pid := range pids {
		if slices.Contains(pids[:i], pid) {
			continue
		}
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err != nil {
			return found, fmt.Errorf("process %d: %w", pid, err)
		}
		id := fmt.Sprintf("pid-%d", pid)
		found.Containers = append(found.Containers, Container{
			Container: engine.Container{ID: id, Name: fmt.Sprintf("%s (%d)", strings.TrimSpace(string(name)), pid)},
			Sandbox:   config.Sandbox{ID: id},
			PID:       pid,
		})
	}
	return found, nil
}
