// Package variants_test boots what kernel/build and kernel/deb make, to see that
// each is what it is for. Unlike the other tests of kernels these run outside of
// the VM, since they start it.
package variants_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/test/vm"
)

// built is a file below the directory that make builds to.
func built(t *testing.T, file string) string {
	t.Helper()
	dir := os.Getenv("SELECTIVE_KSM_BUILD")
	if dir == "" {
		t.Skip("no kernels to boot: set SELECTIVE_KSM_BUILD to the directory build, as make test does")
	}
	path := filepath.Join(dir, file)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("make test builds it first: %v", err)
	}
	return path
}

// variant is a VM with one of the kernels that kernel/build makes.
func variant(t *testing.T, name string) vm.Config {
	t.Helper()
	return machine(t, built(t, filepath.Join("kernel", name, "bzImage")))
}

func machine(t *testing.T, kernel string) vm.Config {
	t.Helper()
	return vm.Config{
		Kernel:  kernel,
		Init:    built(t, "bin/vm"),
		Memory:  "3G",
		Timeout: 20 * time.Minute,
	}
}
