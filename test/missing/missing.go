// Package missing decides what a test does that lacks something it needs: a
// kernel with a feature, root, a program that make has not built.
package missing

import (
	"os"
	"testing"
)

// Skip says what is missing and skips the test, or fails it where make test has
// put all that any test needs: in the VM, with SELECTIVE_KSM_VM set.
func Skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("SELECTIVE_KSM_VM") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}
