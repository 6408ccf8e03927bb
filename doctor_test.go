package main

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/selective-ksm/selective-ksm/config"
)

func TestDiagnose(t *testing.T) {
	there := prerequisite{"root", true, nil, "be root"}
	nice := prerequisite{"pressure", false, errors.New("no file"), "boot with psi=1"}
	needed := prerequisite{"cgroups", true, errors.New("not mounted"), "mount them"}
	for _, tc := range []struct {
		all   []prerequisite
		unfit bool
		want  string
	}{
		{[]prerequisite{there}, false, "ok       root\n"},
		{[]prerequisite{there, nice}, false, "ok       root\nwithout  pressure: no file\n         fix: boot with psi=1\n"},
		{[]prerequisite{needed, nice}, true, "MISSING  cgroups: not mounted\n         fix: mount them\nwithout  pressure: no file\n         fix: boot with psi=1\n"},
	} {
		var out strings.Builder
		if unfit := diagnose(&out, tc.all); unfit != tc.unfit || out.String() != tc.want {
			t.Errorf("unfit %t, and it says\n%swant\n%s", unfit, out.String(), tc.want)
		}
	}
}

// Whatever this machine lacks, there is something to do about it; and what a configuration
// asks for is looked for.
func TestPrerequisites(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "nri.sock")
	cfg := config.Default()
	cfg.OptIn, cfg.Wrapper = config.OptInWrapper, "/dev/null"
	cfg.Pressure = config.PressurePod
	found := map[string]prerequisite{}
	for _, p := range prerequisites(cfg, socket) {
		if p.fix == "" {
			t.Errorf("%s has no fix", p.what)
		}
		found[p.what] = p
	}
	for what, needed := range map[string]bool{"NRI at " + socket: false, "wrapper for containers": true} {
		if p, there := found[what]; !there || p.err == nil || p.needed != needed {
			t.Errorf("%s: %+v", what, p)
		}
	}
	if _, there := found["pressure stall information of pods"]; !there {
		t.Error("pods' pressure is not looked for")
	}
}
