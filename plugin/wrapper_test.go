package plugin

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/missing"
)

// static writes a file that is a wrapper as far as anybody can see who does not
// run it.
func static(t testing.TB) (path string) {
	t.Helper()
	var header bytes.Buffer
	if err := binary.Write(&header, binary.LittleEndian, elf.Header64{
		Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
	}); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "selective-ksm")
	if err := os.WriteFile(path, header.Bytes(), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestKeepWrapper(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "own")
	wrapper := filepath.Join(t.TempDir(), "selective-ksm")
	for _, version := range []string{"one", "two, which is longer", "3"} {
		// Nobody but root may read it: the copy is for all.
		if err := os.WriteFile(wrapper, []byte(version), 0o700); err != nil {
			t.Fatal(err)
		}
		k, err := keepWrapper(dir, wrapper)
		if err != nil {
			t.Fatal(err)
		}
		if err := k.place(); err != nil {
			t.Fatal(err)
		}
		path := k.path
		if err := os.Remove(wrapper); err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(path)
		if err != nil || string(content) != version {
			t.Errorf("the copy holds %q, %v", content, err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o755 {
			t.Errorf("the copy is %v, %v", info.Mode(), err)
		}
	}
	// Nor does one stay that was killed.
	if err := errors.Join(os.WriteFile(filepath.Join(dir, ".optin-1"), []byte("par"), 0o600), os.WriteFile(wrapper, []byte("4"), 0o700)); err != nil {
		t.Fatal(err)
	}
	if k, err := keepWrapper(dir, wrapper); err != nil {
		t.Error(err)
	} else if err := k.drop(); err != nil {
		t.Error(err)
	}
	if content, err := os.ReadFile(filepath.Join(dir, "optin")); err != nil || string(content) != "3" {
		t.Errorf("after a copy that was dropped it holds %q, %v", content, err)
	}
	if err := os.Remove(wrapper); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("the directory holds %v, %v", left, err)
	}
	if _, err := keepWrapper(dir, wrapper); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of a wrapper that is not there: %v", err)
	}
	if _, err := keepWrapper("/dev/null/own", "/dev/null"); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("to a directory that cannot be: %v", err)
	}
}

func rule(action string, args int, names ...string) *api.LinuxSyscall {
	return &api.LinuxSyscall{Names: names, Action: action, Args: make([]*api.LinuxSeccompArg, args)}
}

func TestWrapperRuns(t *testing.T) {
	wrapper := static(t)
	policy := func(byDefault string, rules ...*api.LinuxSyscall) *api.Container {
		return &api.Container{Linux: &api.LinuxContainer{SeccompPolicy: &api.LinuxSeccomp{DefaultAction: byDefault, Syscalls: rules}}}
	}
	resources := func(r *api.LinuxResources) *api.Container {
		return &api.Container{Linux: &api.LinuxContainer{Resources: r}}
	}
	without := func(call string) []string {
		return slices.DeleteFunc(slices.Clone(wrapperCalls), func(c string) bool { return c == call })
	}
	for name, tc := range map[string]struct {
		ctr  *api.Container
		want string
	}{
		"nothing known":  {&api.Container{}, ""},
		"user namespace": {&api.Container{Linux: &api.LinuxContainer{Namespaces: []*api.LinuxNamespace{{Type: "user"}}}}, ""},

		"all allowed":  {policy("SCMP_ACT_ALLOW"), ""},
		"list":         {policy("SCMP_ACT_ERRNO", rule("SCMP_ACT_ALLOW", 0, wrapperCalls...)), ""},
		"logged":       {policy("SCMP_ACT_LOG"), ""},
		"opt-in fails": {policy("SCMP_ACT_ALLOW", rule("SCMP_ACT_ERRNO", 1, "prctl")), ""},
		"no prctl":     {policy("SCMP_ACT_ERRNO", rule("SCMP_ACT_ALLOW", 0, without("prctl")...)), ""},
		// As in containerd's own default.
		"clone by its flags": {policy("SCMP_ACT_ERRNO", rule("SCMP_ACT_ALLOW", 0, without("clone")...), rule("SCMP_ACT_ALLOW", 1, "clone")), ""},
		"no threads": {
			policy("SCMP_ACT_ERRNO", rule("SCMP_ACT_ALLOW", 0, without("clone")...)),
			"its seccomp policy refuses the wrapper's clone",
		},
		"opt-in kills": {
			policy("SCMP_ACT_ALLOW", rule("SCMP_ACT_KILL_PROCESS", 1, "prctl")),
			"its seccomp policy may answer the wrapper's prctl with SCMP_ACT_KILL_PROCESS",
		},
		"what is not listed kills": {
			policy("SCMP_ACT_KILL", rule("SCMP_ACT_ALLOW", 0, without("futex")...)),
			"its seccomp policy may answer the wrapper's futex with SCMP_ACT_KILL",
		},

		"few processes": {
			resources(&api.LinuxResources{Pids: &api.LinuxPids{Limit: 2}}),
			"its limit of processes of 2 is too low for the wrapper, which may need 32",
		},
		"processes without limit": {resources(&api.LinuxResources{Pids: &api.LinuxPids{Limit: -1}}), ""},
		"little memory": {
			resources(&api.LinuxResources{Memory: &api.LinuxMemory{Limit: api.Int64(8 << 20)}}),
			"its limit of memory of 8388608 is too low for the wrapper, which may need 16777216",
		},
		"enough memory": {resources(&api.LinuxResources{Memory: &api.LinuxMemory{Limit: api.Int64(32 << 20)}}), ""},
		"few addresses": {
			&api.Container{Rlimits: []*api.POSIXRlimit{{Type: "RLIMIT_AS", Soft: 512 << 20}}},
			"its RLIMIT_AS of 536870912 is too low for the wrapper, which may need 4294967296",
		},
		"other limits": {&api.Container{Rlimits: []*api.POSIXRlimit{{Type: "RLIMIT_CORE"}, {Type: "RLIMIT_NPROC", Soft: 1024}}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := wrapperRuns(wrapper, tc.ctr)
			if (err == nil) != (tc.want == "") || err != nil && err.Error() != tc.want {
				t.Errorf("error is\n\t%v\nwant\n\t%s", err, tc.want)
			}
		})
	}
	if err := os.Remove(wrapper); err != nil {
		t.Fatal(err)
	}
	if err := wrapperRuns(wrapper, &api.Container{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a wrapper that is gone: %v", err)
	}
}

// In a user namespace a mount keeps the noexec of where it comes from.
func TestWrapperOnNoexec(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_NOEXEC, "size=1m"); err != nil {
		missing.Skip(t, "cannot mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	k, err := keepWrapper(dir, static(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := k.place(); err != nil {
		t.Fatal(err)
	}
	if err := wrapperRuns(k.path, &api.Container{}); err != nil {
		t.Errorf("without a user namespace: %v", err)
	}
	err = wrapperRuns(k.path, &api.Container{Linux: &api.LinuxContainer{Namespaces: []*api.LinuxNamespace{{Type: "pid"}, {Type: "user"}}}})
	if want := "it has a user namespace, in which nothing from " + dir + ", which is mounted noexec, can be executed"; err == nil || err.Error() != want {
		t.Errorf("error is\n\t%v\nwant\n\t%s", err, want)
	}
}
