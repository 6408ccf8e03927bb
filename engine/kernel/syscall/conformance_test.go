package syscall

import (
	"errors"
	"slices"
	"testing"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest"
	"github.com/selective-ksm/selective-ksm/engine/kernel/sysfs"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

func TestMain(m *testing.M) { kerneltest.Main(m) }

func TestConformance(t *testing.T) {
	fs, err := sysfs.Open()
	if err != nil {
		missing.Skip(t, "%v", err)
	}
	if _, err := Open(fs, nil); errors.Is(err, kernel.ErrNotSupported) {
		missing.Skip(t, "%v", err)
	}
	kerneltest.Suite(t, func(t *testing.T) kernel.Kernel {
		k, err := Open(fs, nil)
		if err != nil {
			t.Fatal(err)
		}
		return k
	})
	t.Run("a partition ends with its last user", func(t *testing.T) {
		k, err := Open(fs, nil)
		if err != nil {
			t.Fatal(err)
		}
		p, q := kerneltest.StartMergeable(t, 64), kerneltest.StartMergeable(t, 64)
		const name = "sksm-test-1"
		if err := k.AddPartition(name); err != nil {
			t.Fatal(err)
		}
		for _, p := range []*kerneltest.Process{p, q} {
			if err := k.Merge(t.Context(), name, p.PID, p.Held); err != nil {
				t.Fatal(err)
			}
		}
		if n := kerneltest.Shared(t, p, q); n != 64 {
			t.Errorf("%d pages are shared, want 64", n)
		}
		if err := k.Close(); err != nil {
			t.Fatal(err)
		}
		// A new one of the name waits until the old one is gone.
		if err := k.AddPartition(name); err != nil {
			t.Fatal(err)
		}
		if n := kerneltest.Shared(t, p, q); n != 0 {
			t.Errorf("%d pages are shared after the partition's end", n)
		}
		if err := k.RemovePartition(name); err != nil {
			t.Error(err)
		}
		if names, err := k.Partitions(); err != nil || slices.Contains(names, name) {
			t.Errorf("partitions are %q, %v", names, err)
		}
	})
}

// Nothing is called on a kernel that has not shown that it has the calls.
func TestOpen(t *testing.T) {
	if _, err := Open((&sysfs.FS{}).Literal(), &Numbers{Open: 467, Merge: 468}); !errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("with numbers for a kernel of the RFC alone: %v", err)
	}
}
