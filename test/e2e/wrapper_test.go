package e2e_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selective-ksm/selective-ksm/engine/optin"
	"github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/workload/report"
)

// A program is the same with the wrapper before it as without: what it sees of itself,
// how it ends, and what the runtime says of it. The image has no file but the program.
func TestWrapperCases(t *testing.T) {
	n := sharedNode(t)
	volume := noexec(t)
	copyFile(t, filepath.Join(volume, "workload"), node.Built(build).Workload)

	type containerConfig = runtime.ContainerConfig
	var (
		ordinary = node.PodConfig{Name: "ordinary"}
		shared   = node.PodConfig{Name: "shared", SharedPID: true} // whose containers have no process 1
		mapped   = node.PodConfig{Name: "mapped", UserNamespace: true}
	)
	secured := func(s *runtime.LinuxContainerSecurityContext) *runtime.LinuxContainerConfig {
		return &runtime.LinuxContainerConfig{SecurityContext: s}
	}
	sealed := secured(&runtime.LinuxContainerSecurityContext{Seccomp: &runtime.SecurityProfile{
		ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: onOptIn(t, "SCMP_ACT_ERRNO"),
	}})
	volumes := []*runtime.Mount{{HostPath: volume, ContainerPath: "/volume"}}
	const (
		waits   = -1 // for a signal
		refused = -2 // by the runtime, at the start
		yes, no = true, false
	)
	cases := []struct {
		name   string
		pod    node.PodConfig
		config *containerConfig
		status int // of the program
		// mergeable is what the wrapper makes it, and with its exit status where that is
		// another.
		mergeable bool
		with      int
	}{
		{name: "entry-point", config: &containerConfig{Args: []string{"-report", "-exit=0"}}, mergeable: yes},
		{name: "status", config: &containerConfig{Args: []string{"-report", "-exit=255"}}, status: 255, mergeable: yes},
		{name: "asked-to-end", config: &containerConfig{Args: []string{"-report", "-term=7"}}, status: waits, mergeable: yes},
		{name: "killed", pod: shared, config: &containerConfig{Args: []string{"-report", "-kill=9"}}, status: 128 + 9, mergeable: yes},
		{name: "killed-by-another", pod: shared, config: &containerConfig{Args: []string{"-report", "-kill=1"}}, status: 128 + 1, mergeable: yes},
		{name: "relative", config: &containerConfig{
			Command: []string{"../../workload"}, Args: []string{"-report", "-exit=1"}, WorkingDir: "/some/where",
		}, status: 1, mergeable: yes},
		{name: "in-PATH", config: &containerConfig{
			Command: []string{"workload"}, Args: []string{"-report", "-exit=2"}, Envs: []*runtime.KeyValue{{Key: "PATH", Value: []byte("/nowhere:/")}},
		}, status: 2, mergeable: yes},
		{name: "in-no-PATH", config: &containerConfig{
			Command: []string{"workload"}, Args: []string{"-report", "-exit=0"}, Envs: []*runtime.KeyValue{{Key: "PATH", Value: []byte{}}},
		}, status: refused, with: optin.ExitNotFound},
		{name: "not-there", config: &containerConfig{Command: []string{"/nowhere"}}, status: refused, with: optin.ExitNotFound},
		{name: "empty-arguments", config: &containerConfig{Args: []string{"-report", "-exit=3", "", "--", "a b", ""}}, status: 3, mergeable: yes},
		{name: "read-only", config: &containerConfig{
			Args: []string{"-report", "-exit=4"}, Linux: secured(&runtime.LinuxContainerSecurityContext{ReadonlyRootfs: true}),
		}, status: 4, mergeable: yes},
		{name: "some-user", config: &containerConfig{
			Args: []string{"-report", "-exit=5"}, Linux: secured(&runtime.LinuxContainerSecurityContext{
				RunAsUser: &runtime.Int64Value{Value: 1000}, RunAsGroup: &runtime.Int64Value{Value: 1000},
				SupplementalGroups: []int64{2000}, NoNewPrivs: true, ReadonlyRootfs: true,
				Capabilities: &runtime.Capability{DropCapabilities: []string{"ALL"}},
			}),
		}, status: 5, mergeable: yes},
		{name: "user-namespace", pod: mapped, config: &containerConfig{Args: []string{"-report", "-exit=6"}}, status: 6, mergeable: yes},
		{name: "user-of-namespace", pod: mapped, config: &containerConfig{
			Args: []string{"-report", "-exit=6"}, Linux: secured(&runtime.LinuxContainerSecurityContext{RunAsUser: &runtime.Int64Value{Value: 1000}}),
		}, status: 6, mergeable: yes},
		{name: "no-prctl", config: &containerConfig{Args: []string{"-report", "-exit=8"}, Linux: sealed}, status: 8, mergeable: no},
		{name: "noexec-volume", config: &containerConfig{Args: []string{"-report", "-exit=9"}, WorkingDir: "/volume", Mounts: volumes}, status: 9, mergeable: yes},
		// Only in a user namespace the mount stays what it is on the machine.
		{name: "on-noexec", pod: mapped, config: &containerConfig{
			Command: []string{"/volume/workload"}, Args: []string{"-report", "-exit=9"}, Mounts: volumes,
		}, status: refused, with: optin.ExitNotExecutable},
	}
	// all runs all of them, and returns what was seen of each.
	all := func(wrapped bool) (lines map[string][]string) {
		lines = map[string][]string{}
		records := map[string]*record{}
		for _, tc := range cases {
			if tc.pod.Name == "" {
				tc.pod = ordinary
			}
			r := records[tc.pod.Name]
			if r == nil {
				r = startRecord(t, n, tc.pod)
				records[tc.pod.Name] = r
			}
			r.lines = nil
			tc.config.Metadata = &runtime.ContainerMetadata{Name: tc.name}
			id, created := r.create(tc.config)
			if !created {
				t.Errorf("%s: %q", tc.name, r.lines)
				continue
			}
			started := r.start(id)
			status := tc.status
			if wrapped && status == refused {
				status = tc.with
			}
			if started == (status == refused) {
				t.Errorf("%s: started: %v: %q", tc.name, started, r.lines)
			}
			if status == waits {
				r.waitReport(tc.name)
				r.stop(id)
				status = 7
			}
			if !started {
				r.remove(id)
				continue
			}
			r.waitEnd(id)
			if got := isWrapped(r.status("ended", id)); got != wrapped {
				t.Errorf("%s: wrapped: %v, should be %v", tc.name, got, wrapped)
			}
			end, err := n.CRI().ContainerStatus(deadline(t), &runtime.ContainerStatusRequest{ContainerId: id})
			if err != nil {
				t.Fatal(err)
			}
			if int(end.Status.ExitCode) != status {
				t.Errorf("%s: wrapped: %v: exit status is %d, want %d\n%s", tc.name, wrapped, end.Status.ExitCode, status, r.output(tc.name))
			}
			if tc.status != refused {
				own := r.reported("program", r.output(tc.name))
				if want := map[bool]string{yes: "yes", no: "no"}[wrapped && tc.mergeable]; own.Mergeable != want {
					t.Errorf("%s: wrapped: %v: mergeable: %q, want %q", tc.name, wrapped, own.Mergeable, want)
				}
				lines[tc.name] = slices.Clone(r.lines)
			}
			r.remove(id)
		}
		for _, r := range records {
			if err := r.pod.Remove(deadline(t)); err != nil {
				t.Error(err)
			}
		}
		return lines
	}
	without := all(false)
	// The runtime lets containers with a user namespace have no sysfs of their own in a pod
	// with the machine's network.
	startPlugin(t, n, "pods: {privileged: true}\n"+wrapped)
	with := all(true)
	for name := range without {
		t.Run(name, func(t *testing.T) { same(t, without[name], with[name]) })
	}
	t.Logf("compared %d programs of %d cases", len(without), len(cases))
}

// noexec mounts a directory from which nothing can be executed, until the test ends.
func noexec(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "selective-ksm-noexec-")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// Without any environment a program is the same, too. containerd gives every container a
// PATH, runc does not.
func TestWrapperWithoutPATH(t *testing.T) {
	needPartitions(t)
	runc, err := filepath.Abs(filepath.Join(node.Built(build).Tools, "runc"))
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := os.MkdirTemp("/run", "selective-ksm-bundle-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(bundle) })
	bin := filepath.Join(bundle, "rootfs/usr/bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	copyFile(t, filepath.Join(bin, "workload"), node.Built(build).Workload)
	spec := exec.CommandContext(deadline(t), runc, "spec", "--bundle", bundle)
	if out, err := spec.CombinedOutput(); err != nil {
		t.Fatalf("runc spec: %v\n%s", err, out)
	}
	path := filepath.Join(bundle, "config.json")
	original, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	self, err := filepath.Abs(program)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[bool]report.Report{}
	for _, wrapped := range []bool{false, true} {
		var config map[string]any
		if err := json.Unmarshal(original, &config); err != nil {
			t.Fatal(err)
		}
		args := []string{"/usr/bin/workload", "-report", "-exit=3"}
		if wrapped {
			args = optin.Wrap(wrapperInside, args)
			config["mounts"] = append(config["mounts"].([]any), map[string]any{
				"source": self, "destination": wrapperInside, "type": "bind", "options": []string{"bind", "rprivate", "ro", "exec"},
			})
		}
		process := config["process"].(map[string]any)
		process["args"], process["terminal"] = args, false
		delete(process, "env")
		data, err := json.Marshal(config)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		run := exec.CommandContext(deadline(t), runc, "--root", filepath.Join(bundle, "runc"), "run", "--bundle", bundle, "without-path")
		var out, errOut bytes.Buffer
		run.Stdout, run.Stderr = &out, &errOut
		// Of a status other than 0 it says nothing itself.
		_ = run.Run()
		own, ok := report.Parse(out.String())
		if status := run.ProcessState.ExitCode(); status != 3 || !ok {
			t.Fatalf("wrapped: %v: status %d\n%s\n%s", wrapped, status, out.String(), errOut.String())
		}
		own.Mounts = slices.DeleteFunc(own.Mounts, func(m string) bool { return strings.HasPrefix(m, wrapperInside+" ") })
		if want := map[bool]string{false: "no", true: "yes"}[wrapped]; own.Mergeable != want {
			t.Errorf("wrapped: %v: mergeable: %q", wrapped, own.Mergeable)
		}
		own.Mergeable = ""
		seen[wrapped] = own
	}
	one, other := line(t, seen[false]), line(t, seen[true])
	same(t, []string{one}, []string{other})
}

func line(t *testing.T, v any) string {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
