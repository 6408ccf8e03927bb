// Package running gives tests the kernel that runs, whichever it is.
package running

import (
	"errors"
	"os"
	"testing"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/kernel/detect"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest"
	"github.com/selective-ksm/selective-ksm/engine/kernel/mainline"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

// Open opens the running kernel, one with partitions or one with ksmd, and adds a
// partition for the time of a test, which has the machine as [kerneltest.HaveMachine] says.
func Open(t testing.TB, partition string) kernel.Kernel {
	t.Helper()
	if os.Getuid() != 0 {
		missing.Skip(t, "not root")
	}
	k, _, err := detect.Open(detect.Options{Interface: detect.Auto, Mainline: mainline.Options{First: true, Dir: t.TempDir()}})
	if err != nil {
		missing.Skip(t, "this kernel has no KSM: %v", err)
	}
	if k.Features().OneSpace {
		kerneltest.HaveMachine(t)
	}
	if err := k.AddPartition(partition); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(k.RemovePartition(partition), k.Close()); err != nil {
			t.Error(err)
		}
	})
	return k
}

// OptIn lets the kernel merge the memory of a process in the partition.
func OptIn(t testing.TB, k kernel.Kernel, partition string, p *kerneltest.Process) {
	t.Helper()
	if !k.Features().Bind {
		p.Do(t, "mergeable")
	} else if err := k.Bind(partition, p.PID); err != nil {
		t.Fatal(err)
	}
}
