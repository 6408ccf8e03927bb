package variants_test

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/selective-ksm/selective-ksm/test/vm"
)

// The package that make kernel-deb made from the VM's own configuration.
func TestDebianPackage(t *testing.T) {
	packages, err := filepath.Glob(filepath.Join(built(t, "kernel/deb"), "linux-image-*.deb"))
	if err != nil || len(packages) != 1 {
		t.Fatalf("image packages: %v, %v, want one", packages, err)
	}
	root := t.TempDir()
	if out, err := exec.Command("dpkg-deb", "-x", packages[0], root).CombinedOutput(); err != nil {
		t.Fatalf("unpack %s: %v\n%s", packages[0], err, out)
	}
	kernels, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		t.Fatalf("kernels in the package: %v, %v, want one", kernels, err)
	}
	var output bytes.Buffer
	cfg := machine(t, kernels[0])
	cfg.Stdout, cfg.Stderr = &output, &output
	if err := vm.Run(t.Context(), cfg, "sh", "-ec", "test -d /sys/kernel/mm/ksm/control; uname -r"); err != nil {
		t.Fatalf("%v\n%s", err, output.String())
	}
	_, version, _ := strings.Cut(filepath.Base(kernels[0]), "-")
	if got := strings.TrimSpace(output.String()); got != version {
		t.Errorf("it runs as %q, want %q as the file's name is", got, version)
	}
}
