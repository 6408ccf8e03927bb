package hooks

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	form "go.podman.io/common/pkg/hooks/1.0.0"
)

// again is the pause before a runtime is asked again.
const again = 50 * time.Millisecond

// runtime runs containers as one of the ways does that hooks are given.
type runtime interface {
	// pod makes a pod, and returns what it is known by.
	pod(t testing.TB, name string) string
	// start starts the workload in a container of a pod, or of none, and returns its id.
	start(t testing.TB, name, pod string, args ...string) string
	// brief returns what starts a container that waits, and what stops and deletes it. Both
	// may be called at the same time as those of others.
	brief(t testing.TB, name, pod string, kill bool) life
	// restart stops a container, and starts it again.
	restart(t testing.TB, name string)
	// stop stops a container, by a signal that it gets or by SIGKILL, and deletes it.
	stop(t testing.TB, name string, kill bool)
}

// life is that of a container.
type life struct{ start, end func() error }

// command runs a command that must work, and returns what it says.
func command(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := try(name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// try runs a command, for as long as one of fifty podmans may take that start at once in an
// emulated VM. Containers that it leaves may keep its output open, so that goes through a
// file.
func try(name string, args ...string) (string, error) {
	file, err := os.CreateTemp("", "output-*")
	if err != nil {
		return "", err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = file, file
	err = cmd.Run()
	out, readErr := os.ReadFile(file.Name())
	if err == nil {
		err = readErr
	}
	return string(bytes.TrimSpace(out)), err
}

// rootfs makes the root of a container with the workload, in which dir is at the same
// path.
func rootfs(t testing.TB, dir string) string {
	t.Helper()
	root := t.TempDir()
	for _, name := range []string{"proc", "dev", "sys", "etc", "run", "tmp", "var/tmp", dir} {
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(workload, filepath.Join(root, "workload")); err != nil {
		content, err := os.ReadFile(workload)
		if err == nil {
			err = os.WriteFile(filepath.Join(root, "workload"), content, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// podman is podman, with the hooks in a directory.
type podman struct {
	hooks   string // empty if those of its own configuration are to be called
	runtime string // of the containers that are started next
	control string
	native  bool
	more    []string // arguments of the containers that are started next
}

func (p *podman) run(t testing.TB, args ...string) string {
	t.Helper()
	return command(t, "podman", append(p.global(), args...)...)
}

func (p *podman) global() []string {
	args := []string{"--runtime", p.runtime, "--cgroup-manager", "cgroupfs", "--log-level", "error"}
	if p.hooks != "" {
		args = append(args, "--hooks-dir", p.hooks)
	}
	return args
}

func (p *podman) pod(t testing.TB, name string) string {
	t.Helper()
	p.run(t, "pod", "create", "--infra=false", "--name", name)
	t.Cleanup(func() { p.run(t, "pod", "rm", "--force", "--time", "1", "--ignore", name) })
	return name
}

func (p *podman) start(t testing.TB, name, pod string, args ...string) string {
	t.Helper()
	id := p.run(t, append(p.args(name, pod, rootfs(t, p.control)), args...)...)
	t.Cleanup(func() { p.run(t, "rm", "--force", "--time", "1", "--ignore", name) })
	return id
}

// args are those that run the workload.
func (p *podman) args(name, pod, root string) []string {
	run := []string{"run", "--detach", "--name", name, "--network", "host"}
	if p.native {
		run = append(run, "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=4096:4096")
	}
	if pod != "" {
		run = append(run, "--pod", pod, "--env", podVariable+"="+pod)
	}
	run = append(run, p.more...)
	return append(run, "--volume", p.control+":"+p.control, "--rootfs", root, "/workload")
}

func (p *podman) brief(t testing.TB, name, pod string, kill bool) life {
	t.Helper()
	args := p.args(name, pod, rootfs(t, p.control))
	t.Cleanup(func() { p.run(t, "rm", "--force", "--time", "1", "--ignore", name) })
	end := []string{"stop", "--time", "10", name}
	if kill {
		end = []string{"kill", name}
	}
	global := p.global()
	return life{
		start: func() error { return steps("podman", global, args) },
		// Podman forgets after five minutes with what a container has ended, which wait asks for.
		end: func() error { return steps("podman", global, end, []string{"rm", "--force", "--time", "10", name}) },
	}
}

// steps runs one command after the other.
func steps(name string, global []string, all ...[]string) error {
	for _, args := range all {
		if out, err := try(name, slices.Concat(global, args)...); err != nil {
			return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
		}
	}
	return nil
}

func (p *podman) restart(t testing.TB, name string) {
	t.Helper()
	p.run(t, "restart", "--time", "10", name)
}

func (p *podman) stop(t testing.TB, name string, kill bool) {
	t.Helper()
	if kill {
		p.run(t, "kill", name)
	}
	p.run(t, "rm", "--force", "--time", "10", name)
}

// bundles runs bundles with a runtime directly.
type bundles struct {
	hooks   string
	runtime string // of the containers that are started next
	control string
	dirs    map[string]string
	last    map[string]string // the runtime of each
}

func (b *bundles) pod(_ testing.TB, name string) string { return name }

// config is that of a bundle.
func (b *bundles) config(t testing.TB, root, pod string, args []string) specs.Spec {
	t.Helper()
	s := specs.Spec{
		Version: "1.0.2",
		Root:    &specs.Root{Path: root},
		Process: &specs.Process{Args: append([]string{"/workload"}, args...), Cwd: "/", Env: []string{"PATH=/"}},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: b.control, Type: "bind", Source: b.control, Options: []string{"bind", "rw"}},
		},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}}},
		Hooks: installed(t, b.hooks),
	}
	if pod != "" {
		s.Process.Env = append(s.Process.Env, podVariable+"="+pod)
		s.Annotations = map[string]string{"io.kubernetes.cri.sandbox-id": pod, "io.kubernetes.cri.sandbox-name": pod}
	}
	return s
}

// installed are the hooks of a directory, as a bundle has them.
func installed(t testing.TB, dir string) *specs.Hooks {
	t.Helper()
	hooks := &specs.Hooks{}
	for stage, of := range map[string]*[]specs.Hook{
		"createruntime": &hooks.CreateRuntime, "poststart": &hooks.Poststart, "poststop": &hooks.Poststop,
	} {
		data, err := os.ReadFile(filepath.Join(dir, "90-selective-ksm-"+stage+".json"))
		if err != nil {
			t.Fatal(err)
		}
		var h form.Hook
		if err := json.Unmarshal(data, &h); err != nil {
			t.Fatal(err)
		}
		*of = append(*of, h.Hook)
	}
	return hooks
}

func (b *bundles) start(t testing.TB, name, pod string, args ...string) string {
	t.Helper()
	bundle := b.bundle(t, pod, args)
	if b.dirs == nil {
		b.dirs, b.last = map[string]string{}, map[string]string{}
	}
	b.dirs[name], b.last[name] = bundle, b.runtime
	command(t, b.runtime, "run", "--detach", "--bundle", bundle, name)
	t.Cleanup(func() {
		if b.dirs[name] != "" {
			_, _ = try(b.last[name], "delete", "--force", name)
		}
	})
	return name
}

// bundle makes a bundle of the workload.
func (b *bundles) bundle(t testing.TB, pod string, args []string) string {
	t.Helper()
	return write(t, b.config(t, rootfs(t, b.control), pod, args))
}

// write makes a bundle of a configuration.
func write(t testing.TB, s specs.Spec) string {
	t.Helper()
	bundle := t.TempDir()
	data, err := json.Marshal(s)
	if err == nil {
		err = os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return bundle
}

func (b *bundles) brief(t testing.TB, name, pod string, kill bool) life {
	t.Helper()
	bundle, runtime := b.bundle(t, pod, nil), b.runtime
	t.Cleanup(func() { _, _ = try(runtime, "delete", "--force", name) })
	signal := "TERM"
	if kill {
		signal = "KILL"
	}
	return life{
		start: func() error { return steps(runtime, nil, []string{"run", "--detach", "--bundle", bundle, name}) },
		end: func() error {
			// The first signal may come before it has a handler.
			for deadline := time.Now().Add(patience); ; time.Sleep(again) {
				_, _ = try(runtime, "kill", name, signal)
				if err := steps(runtime, nil, []string{"delete", name}); err == nil || time.Now().After(deadline) {
					return err
				}
			}
		},
	}
}

func (b *bundles) restart(t testing.TB, name string) {
	t.Helper()
	command(t, b.last[name], "kill", name, "KILL")
	b.delete(t, name)
	command(t, b.last[name], "run", "--detach", "--bundle", b.dirs[name], name)
}

// delete deletes a container that is ending.
func (b *bundles) delete(t testing.TB, name string) {
	t.Helper()
	within(t, fmt.Sprintf("%s deletes %s", b.last[name], name), func() error {
		out, err := try(b.last[name], "delete", name)
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

func (b *bundles) stop(t testing.TB, name string, kill bool) {
	t.Helper()
	signal := "TERM"
	if kill {
		signal = "KILL"
	}
	command(t, b.last[name], "kill", name, signal)
	b.delete(t, name)
	delete(b.dirs, name)
}
