package mainline

import (
	"os"
	"testing"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest"
	"github.com/selective-ksm/selective-ksm/engine/kernel/sysfs"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

func TestMain(m *testing.M) { kerneltest.Main(m) }

func TestConformance(t *testing.T) {
	if _, err := sysfs.Open(); err == nil {
		t.Skip("this kernel has Selective KSM, and no ksmd: make test runs this on a stock kernel, too")
	}
	kerneltest.HaveMachine(t)
	kerneltest.Suite(t, func(t *testing.T) kernel.Kernel {
		k, err := Open(Options{First: true})
		if err != nil {
			missing.Skip(t, "%v", err)
		}
		if os.Getuid() != 0 {
			missing.Skip(t, "not root")
		}
		return k
	})
}
