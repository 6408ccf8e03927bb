package e2e_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

// refusal runs the plugin, which has to refuse with one line, and returns it.
func refusal(t *testing.T, as *syscall.SysProcAttr, args ...string) string {
	t.Helper()
	needProgram(t)
	cmd := exec.CommandContext(deadline(t), program, append([]string{"plugin"}, args...)...)
	cmd.SysProcAttr = as
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() <= 0 {
		t.Fatalf("the plugin ended with %v, and said %q", err, stderr.String())
	}
	said := strings.TrimSuffix(stderr.String(), "\n")
	if said == "" || strings.Contains(said, "\n") {
		t.Errorf("the plugin did not say one line, but %q", stderr.String())
	}
	t.Log(said)
	return said
}

func wantIn(t *testing.T, said string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(said, part) {
			t.Errorf("%q is not in %q", part, said)
		}
	}
}

func configFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRefusesBadConfiguration(t *testing.T) {
	for name, tc := range map[string]struct{ config, key string }{
		"unknown key": {"partitonBy: pod\n", "partitonBy"},
		"wrong type":  {"interval: [1]\n", "interval"},
	} {
		t.Run(name, func(t *testing.T) {
			path := configFile(t, tc.config)
			wantIn(t, refusal(t, nil, "-config", path), path, tc.key)
		})
	}
	t.Run("no file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "none.yaml")
		wantIn(t, refusal(t, nil, "-config", path), path)
	})
}

func TestRefusesWithoutSocket(t *testing.T) {
	if !partition.Supported() || os.Getuid() != 0 {
		missing.Skip(t, "without root and partitions, that is what it says")
	}
	socket := filepath.Join(t.TempDir(), "nri.sock")
	wantIn(t, refusal(t, nil, "-config", configFile(t, ""), "-socket", socket), socket)
}

func TestRefusesOtherUsers(t *testing.T) {
	if os.Getuid() != 0 {
		missing.Skip(t, "not root, so it cannot become another user")
	}
	nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	// By a relative path the program need not be reachable from the root.
	wantIn(t, refusal(t, nobody), "root")
}

func TestRefusesOtherKernels(t *testing.T) {
	if partition.Supported() {
		t.Skip("this kernel has partitions: the tests outside the VM see to this")
	}
	if os.Getuid() != 0 {
		missing.Skip(t, "not root")
	}
	wantIn(t, refusal(t, nil, "-config", configFile(t, "")), "/sys/kernel/mm/ksm", "control")
}
