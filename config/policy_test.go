package config

import (
	"strings"
	"testing"
)

func TestAssign(t *testing.T) {
	pod := "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	ctr := "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210"
	for name, tc := range map[string]struct {
		by                Scope
		sandbox           Sandbox
		container         Container
		partition, reason string
	}{
		"pod":                {ScopePod, Sandbox{pod}, Container{ctr, "/k8s.io/" + ctr}, "sksm-pod-0123456789abcdef012345", ""},
		"container":          {ScopeContainer, Sandbox{pod}, Container{ctr, "/k8s.io/" + ctr}, "sksm-ctr-fedcba9876543210fedcba", ""},
		"systemd":            {ScopePod, Sandbox{pod}, Container{ctr, "kubepods-pod1.slice:cri-containerd:" + ctr}, "sksm-pod-0123456789abcdef012345", ""},
		"short id is hashed": {ScopePod, Sandbox{"web"}, Container{"c1", "/x/c1"}, "sksm-pod-4b5e57f6eb2f42b9039b3d", ""},
		"upper case is hashed": {ScopePod, Sandbox{strings.ToUpper(pod)}, Container{"c1", "/x/c1"},
			"sksm-pod-" + shortID(strings.ToUpper(pod)), ""},
		"no sandbox":   {ScopePod, Sandbox{}, Container{ctr, "/" + ctr}, "", "the runtime gave no sandbox id"},
		"no container": {ScopePod, Sandbox{pod}, Container{"", "/"}, "", "the runtime gave no container id"},
		"shared cgroup": {ScopePod, Sandbox{pod}, Container{ctr, "/shared"}, "",
			`its cgroup "/shared" is not named after the container, so that its processes cannot be told from others`},
		"cgroup below the container's": {ScopePod, Sandbox{pod}, Container{ctr, "/" + ctr + "/sub"}, "",
			`its cgroup "/` + ctr + `/sub" is not named after the container, so that its processes cannot be told from others`},
	} {
		t.Run(name, func(t *testing.T) {
			c := Default()
			c.PartitionBy = tc.by
			partition, reason := c.Assign(tc.sandbox, tc.container)
			if partition != tc.partition || reason != tc.reason {
				t.Errorf("got (%q, %q), want (%q, %q)", partition, reason, tc.partition, tc.reason)
			}
			if partition != "" && (!Owned(partition) || len(partition) > 31) {
				t.Errorf("%q is not a name that we own and the kernel takes", partition)
			}
		})
	}
}

func TestOwned(t *testing.T) {
	for name, want := range map[string]bool{
		"sksm-pod-0123456789abcdef012345":   true,
		"sksm-ctr-0123456789abcdef012345":   true,
		"sksm-pod-0123456789abcdef01234":    false,
		"sksm-pod-0123456789abcdef0123456":  false,
		"sksm-pod-0123456789ABCDEF012345":   false,
		"sksm-vm-0123456789abcdef0123456":   false,
		"sksm-pod-0123456789abcdef012345\n": false,
		"control":                           false,
		"":                                  false,
	} {
		if Owned(name) != want {
			t.Errorf("Owned(%q) = %v", name, !want)
		}
	}
}
