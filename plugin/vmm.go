package plugin

import (
	"context"
	"strings"

	"github.com/containerd/nri/pkg/api"

	"github.com/selective-ksm/selective-ksm/engine"
)

// Containers of some runtimes are in a VM, and have no processes on the machine. The
// VMM has: Kata puts it in the cgroup of the pod's sandbox, where others have nothing
// but the pause process (sandbox_cgroup_only in Kata's configuration). There the VMM is
// one more member of the partition of the pod's containers, as all of them are in it.
// Whether its memory is such as can be merged, private and anonymous, is the VMM's.

// vmmName is what a VMM is called, in the place of a container's name.
const vmmName = "vmm"

// inVM reports whether a container that runs is in a VM: then the runtime has but one
// process to name for it and its sandbox, the VMM (hpid in Kata's containerd-shim-v2).
func inVM(pod *api.PodSandbox, ctr *api.Container) bool {
	return ctr.GetPid() != 0 && ctr.GetPid() == pod.GetPid()
}

// guest is what is known of a pod whose containers are in a VM. What those that have ended
// held may still be in it.
type guest struct {
	// partition is that of all its containers so far. mixed is that they were not all of
	// one, and ended that policy cannot be asked of some any more.
	partition    string
	mixed, ended bool
}

// guestEnded takes note of a container that has ended.
func (p *plugin) guestEnded(s *subject) {
	if g := p.guests[s.sandbox.ID]; g != nil && s.virtual {
		g.ended = true
	}
}

// askAgain lets another policy give pods in VMs another partition, unless that cannot be
// asked of all that may be in them.
func (p *plugin) askAgain() {
	for _, g := range p.guests {
		if !g.ended {
			g.partition = ""
		}
	}
}

// vmm returns the VMM of a pod, under the id of the pod's sandbox. There is none if no
// container of the pod is in a VM. It is in no partition unless all containers of the
// pod are of the same, and those that have ended were, as far as the runtime has told of
// them. Nor is its memory merged in any other way that is not right for all.
func (p *plugin) vmm(sandboxID string) (vmm engine.Container, there bool) {
	secrets, mixed, first := true, false, true
	for _, s := range p.subjects {
		if s.sandbox.ID != sandboxID {
			continue
		}
		there = there || s.virtual
		c := s.assigned
		if first {
			vmm = engine.Container{
				ID: sandboxID, Name: vmmName, Pod: c.Pod, Namespace: c.Namespace, SandboxID: sandboxID, CgroupsPath: s.sandboxCgroup,
				Partition: c.Partition, Because: c.Because,
			}
		}
		mixed = mixed || c.Partition == "" || c.Partition != vmm.Partition
		vmm.OnDemand = vmm.OnDemand || c.OnDemand
		secrets = secrets && c.Secrets
		if c.Interval != 0 && (vmm.Interval == 0 || c.Interval < vmm.Interval) {
			vmm.Interval = c.Interval
		}
		first = false
	}
	vmm.Secrets = secrets
	if !there || vmm.CgroupsPath == "" {
		return vmm, false
	}
	g := p.guests[sandboxID]
	if g == nil {
		g = &guest{}
		p.guests[sandboxID] = g
	}
	g.mixed = g.mixed || mixed || g.partition != "" && g.partition != vmm.Partition
	g.partition = vmm.Partition
	if g.mixed || !strings.HasSuffix(vmm.CgroupsPath, "/"+sandboxID) && !strings.HasSuffix(vmm.CgroupsPath, ":"+sandboxID) {
		vmm.Partition, vmm.Because = "", "its pod's containers are not all in one partition, or its cgroup is not the sandbox's alone"
	}
	return vmm, true
}

// followVMM has the engine know of a pod's VMM what its containers make of it now.
func (p *plugin) followVMM(ctx context.Context, sandboxID string) {
	vmm, there := p.vmm(sandboxID)
	if !there {
		if p.vmms[sandboxID] {
			delete(p.vmms, sandboxID)
			p.Engine.Stop(sandboxID)
		}
		return
	}
	p.vmms[sandboxID] = true
	ctx, cancel := context.WithTimeout(ctx, addTimeout)
	defer cancel()
	if err := p.Engine.Add(ctx, vmm); err != nil {
		p.notMerged(&subject{engine: vmm}, err)
		return
	}
	p.Engine.Start(sandboxID)
}
