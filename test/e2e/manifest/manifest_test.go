package manifest

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const example = `---
apiVersion: v1
kind: Namespace
metadata: {name: apart, unknown: here}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: daemon, namespace: apart}
spec:
  selector: {matchLabels: {a: b}}
  template:
    metadata: {labels: {a: b}}
    spec:
      automountServiceAccountToken: false
      hostPID: true
      containers:
        - name: one
          image: example.org/one
          args: [run]
          securityContext:
            runAsUser: 0
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: {drop: [ALL], add: [SYS_PTRACE]}
            seccompProfile: {type: RuntimeDefault}
            appArmorProfile: {type: Unconfined}
          resources: {requests: {cpu: 50m, memory: 1Mi}, limits: {memory: 20Mi}}
          volumeMounts:
            - {name: config, mountPath: /etc/one, readOnly: true}
            - {name: host, mountPath: /data}
      volumes:
        - name: config
          configMap: {name: files}
        - name: host
          hostPath: {path: HOST, type: Directory}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: files}
data: {config.yaml: content}
`

func TestDaemonSet(t *testing.T) {
	host := t.TempDir()
	d, err := parse([]byte(strings.Replace(example, "HOST", host, 1)))
	if err != nil {
		t.Fatal(err)
	}
	if want := map[string]map[string]string{"files": {"config.yaml": "content"}}; !reflect.DeepEqual(d.ConfigMaps, want) {
		t.Errorf("ConfigMaps are %v", d.ConfigMaps)
	}
	got, err := d.CRI(map[string]string{"files": "/config"})
	if err != nil {
		t.Fatal(err)
	}
	namespaces := &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_NODE}
	limits := &runtime.LinuxContainerResources{CpuShares: 51, MemoryLimitInBytes: 20 << 20}
	want := &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: "one"},
		Image:    &runtime.ImageSpec{Image: "example.org/one"},
		Args:     []string{"run"},
		Mounts: []*runtime.Mount{
			{HostPath: "/config", ContainerPath: "/etc/one", Readonly: true}, {HostPath: host, ContainerPath: "/data"},
		},
		Linux: &runtime.LinuxContainerConfig{
			Resources: limits,
			SecurityContext: &runtime.LinuxContainerSecurityContext{
				NamespaceOptions: namespaces,
				RunAsUser:        &runtime.Int64Value{},
				NoNewPrivs:       true,
				ReadonlyRootfs:   true,
				Capabilities:     &runtime.Capability{AddCapabilities: []string{"SYS_PTRACE"}, DropCapabilities: []string{"ALL"}},
				MaskedPaths:      maskedPaths,
				ReadonlyPaths:    readonlyPaths,
				Seccomp:          &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault},
				Apparmor:         &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined},
			},
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the container is %v\nwant %v", got, want)
	}
	sandbox, err := d.Sandbox("7")
	if err != nil {
		t.Fatal(err)
	}
	if s := sandbox.Linux; sandbox.Metadata.Namespace != "apart" || !reflect.DeepEqual(s.SecurityContext.NamespaceOptions, namespaces) ||
		!reflect.DeepEqual(s.Resources, limits) {
		t.Errorf("the sandbox is %v", sandbox)
	}
}

// What would not be translated is not left out.
func TestNotTranslated(t *testing.T) {
	for name, tc := range map[string]struct{ from, to string }{
		"pod's field":       {"hostPID: true", "hostIPC: true"},
		"container's field": {"args: [run]", "command: [run]"},
		"another container": {"      volumes:", "        - name: two\n      volumes:"},
		"no DaemonSet":      {"kind: DaemonSet", "kind: Deployment"},
		"service account":   {"automountServiceAccountToken: false", "enableServiceLinks: false"},
		"profile":           {"seccompProfile: {type: RuntimeDefault}", "seccompProfile: {type: Localhost}"},
		"unit":              {"memory: 20Mi", "memory: 1Gi"},
		"kind of volume":    {"hostPath: {path: HOST, type: Directory}", "emptyDir: {}"},
		"type of volume":    {"type: Directory}", "type: Socket}"},
		"no directory":      {"path: HOST", "path: /none/such"},
		"no volume":         {"- {name: host,", "- {name: other,"},
		"no ConfigMap":      {"configMap: {name: files}", "configMap: {name: other}"},
	} {
		t.Run(name, func(t *testing.T) {
			text := strings.Replace(example, tc.from, tc.to, 1)
			if text == example {
				t.Fatalf("%q is not in the example", tc.from)
			}
			d, err := parse([]byte(strings.Replace(text, "HOST", t.TempDir(), 1)))
			if err == nil {
				_, err = d.CRI(map[string]string{"files": "/config"})
			}
			if err == nil {
				t.Error("no error")
			}
			t.Log(err)
		})
	}
}

func TestConfigMap(t *testing.T) {
	dir := t.TempDir()
	for _, content := range []string{"first", "second"} {
		if err := WriteConfigMap(dir, map[string]string{"config.yaml": content}); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(dir, "config.yaml")); err != nil || string(got) != content {
			t.Errorf("has %q, %v, want %q", got, err, content)
		}
		// The file's link, ..data and what it leads to.
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 3 {
			t.Errorf("it has %v, %v", entries, err)
		}
	}
}

func TestPods(t *testing.T) {
	const two = `apiVersion: v1
kind: Pod
metadata: {name: one, namespace: shop, annotations: {key: value}}
spec: {containers: [{name: a, image: x}, {name: b, image: x}]}
---
apiVersion: v1
kind: Pod
metadata: {name: two}
spec: {containers: [{name: c, image: x}]}
`
	path := filepath.Join(t.TempDir(), "pods.yaml")
	pods := func(text string) ([]Pod, error) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return ReadPods(path)
	}
	got, err := pods(two)
	if err != nil {
		t.Fatal(err)
	}
	want := []Pod{
		{Name: "one", Namespace: "shop", Annotations: map[string]string{"key": "value"}, Containers: []string{"a", "b"}},
		{Name: "two", Containers: []string{"c"}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
	for _, wrong := range []string{strings.Replace(two, "image: x", "imagine: x", 1), strings.Replace(two, "Pod", "Job", 1)} {
		if got, err := pods(wrong); err == nil {
			t.Errorf("%q is %+v", wrong, got)
		}
	}
}
