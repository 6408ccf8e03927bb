package hooks

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
)

func TestReadConfig(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.json")
	for name, tc := range map[string]struct{ content, want string }{
		"right":     {ordinary, ""},
		"nothing":   {"", "unexpected end of JSON input"},
		"truncated": {ordinary[:40], "unexpected end of JSON input"},
		"large":     {ordinary + strings.Repeat(" ", maxConfig), "larger than 4194304 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			write(t, path, tc.content)
			s, err := readConfig(dir)
			if tc.want == "" {
				if err != nil || len(s.Mounts) != 1 {
					t.Errorf("got %+v, %v", s, err)
				}
				return
			}
			if want := fmt.Sprintf("configuration of bundle %q: %s", dir, tc.want); err == nil || err.Error() != want {
				t.Errorf("error is\n\t%v\nwant\n\t%s", err, want)
			}
		})
	}
	if _, err := readConfig("bundle"); err == nil || err.Error() != `configuration of bundle "bundle": not an absolute path` {
		t.Errorf("of a relative path: %v", err)
	}
	if _, err := readConfig(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of no directory: %v", err)
	}
}

// What a runtime has written into a bundle says whose the container is.
func TestDescribe(t *testing.T) {
	dir := t.TempDir()
	sandbox := strings.Repeat("5", 64)
	for name, tc := range map[string]struct {
		annotations string
		want        Description
		failed      bool
	}{
		"CRI-O": {
			`"io.kubernetes.cri-o.SandboxID":"` + sandbox + `","io.kubernetes.cri-o.ContainerType":"container","io.kubernetes.pod.namespace":"shop",
			"io.kubernetes.pod.name":"web","io.kubernetes.container.name":"server","merge.selective-ksm.dev/container.server":"off","merge.selective-ksm.dev":"on"`,
			Description{
				Container:   engine.Container{ID: "a", Name: "server", Pod: "web", Namespace: "shop", SandboxID: sandbox},
				Annotations: map[string]string{config.AnnotationMerge: "off"},
			}, false,
		},
		"pause": {
			`"io.kubernetes.cri.sandbox-id":"` + sandbox + `","io.kubernetes.cri.container-type":"sandbox"`,
			Description{Container: engine.Container{ID: "a", SandboxID: "a"}, Pause: true}, false,
		},
		"no pod":       {"", Description{Container: engine.Container{ID: "a", SandboxID: "a"}, Annotations: map[string]string{}}, false},
		"two runtimes": {`"io.kubernetes.cri.sandbox-id":"1","io.kubernetes.cri-o.SandboxID":"2"`, Description{Container: engine.Container{ID: "a"}}, true},
	} {
		t.Run(name, func(t *testing.T) {
			write(t, filepath.Join(dir, "config.json"), `{"annotations":{`+tc.annotations+`}}`)
			if got, err := Describe("a", dir); (err != nil) != tc.failed || !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
	if _, err := Describe("a", filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a bundle: %v", err)
	}
}

// What the policy leaves out because of the container's own configuration or of its
// processes is left out, unless it is told to take it.
func TestPrivilegedAndHostPID(t *testing.T) {
	devices := func(s string) string { return strings.Replace(ordinary, `"access":"rwm"}]`, s, 1) }
	allowed := config.Default()
	allowed.Pods.Privileged = true
	for name, bundle := range map[string]string{
		"writable sysfs":  strings.Replace(ordinary, `,"ro"`, "", 1),
		"second sysfs":    strings.Replace(ordinary, `"mounts":[`, `"mounts":[{"destination":"/mnt","type":"sysfs"},`, 1),
		"no sysfs":        `{"ociVersion":"1.0.2"}`,
		"all devices":     devices(`"access":"rwm"},{"allow":true,"access":"rwm"}]`),
		"all, by numbers": devices(`"access":"rwm"},{"allow":true,"type":"a","major":-1,"minor":-1,"access":"rw"}]`),
	} {
		t.Run(name, func(t *testing.T) {
			s := specs.State{ID: id, Pid: pid, Bundle: bundleOf(t, t.TempDir(), id, bundle)}
			on := fakeMachine(t, "0::/"+id+"\n", id)
			const want = "it is privileged, and pods.privileged of the configuration is false"
			if c, err := placedOn(on, s, config.Default()); err == nil || err.Error() != want {
				t.Errorf("got %+v, %v", c, err)
			}
			if c, err := placedOn(on, s, allowed); err != nil || c.Partition == "" {
				t.Errorf("allowed: got %+v, %v", c, err)
			}
		})
	}
	t.Run("not all devices", func(t *testing.T) {
		for _, those := range []string{
			`"access":"rwm"},{"allow":true,"type":"b","access":"rwm"}]`, `"access":"rwm"},{"allow":true,"access":"rm"}]`,
			`"access":"rwm"},{"allow":true,"type":"a","major":1,"access":"rwm"}]`,
		} {
			s := specs.State{ID: id, Pid: pid, Bundle: bundleOf(t, t.TempDir(), id, devices(those))}
			if c, err := placedOn(fakeMachine(t, "0::/"+id+"\n", id), s, config.Default()); err != nil {
				t.Errorf("%s: got %+v, %v", those, c, err)
			}
		}
	})
	t.Run("host pid", func(t *testing.T) {
		on := fakeMachine(t, "0::/"+id+"\n", id)
		s := specs.State{ID: id, Pid: pid, Bundle: bundleOf(t, t.TempDir(), id, ordinary)}
		its := filepath.Join(on.proc, strconv.Itoa(pid), "ns/pid")
		if err := os.Remove(its); err != nil {
			t.Fatal(err)
		}
		if c, err := placedOn(on, s, config.Default()); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("of a process that is gone: got %+v, %v", c, err)
		}
		if err := os.Link(filepath.Join(on.proc, "self/ns/pid"), its); err != nil {
			t.Fatal(err)
		}
		const want = "it sees the processes of the machine, and pods.hostPID of the configuration is false"
		if c, err := placedOn(on, s, config.Default()); err == nil || err.Error() != want {
			t.Errorf("got %+v, %v", c, err)
		}
		allowed := config.Default()
		allowed.Pods.HostPID = true
		if c, err := placedOn(on, s, allowed); err != nil || c.Partition == "" {
			t.Errorf("allowed: got %+v, %v", c, err)
		}
	})
}

// Rules for what a hook is not told of, or cannot trust, leave a container out.
func TestRulesOfPods(t *testing.T) {
	sandboxed := func(labels string) string {
		return fmt.Sprintf(`{"annotations":{%q:%q,%q:"sandbox"%s}}`, crio.sandbox, sandbox, crio.kind, labels)
	}
	const unknown = "pods.labels of the configuration has rules for app, and it is not known whether the pod has that label"
	labels := func(include, exclude string) config.Pods {
		var p config.Pods
		if include != "" {
			p.Labels.Include = []string{include}
		}
		if exclude != "" {
			p.Labels.Exclude = []string{exclude}
		}
		return p
	}
	ofPod := map[string]string{crio.sandbox: sandbox, crio.kind: "container", crio.namespace: "shop"}
	annotated := maps.Clone(ofPod)
	annotated["app"] = "web"
	for name, tc := range map[string]struct {
		annotations map[string]string
		sandbox     string // the configuration of its bundle, if there is one
		pods        config.Pods
		want        string // why it is left out
	}{
		"included":                {ofPod, sandboxed(`,"app":"web-1"`), labels("app=web-*", ""), ""},
		"not included":            {ofPod, sandboxed(`,"app":"db"`), labels("app=web-*", ""), "pods.labels.include of the configuration has not a label of its pod"},
		"has no such label":       {ofPod, sandboxed(""), labels("app=*", ""), "pods.labels.include of the configuration has not a label of its pod"},
		"excluded":                {ofPod, sandboxed(`,"app":"db"`), labels("", "app=db"), "pods.labels.exclude of the configuration has a label of its pod"},
		"not excluded":            {ofPod, sandboxed(""), labels("", "app=db"), ""},
		"an annotation of a name": {annotated, sandboxed(`,"app":"web"`), labels("app=web", ""), unknown},
		"podman":                  {ofPod, "", labels("app=web", ""), unknown},
		"podman, excluded":        {ofPod, "", labels("", "app=web"), unknown},
		"no pod":                  {nil, sandboxed(`,"app":"web"`), labels("app=web", ""), unknown},
		"of another pod":          {ofPod, strings.ReplaceAll(sandboxed(`,"app":"web"`), sandbox, id), labels("app=web", ""), unknown},
		"of no pod":               {ofPod, strings.ReplaceAll(sandboxed(`,"app":"web"`), `"sandbox"`, `"container"`), labels("app=web", ""), unknown},
		"runtime handler": {ofPod, sandboxed(""), config.Pods{RuntimeHandlers: config.Rule{Exclude: []string{"kata"}}},
			"pods.runtimeHandlers of the configuration has rules, and a hook is not told of the runtime handler"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			s := specs.State{ID: id, Pid: pid, Annotations: tc.annotations, Bundle: bundleOf(t, root, id, ordinary)}
			if tc.sandbox != "" {
				bundleOf(t, root, sandbox, tc.sandbox)
			}
			policy := config.Default()
			policy.Pods = tc.pods
			c, err := placedOn(fakeMachine(t, "0::/"+id+"\n", id), s, policy)
			if tc.want == "" {
				if err != nil || c.Partition == "" {
					t.Errorf("got %+v, %v", c, err)
				}
			} else if err == nil || err.Error() != tc.want || !errors.Is(err, ErrLeftOut) {
				t.Errorf("got %+v, and error\n\t%v\nwant\n\t%s", c, err, tc.want)
			}
		})
	}
}
