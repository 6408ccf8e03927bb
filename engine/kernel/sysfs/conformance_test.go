package sysfs

import (
	"testing"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

func TestMain(m *testing.M) { kerneltest.Main(m) }

func TestConformance(t *testing.T) {
	f, err := Open()
	if err != nil {
		missing.Skip(t, "%v", err)
	}
	t.Run("series", func(t *testing.T) {
		kerneltest.Suite(t, func(*testing.T) kernel.Kernel { return f })
	})
	// What a kernel with the RFC alone can be asked for, this one does as well.
	t.Run("literal RFC", func(t *testing.T) {
		kerneltest.Suite(t, func(*testing.T) kernel.Kernel { return f.Literal() })
	})
}
