package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/hooks"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

func TestInterval(t *testing.T) {
	for text, want := range map[string]time.Duration{"true": refresh, "false": 0, "5s": 5 * time.Second, "100ms": least} {
		var i interval
		if err := i.Set(text); err != nil || time.Duration(i) != want {
			t.Errorf("%s is %v, %v", text, time.Duration(i), err)
		}
	}
	for _, text := range []string{"", "5", "-5s", "10ms", "often"} {
		var i interval
		if err := i.Set(text); err == nil {
			t.Errorf("%q is %v", text, time.Duration(i))
		}
	}
}

// Who writes a space before the duration is told how it is written.
func TestWatchWithSpace(t *testing.T) {
	for args, part := range map[string]string{"-watch 5s": "write -watch=5s", "-watch now": `argument "now"`, "5s": `argument "5s"`} {
		if err := runStatus(strings.Fields(args)); !errors.Is(err, errUsage) || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: got %v, want %q", args, err, part)
		}
	}
}

func TestOneArgument(t *testing.T) {
	for _, tc := range []struct {
		args   []string
		needed bool
		want   string
		usage  bool
	}{
		{nil, false, "", false},
		{[]string{"a"}, false, "a", false},
		{[]string{"a"}, true, "a", false},
		{nil, true, "", true},
		{[]string{"a", "b"}, false, "", true},
		{[]string{"-a"}, false, "", true},
	} {
		if got, err := one("merge", "partition", tc.needed, tc.args); got != tc.want || errors.Is(err, errUsage) != tc.usage {
			t.Errorf("%q, needed %v: got %q, %v", tc.args, tc.needed, got, err)
		}
	}
}

// What is wrong with the arguments of a hook is the container's failure only if that was
// asked for before.
func TestHookArguments(t *testing.T) {
	for _, want := range []bool{false, true} {
		args := []string{"-moon"}
		if want {
			args = []string{"-strict", "-moon"}
		}
		strict, err := runStage(hooks.Poststop, args)
		const text = "arguments: flag provided but not defined: -moon: see selective-ksm help"
		if strict != want || err == nil || err.Error() != text {
			t.Errorf("%q: strict is %v, and the error %v", args, strict, err)
		}
	}
}

func TestWritable(t *testing.T) {
	dir := t.TempDir()
	if err := writable(filepath.Join(dir, "a", "b")); err != nil {
		t.Error(err)
	}
	if err := writable("/proc/sys/none"); err == nil {
		t.Error("a directory that cannot be made is said to be writable")
	}
}

// units are the examples of services.
var units = []string{"examples/systemd/selective-ksm.service", "examples/hooks/selective-ksm.service"}

// Both services have the capabilities that doctor looks for, and the same sandbox.
func TestUnits(t *testing.T) {
	var sandboxes []string
	for _, path := range units {
		unit, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		m := regexp.MustCompile(`(?m)^CapabilityBoundingSet=(.*)$`).FindSubmatch(unit)
		if m == nil {
			t.Fatalf("%s bounds no capabilities", path)
		}
		given := strings.Fields(string(m[1]))
		for _, c := range capabilities {
			if needs := c.needs(config.Default()); needs != slices.Contains(given, c.name) {
				t.Errorf("%s: that %s is needed is %v, and it has %q", path, c.name, needs, given)
			}
			if !strings.Contains(string(unit), c.name) {
				t.Errorf("%s does not say what %s is for", path, c.name)
			}
		}
		_, sandbox, _ := strings.Cut(string(unit), "\nType=notify\n")
		sandboxes = append(sandboxes, sandbox)
	}
	if sandboxes[0] == "" || sandboxes[0] != sandboxes[1] {
		t.Error("the services' sandboxes differ")
	}
}

// systemd finds nothing wrong with the services.
func TestUnitsVerify(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		missing.Skip(t, "%v", err)
	}
	for _, path := range units {
		unit, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		// It looks for the programs, too.
		here := filepath.Join(t.TempDir(), filepath.Base(path))
		if err := os.WriteFile(here, []byte(strings.ReplaceAll(string(unit), "/usr/local/bin/selective-ksm", "/bin/true")), 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--man=no", here).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v: %s", path, err, out)
		}
	}
}
