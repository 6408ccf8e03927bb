package config

import (
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	podID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	ctrID = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210"

	ofPod       = "sksm-pod-0123456789abcdef012345"
	ofContainer = "sksm-ctr-fedcba9876543210fedcba"
	// A plugin has to find what one of an earlier version has left.
	ofShop      = "sksm-ns-VqlyO6FzXzAfy4qr5DbxLc"
	ofShopsWeb  = "sksm-grp-bh8ooXgyjqkm8rxvbtMW3V"
	ofSharedWeb = "sksm-grp-g-mxB_avgnw68erhubn9qi"
)

// inShop are a sandbox and a container that nothing is special about.
func inShop() (Sandbox, Container) {
	return Sandbox{ID: podID, Namespace: "shop"}, Container{ID: ctrID, CgroupsPath: "/k8s.io/" + ctrID}
}

// asking is a container with annotations, given as keys and values.
func asking(annotations ...string) Container {
	_, ctr := inShop()
	ctr.Annotations = map[string]string{}
	for pair := range slices.Chunk(annotations, 2) {
		ctr.Annotations[pair[0]] = pair[1]
	}
	return ctr
}

// Whose memory a container's may be merged with, for all that the configuration and
// annotations can say.
func TestPartition(t *testing.T) {
	const (
		widens = "the configuration has partitionBy: %s, which may not be widened: that holds"
		bad    = "write container, pod, namespace or group:NAME: until then it is merged with itself alone"
	)
	for _, tc := range []struct {
		by, asked, want, ignored string
	}{
		{"container", "", ofContainer, ""},
		{"container", "container", ofContainer, ""},
		{"container", "pod", ofContainer, widens},
		{"container", "group:web", ofContainer, widens},
		{"container", "namespace", ofContainer, widens},
		{"pod", "", ofPod, ""},
		{"pod", "container", ofContainer, ""},
		{"pod", "pod", ofPod, ""},
		{"pod", "group:web", ofPod, widens},
		{"pod", "namespace", ofPod, widens},
		{"group", "", ofPod, ""},
		{"group", "container", ofContainer, ""},
		{"group", "pod", ofPod, ""},
		{"group", "group:web", ofShopsWeb, ""},
		{"group", "namespace", ofPod, widens},
		{"namespace", "", ofShop, ""},
		{"namespace", "container", ofContainer, ""},
		{"namespace", "pod", ofPod, ""},
		{"namespace", "group:web", ofShopsWeb, ""},
		{"namespace", "namespace", ofShop, ""},

		// The configuration lets the shop join one, however narrow the rest is.
		{"container", "group:shared", ofSharedWeb, ""},
		{"pod", "group:shared", ofSharedWeb, ""},
		{"namespace", "group:shared", ofSharedWeb, ""},
		// And not another: it is one of its own namespace, or none.
		{"namespace", "group:banks", "sksm-grp-" + hashed("group", "shop", "banks"), ""},
		{"pod", "group:banks", ofPod, widens},

		{"namespace", "group", ofContainer, bad},
		{"namespace", "group:", ofContainer, bad},
		{"namespace", "group:a b", ofContainer, bad},
		{"namespace", "group:" + strings.Repeat("a", 64), ofContainer, bad},
		{"namespace", "group:" + strings.Repeat("a", 63), "sksm-grp-" + hashed("group", "shop", strings.Repeat("a", 63)), ""},
		{"namespace", "group:shop\x00web", ofContainer, bad},
		{"namespace", "Pod", ofContainer, bad},
		{"namespace", "node", ofContainer, bad},
		{"pod", " pod", ofContainer, bad},
	} {
		t.Run(tc.by+", "+tc.asked, func(t *testing.T) {
			c := Default()
			c.PartitionBy = Scope(tc.by)
			c.SharedGroups = map[string][]string{"shared": {"sho?", "team-*"}, "banks": {"bank"}}
			s, ctr := inShop()
			var ignored []Ignored
			if tc.asked != "" {
				ctr = asking(AnnotationPartition, tc.asked)
				if tc.ignored != "" {
					ignored = []Ignored{{AnnotationPartition, tc.asked, strings.ReplaceAll(tc.ignored, "%s", tc.by)}}
				}
			}
			for i := range ignored {
				ignored[i].Value = ignored[i].Value[:min(len(ignored[i].Value), shownValue)]
			}
			want := Assignment{Partition: tc.want, Ignored: ignored}
			got := c.Assign(s, ctr)
			got.Because = "" // see TestBecause
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
			if !Owned(tc.want) || len(tc.want) > maxName {
				t.Errorf("%q is not a name that we own and the kernel takes", tc.want)
			}
		})
	}
	t.Run("an empty value", func(t *testing.T) {
		c := Default()
		s, _ := inShop()
		want := Assignment{
			Partition: ofContainer, Because: AnnotationPartition + " is not known", Ignored: []Ignored{{AnnotationPartition, "", bad}},
		}
		if got := c.Assign(s, asking(AnnotationPartition, "")); !reflect.DeepEqual(got, want) {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
	})
}

// No two of these may be merged with each other, whoever chose the names.
func TestPartitionsApart(t *testing.T) {
	c := Default()
	c.PartitionBy = ScopeNamespace
	c.SharedGroups = map[string][]string{"open": {"*"}, "shop": {"shop", "bank"}}
	seen := map[string]string{}
	for _, namespace := range []string{"shop", "bank", "shop.web", "shopweb", "w", "shared group"} {
		for _, asked := range []string{"namespace", "group:web", "group:b", "group:shopweb", "group:eb"} {
			a := c.Assign(Sandbox{ID: podID, Namespace: namespace}, asking(AnnotationPartition, asked))
			who := namespace + " " + asked
			if other, taken := seen[a.Partition]; taken || a.Partition == "" {
				t.Errorf("%s and %s have %q", who, other, a.Partition)
			}
			seen[a.Partition] = who
		}
	}
	// One that may join a shared group has it with others, and one that may not has
	// not.
	of := func(namespace, asked string) string {
		return c.Assign(Sandbox{ID: podID, Namespace: namespace}, asking(AnnotationPartition, asked)).Partition
	}
	if of("shop", "group:shop") != of("bank", "group:shop") || of("w", "group:shop") == of("shop", "group:shop") ||
		of("w", "group:open") != of("bank", "group:open") || of("shop", "group:open") == of("shop", "group:shop") {
		t.Error("shared groups are not as the configuration has them")
	}
}

func TestWithoutPartition(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Config, *Sandbox, *Container)
		want   string // empty: it has one
	}{
		"no sandbox":   {func(_ *Config, s *Sandbox, _ *Container) { s.ID = "" }, "the runtime gave no sandbox id"},
		"no container": {func(_ *Config, _ *Sandbox, ctr *Container) { ctr.ID, ctr.CgroupsPath = "", "/" }, "the runtime gave no container id"},
		"shared cgroup": {func(_ *Config, _ *Sandbox, ctr *Container) { ctr.CgroupsPath = "/shared" },
			`its cgroup "/shared" is not named after the container, so that its processes cannot be told from others`},
		"cgroup below the container's": {func(_ *Config, _ *Sandbox, ctr *Container) { ctr.CgroupsPath = "/" + ctrID + "/sub" },
			`its cgroup "/` + ctrID + `/sub" is not named after the container, so that its processes cannot be told from others`},
		"systemd": {func(_ *Config, _ *Sandbox, ctr *Container) {
			ctr.CgroupsPath = "kubepods-pod1.slice:cri-containerd:" + ctrID
		}, ""},

		"host's processes": {func(_ *Config, _ *Sandbox, ctr *Container) { ctr.HostPID = true },
			"it sees the processes of the machine, and pods.hostPID of the configuration is false"},
		"host's processes, wanted": {func(c *Config, _ *Sandbox, ctr *Container) { ctr.HostPID, c.Pods.HostPID = true, true }, ""},
		"privileged": {func(_ *Config, _ *Sandbox, ctr *Container) { ctr.Privileged = true },
			"it is privileged, and pods.privileged of the configuration is false"},
		"privileged, wanted": {func(c *Config, _ *Sandbox, ctr *Container) { ctr.Privileged, c.Pods.Privileged = true, true }, ""},
		"system": {func(_ *Config, s *Sandbox, _ *Container) { s.Namespace = "kube-system" },
			`pods.namespaces.exclude of the configuration has its namespace "kube-system"`},
		"system, asking for it": {func(_ *Config, s *Sandbox, ctr *Container) {
			s.Namespace, ctr.Annotations = "kube-system", map[string]string{AnnotationMerge: "on"}
		}, `pods.namespaces.exclude of the configuration has its namespace "kube-system"`},
		"system, wanted": {func(c *Config, s *Sandbox, _ *Container) { s.Namespace, c.Pods = "kube-system", Pods{} }, ""},

		"namespace not included": {func(c *Config, _ *Sandbox, _ *Container) { c.Pods.Namespaces.Include = []string{"bank", "sho"} },
			`pods.namespaces.include of the configuration has not its namespace "shop"`},
		"namespace included": {func(c *Config, _ *Sandbox, _ *Container) { c.Pods.Namespaces.Include = []string{"bank", "sh*"} }, ""},
		"included and excluded": {func(c *Config, _ *Sandbox, _ *Container) {
			c.Pods.Namespaces = Rule{Include: []string{"*"}, Exclude: []string{"sh[o]p"}}
		}, `pods.namespaces.exclude of the configuration has its namespace "shop"`},
		"no namespace": {func(c *Config, s *Sandbox, _ *Container) { s.Namespace, c.PartitionBy = "", ScopeNamespace },
			"the runtime gave no namespace of its pod"},
		"no namespace, shared group": {func(c *Config, s *Sandbox, ctr *Container) {
			s.Namespace, c.SharedGroups, ctr.Annotations = "", map[string][]string{"web": {"*"}}, map[string]string{AnnotationPartition: "group:web"}
		}, "the runtime gave no namespace of its pod"},

		"handler excluded": {func(c *Config, s *Sandbox, _ *Container) {
			s.RuntimeHandler, c.Pods.RuntimeHandlers.Exclude = "kata-qemu", []string{"kata*"}
		}, `pods.runtimeHandlers.exclude of the configuration has its runtime handler "kata-qemu"`},
		"default handler not included": {func(c *Config, _ *Sandbox, _ *Container) { c.Pods.RuntimeHandlers.Include = []string{"runc"} },
			`pods.runtimeHandlers.include of the configuration has not its runtime handler ""`},
		"default handler included": {func(c *Config, _ *Sandbox, _ *Container) { c.Pods.RuntimeHandlers.Include = []string{"runc", ""} }, ""},

		"label excluded": {func(c *Config, s *Sandbox, _ *Container) {
			s.Labels, c.Pods.Labels.Exclude = map[string]string{"tier": "secret"}, []string{"app=*", "tier=se*"}
		}, "pods.labels.exclude of the configuration has a label of its pod"},
		"label not included": {func(c *Config, s *Sandbox, _ *Container) {
			s.Labels, c.Pods.Labels.Include = map[string]string{"app": "db"}, []string{"app=web", "db=*"}
		}, "pods.labels.include of the configuration has not a label of its pod"},
		"label included": {func(c *Config, s *Sandbox, _ *Container) {
			s.Labels, c.Pods.Labels.Include = map[string]string{"example.org/app": "web-1"}, []string{"example.org/app=web-*"}
		}, ""},
		"label without a value": {func(c *Config, s *Sandbox, _ *Container) {
			s.Labels, c.Pods.Labels.Include = map[string]string{"merge": ""}, []string{"merge="}
		}, ""},

		"off": {func(_ *Config, _ *Sandbox, ctr *Container) {
			ctr.Annotations = map[string]string{AnnotationMerge: "off"}
		},
			`merge.selective-ksm.dev is "off"`},
		"bad": {func(_ *Config, _ *Sandbox, ctr *Container) {
			ctr.Annotations = map[string]string{AnnotationMerge: "false"}
		},
			"merge.selective-ksm.dev is not known"},
		"not annotated": {func(c *Config, _ *Sandbox, _ *Container) { c.Pods.OnlyAnnotated = true },
			`pods.onlyAnnotated of the configuration leaves it out, as it has no annotation merge.selective-ksm.dev: "on"`},
		"annotated": {func(c *Config, _ *Sandbox, ctr *Container) {
			c.Pods.OnlyAnnotated, ctr.Annotations = true, map[string]string{AnnotationMerge: "on-demand"}
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			c := Default()
			s, ctr := inShop()
			tc.change(&c, &s, &ctr)
			a := c.Assign(s, ctr)
			if a.Reason != tc.want || (a.Partition == "") != (tc.want != "") {
				t.Errorf("got partition %q, reason %q, want %q", a.Partition, a.Reason, tc.want)
			}
		})
	}
}

// What a container asks for besides, and that what is wrong about it merges least and
// keeps it from nothing else.
func TestAskedFor(t *testing.T) {
	for name, tc := range map[string]struct {
		secrets   bool // of the configuration
		container Container
		want      Assignment
	}{
		"nothing":             {false, asking(), Assignment{}},
		"nothing, secrets":    {true, asking(), Assignment{Secrets: true}},
		"on":                  {false, asking(AnnotationMerge, "on"), Assignment{}},
		"on demand":           {false, asking(AnnotationMerge, "on-demand"), Assignment{OnDemand: true}},
		"interval":            {false, asking(AnnotationInterval, "90s"), Assignment{Interval: 90 * time.Second}},
		"secrets":             {false, asking(AnnotationIncludeSecrets, "true"), Assignment{Secrets: true}},
		"no secrets":          {true, asking(AnnotationIncludeSecrets, "false"), Assignment{}},
		"others' annotations": {false, asking("selective-ksm.dev", "x", "partition.example.org", "namespace"), Assignment{}},
		"all of it wrong": {true, asking(AnnotationInterval, "often", AnnotationIncludeSecrets, "yes", AnnotationPartition, "pods"), Assignment{
			Partition: ofContainer,
			Ignored: []Ignored{
				{AnnotationInterval, "often", "write a duration of 1s or more, such as 90s or 10m: until then that of the configuration holds"},
				{AnnotationIncludeSecrets, "yes", "write true or false: until then they are not merged"},
				{AnnotationPartition, "pods", "write container, pod, namespace or group:NAME: until then it is merged with itself alone"},
			},
		}},
		"interval too short": {false, asking(AnnotationInterval, "1ns"), Assignment{Ignored: []Ignored{
			{AnnotationInterval, "1ns", "write a duration of 1s or more, such as 90s or 10m: until then that of the configuration holds"},
		}}},
		"merge": {false, asking(AnnotationMerge, strings.Repeat("x", 1000)), Assignment{
			Reason: "merge.selective-ksm.dev is not known",
			Ignored: []Ignored{
				{AnnotationMerge, strings.Repeat("x", 64), "write on, on-demand or off: until then it is not merged"},
			},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			c := Default()
			c.Secrets = tc.secrets
			s, _ := inShop()
			want := tc.want
			if want.Partition == "" && want.Reason == "" {
				want.Partition = ofPod
			}
			if want.Reason != "" {
				want.Secrets = tc.secrets
			}
			got := c.Assign(s, tc.container)
			got.Because = "" // see TestBecause
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
		})
	}
}

// People are told what has chosen a partition.
func TestBecause(t *testing.T) {
	for name, tc := range map[string]struct {
		by    Scope
		asked string // of the partition's annotation, if anything
		want  string
	}{
		"the configuration":    {ScopePod, "", "partitionBy of the configuration is pod"},
		"an annotation":        {ScopeNamespace, "container", `partition.selective-ksm.dev is "container"`},
		"one that is too wide": {ScopePod, "namespace", "partitionBy of the configuration is pod"},
		"one that is wrong":    {ScopePod, "nmaespace", "partition.selective-ksm.dev is not known"},
		"a shared group": {ScopePod, "group:web",
			`partition.selective-ksm.dev is "group:web", and sharedGroups of the configuration has its namespace`},
	} {
		t.Run(name, func(t *testing.T) {
			c := Default()
			c.PartitionBy, c.SharedGroups = tc.by, map[string][]string{"web": {"shop"}}
			s, ctr := inShop()
			if tc.asked != "" {
				ctr = asking(AnnotationPartition, tc.asked)
			}
			if a := c.Assign(s, ctr); a.Because != tc.want {
				t.Errorf("because %q, want %q", a.Because, tc.want)
			}
		})
	}
}

// Whatever users write, two namespaces have a partition together only if the
// configuration lets both join, and nobody has a wider one than it says.
func FuzzAnnotations(f *testing.F) {
	for _, asked := range []string{"", "pod", "namespace", "group:web", "group:shared", "group:", "group:\x00", "container"} {
		f.Add(asked, "on", "10m", "true", "shop", "bank", uint8(3))
	}
	f.Add("group:web", "on-demand", "1ns", "no", "shop", "shop\x00web", uint8(2))
	f.Fuzz(func(t *testing.T, asked, merge, interval, secrets, namespace, other string, by uint8) {
		c := Default()
		c.PartitionBy = widths[int(by)%len(widths)]
		c.SharedGroups = map[string][]string{"shared": {"shop", "team-*"}}
		ctr := asking(AnnotationPartition, asked, AnnotationMerge, merge, AnnotationInterval, interval, AnnotationIncludeSecrets, secrets)
		of := func(namespace, id string) Assignment {
			one := ctr
			one.ID, one.CgroupsPath = id, "/"+id
			return c.Assign(Sandbox{ID: "sandbox of " + id, Namespace: namespace}, one)
		}
		a, b := of(namespace, "a"), of(other, "b")
		if (a.Partition == "") == (a.Reason == "") || a.Partition != "" && (!Owned(a.Partition) || len(a.Partition) > maxName) {
			t.Errorf("got %+v", a)
		}
		if a.Interval != 0 && a.Interval < minInterval {
			t.Errorf("interval is %v", a.Interval)
		}
		if a.Partition == "" || a.Partition != b.Partition {
			return
		}
		members := c.SharedGroups["shared"]
		switch joined := asked == "group:shared" && matchAny(members, namespace) && matchAny(members, other); {
		case joined:
		case namespace != other:
			t.Errorf("%q and %q have %s together", namespace, other, a.Partition)
		case c.PartitionBy == ScopeContainer || c.PartitionBy == ScopePod:
			t.Errorf("two pods have %s together by %s", a.Partition, c.PartitionBy)
		}
	})
}

func TestShortID(t *testing.T) {
	for id, want := range map[string]string{
		podID:                  "0123456789abcdef012345",
		"web":                  "4b5e57f6eb2f42b9039b3d",
		strings.ToUpper(podID): "0ea37c243f60974b0d54c6",
	} {
		if got := shortID(id); got != want {
			t.Errorf("%s is %s, want %s", id, got, want)
		}
	}
}

func TestOwned(t *testing.T) {
	for name, want := range map[string]bool{
		ofPod:                               true,
		ofContainer:                         true,
		ofShop:                              true,
		ofShopsWeb:                          true,
		"sksm-pod-0123456789abcdef01234":    false,
		"sksm-pod-0123456789abcdef0123456":  false,
		"sksm-pod-0123456789ABCDEF012345":   false,
		"sksm-vm-0123456789abcdef0123456":   false,
		"sksm-pod-0123456789abcdef012345\n": false,
		"sksm-grp-0123456789abcdef01234":    false,
		"sksm-ns-0123456789abcdef01234.":    false,
		"sksm-ns-0123456789abcdef0123456":   false,
		"control":                           false,
		"":                                  false,
	} {
		if Owned(name) != want {
			t.Errorf("Owned(%q) = %v", name, !want)
		}
	}
}

func TestAnnotationsAreAll(t *testing.T) {
	// Each of them changes what is assigned.
	values := map[string]string{
		AnnotationPartition: "container", AnnotationMerge: "off", AnnotationInterval: "1h", AnnotationIncludeSecrets: "true",
	}
	c := Default()
	s, ctr := inShop()
	for _, key := range Annotations() {
		if reflect.DeepEqual(c.Assign(s, ctr), c.Assign(s, asking(key, values[key]))) {
			t.Errorf("%s changes nothing", key)
		}
		delete(values, key)
	}
	if len(values) > 0 {
		t.Errorf("left out are %v", slices.Collect(maps.Keys(values)))
	}
}
