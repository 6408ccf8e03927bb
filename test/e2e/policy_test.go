package e2e_test

import (
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/test/e2e/border"
	"github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/e2e/plugin"
	"github.com/selective-ksm/selective-ksm/test/pages"
)

// governed is a container of which policy says whom it is merged with.
type governed struct {
	*node.Container
	// tenant is what those have in common that are merged with each other. It is empty
	// if it is merged with nobody, not even with itself.
	tenant string
	// narrowed is the same where the configuration says partitionBy: pod.
	narrowed string
	// onDemand is that it is merged when it is asked for.
	onDemand bool
}

func (g governed) halves(t *testing.T) (first, second []pages.Page) {
	t.Helper()
	middle := g.Hello.Start + (g.Hello.End-g.Hello.Start)/2
	first, err := pages.Range(g.PID, g.Hello.Start, middle)
	if err != nil {
		t.Fatal(err)
	}
	second, err = pages.Range(g.PID, middle, g.Hello.End)
	if err != nil {
		t.Fatal(err)
	}
	return first, second
}

func (g governed) name() string { return g.Pod.Name + "/" + g.Name }

// wantTenants looks at the physical pages of all containers, whose data is the same:
// those of one tenant share it, and no others do. Half of each container's own data
// is equal to the other half, so that one that is merged with nobody else shows it.
func wantTenants(t *testing.T, all []governed) {
	t.Helper()
	var first, second [][]pages.Page
	for _, g := range all {
		a, b := g.halves(t)
		first, second = append(first, a), append(second, b)
	}
	pairs := 0
	for i, a := range all {
		for j, b := range all[:i+1] {
			other := first[j]
			if i == j {
				other = second[j]
			}
			together, err := pages.Merged(first[i], other)
			if err != nil {
				t.Fatal(err)
			}
			pairs++
			switch same := a.tenant != "" && a.tenant == b.tenant; {
			case same && together*100 < len(first[i])*least:
				t.Errorf("%s and %s share %d of %d pages, less than %d %%", a.name(), b.name(), together, len(first[i]), least)
			case !same && together > 0:
				t.Errorf("%s and %s share %d pages, and should none", a.name(), b.name(), together)
			}
		}
	}
	t.Logf("looked at %d pairs of %d containers", pairs, len(all))
}

// waitTenants waits until each tenant's containers were merged.
func waitTenants(t *testing.T, p *plugin.Process, since time.Time, all []governed) {
	t.Helper()
	tenants := map[string][]*node.Container{}
	for _, g := range all {
		if g.tenant != "" && !g.onDemand {
			tenants[g.tenant] = append(tenants[g.tenant], g.Container)
		}
	}
	for _, containers := range tenants {
		merged(t, p, since, containers...)
	}
}

// wantPartitions fails the test unless the partitions are those that the plugin wrote
// to the containers, one for each tenant.
func wantPartitions(t *testing.T, all []governed) {
	t.Helper()
	of := map[string]string{}
	for _, g := range all {
		name := g.Annotations["selective-ksm.dev/partition"]
		switch {
		case (g.tenant == "") != (name == "") || name != "" && g.Annotations["selective-ksm.dev/interface"] != "sysfs":
			t.Errorf("%s is of %q, and its annotations are %v", g.name(), g.tenant, g.Annotations)
		case name == "":
		case of[g.tenant] != "" && of[g.tenant] != name:
			t.Errorf("%s is in %s, others of its tenant are in %s", g.name(), name, of[g.tenant])
		default:
			of[g.tenant] = name
		}
	}
	if err := partition.WaitFor(deadline(t), slices.Collect(maps.Values(of))...); err != nil {
		t.Error(err)
	}
}

// What programs have marked as secret is merged where an annotation says so, and nowhere
// else.
func TestSecrets(t *testing.T) {
	n := sharedNode(t)
	p := startPlugin(t, n, once)
	shared := map[string]bool{"kept": false, "given": true}
	for name, given := range shared {
		config := node.PodConfig{Name: name}
		if given {
			config.Annotations = map[string]string{"include-secrets.selective-ksm.dev": "true"}
		}
		pod, err := n.RunPodWith(deadline(t), config)
		if err != nil {
			t.Fatal(err)
		}
		removeAfter(t, pod)
		one := tenant{Pod: pod}
		for _, container := range []string{"web", "worker"} {
			c, err := pod.Start(deadline(t), node.ContainerConfig{Name: container, MiB: 8, Seed: 1, Secret: true})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			one.containers = append(one.containers, c)
		}
		// That of the start may have come before the memory was filled.
		if out, err := exec.CommandContext(deadline(t), program, "merge", partition.OfPod(pod.ID)).CombinedOutput(); err != nil {
			t.Fatalf("merge: %v\n%s", err, out)
		}
		merged(t, p, one.ready(), one.containers...)
		together, all := common(t, one.containers[0], one.containers[1])
		if given && together*100 < all*least || !given && together > 0 {
			t.Errorf("%s: %d of %d secret pages are shared", name, together, all)
		}
		unchanged(t, one.containers...)
		if err := pod.Remove(deadline(t)); err != nil {
			t.Error(err)
		}
	}
	noPartitions(t)
}

// Who is merged with whom, by the configuration and by annotations, among them those
// that ask for the group of another namespace.
func TestPolicy(t *testing.T) {
	n := sharedNode(t)
	const (
		rules = "pods: {namespaces: {exclude: [kube-system, skip-*]}, runtimeHandlers: {include: ['', runc*]}, labels: {exclude: [merge=no*]}}\n"
		rest  = "sharedGroups: {open: [shop, bank]}\n" + rules +
			"startDelays: [0s]\ninterval: 1s\nmaxInterval: 1s\n" + always
		wide, narrow = "partitionBy: namespace\n" + rest, "partitionBy: pod\n" + rest
	)
	path := configFile(t, wide)
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	start := func() *plugin.Process {
		t.Helper()
		p, err := plugin.Start(deadline(t), program, path, n.NRISocket())
		if err != nil {
			t.Fatal(err)
		}
		stopAfter(t, p)
		return p
	}
	p := start()

	// asks makes annotations of their names, such as "partition", and their values.
	asks := func(pairs ...string) map[string]string {
		annotations := map[string]string{}
		for pair := range slices.Chunk(pairs, 2) {
			name, of, _ := strings.Cut(pair[0], "/")
			key := name + ".selective-ksm.dev"
			if of != "" {
				key += "/" + of
			}
			annotations[key] = pair[1]
		}
		return annotations
	}
	const itself = "itself"
	var all []governed
	for _, one := range []struct {
		pod node.PodConfig
		// containers and who they are merged with, by the wide configuration and by the
		// narrow one.
		containers, tenants, narrowed []string
		reason                        string // why it is not merged
	}{
		{pod: node.PodConfig{Name: "plain-1", Namespace: "shop"}, tenants: []string{"shop"}},
		{pod: node.PodConfig{Name: "plain-2", Namespace: "shop", SharedPID: true}, tenants: []string{"shop"}},
		{pod: node.PodConfig{Name: "plain", Namespace: "bank"}, tenants: []string{"bank"}},
		{pod: node.PodConfig{Name: "group-1", Namespace: "shop", Annotations: asks("partition", "group:web")}, tenants: []string{"shop's web"}},
		{pod: node.PodConfig{Name: "group-2", Namespace: "shop", Annotations: asks("partition/pod", "group:web")}, tenants: []string{"shop's web"}},
		{pod: node.PodConfig{Name: "thief-1", Namespace: "bank", Annotations: asks("partition", "group:web")}, tenants: []string{itself}},
		{pod: node.PodConfig{Name: "open-1", Namespace: "shop", Annotations: asks("partition", "group:open")}, tenants: []string{"open"}, narrowed: []string{"open"}},
		{pod: node.PodConfig{Name: "open-2", Namespace: "bank", Annotations: asks("partition", "group:open")}, tenants: []string{"open"}, narrowed: []string{"open"}},
		{pod: node.PodConfig{Name: "thief-2", Namespace: "evil", Annotations: asks("partition", "group:open")}, tenants: []string{itself}},
		{pod: node.PodConfig{Name: "pod", Namespace: "shop", Annotations: asks("partition", "pod", "interval", "1s")},
			containers: []string{"web", "worker"}, tenants: []string{"shop/pod", "shop/pod"}, narrowed: []string{"shop/pod", "shop/pod"}},
		{pod: node.PodConfig{Name: "one", Namespace: "shop", Annotations: asks("partition/container.web", "container", "partition", "pod")},
			containers: []string{"web", "worker"}, tenants: []string{itself, itself}},
		{pod: node.PodConfig{Name: "typo", Namespace: "shop", Annotations: asks("partition", "nmaespace")}, tenants: []string{itself}},
		{pod: node.PodConfig{Name: "bad-interval", Namespace: "shop", Annotations: asks("interval", "often")}, tenants: []string{"shop"}},
		{pod: node.PodConfig{Name: "bad-secrets", Namespace: "shop", Annotations: asks("include-secrets", "maybe")}, tenants: []string{"shop"}},
		{pod: node.PodConfig{Name: "bad-merge", Namespace: "shop", Annotations: asks("merge", "maybe")}, reason: "merge.selective-ksm.dev is not known"},
		{pod: node.PodConfig{Name: "asked", Namespace: "shop", Annotations: asks("merge", "on", "partition", "pod")}, tenants: []string{itself}},
		{pod: node.PodConfig{Name: "picked", Namespace: "shop", Labels: map[string]string{"pick": "me-too"}, Annotations: asks("partition", "pod")}, tenants: []string{itself}},
		{pod: node.PodConfig{Name: "demand", Namespace: "shop", Annotations: asks("merge", "on-demand", "partition", "pod")}, tenants: []string{itself}},
		{pod: node.PodConfig{Name: "off", Namespace: "shop", Annotations: asks("merge", "off")}, reason: `merge.selective-ksm.dev is "off"`},
		{pod: node.PodConfig{Name: "label", Namespace: "shop", Labels: map[string]string{"merge": "nothing"}}, reason: "pods.labels.exclude"},
		{pod: node.PodConfig{Name: "skipped", Namespace: "skip-me"}, reason: "pods.namespaces.exclude"},
		{pod: node.PodConfig{Name: "system", Namespace: "kube-system", Annotations: asks("merge", "on")}, reason: "pods.namespaces.exclude"},
		{pod: node.PodConfig{Name: "host", Namespace: "shop", HostPID: true}, reason: "pods.hostPID"},
		{pod: node.PodConfig{Name: "root", Namespace: "shop", Privileged: true}, reason: "pods.privileged"},
	} {
		pod, err := n.RunPodWith(deadline(t), one.pod)
		if err != nil {
			t.Fatal(err)
		}
		removeAfter(t, pod)
		if one.containers == nil {
			one.containers = []string{"web"}
		}
		for i, name := range one.containers {
			c, err := pod.Start(deadline(t), node.ContainerConfig{Name: name, MiB: 8, Seed: 1, Repeat: true})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			g := governed{Container: c, onDemand: one.pod.Name == "demand"}
			if one.reason == "" {
				// Of those that the test names nobody, each is alone.
				g.tenant, g.narrowed = one.tenants[i], one.pod.Name+"/"+name
				if g.tenant == itself {
					g.tenant = g.narrowed
				}
				if one.narrowed != nil {
					g.narrowed = one.narrowed[i]
				}
			}
			if got := c.Annotations["selective-ksm.dev/not-merged"]; !strings.Contains(got, one.reason) || (got == "") != (one.reason == "") {
				t.Errorf("%s is not merged because %q, want %q", g.name(), got, one.reason)
			}
			all = append(all, g)
		}
	}
	guard := border.Watch()
	for _, g := range all {
		tenant := g.tenant
		if tenant == "" {
			tenant = g.name()
		}
		guard.Add(border.Process{Tenant: tenant, Name: g.name(), PID: g.PID})
	}
	waitTenants(t, p, time.Now(), all)
	demanded := func(g governed) bool { return g.onDemand }
	i := slices.IndexFunc(all, demanded)
	first, second := all[i].halves(t)
	if together, err := pages.Merged(first, second); together != 0 || err != nil {
		t.Errorf("%s shares %d pages before it was asked for, %v", all[i].name(), together, err)
	}
	if out, err := exec.CommandContext(deadline(t), program, "merge", all[i].Annotations["selective-ksm.dev/partition"]).CombinedOutput(); err != nil {
		t.Fatalf("merge: %v\n%s", err, out)
	}
	if _, err := p.Merged(deadline(t), all[i].Ready, all[i].ID); err != nil {
		t.Fatal(err)
	}
	wantTenants(t, all)
	wantPartitions(t, all)
	bad := func(l plugin.Line) bool { return strings.HasPrefix(l.Message, "annotation does not count") }
	var pods []string
	for _, l := range p.Lines(bad) {
		pods = append(pods, l.Pod)
	}
	if slices.Sort(pods); !slices.Equal(pods, []string{"bad-interval", "bad-merge", "bad-secrets", "typo"}) {
		t.Errorf("annotations that do not count are those of %q", pods)
	}

	// Another one finds the same names.
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	p = start()
	waitTenants(t, p, time.Now(), all)
	wantTenants(t, all)
	wantPartitions(t, all)
	stopGuard(t, guard)

	// The configuration changes, for those that run too.
	outcome := func(n int, message string) {
		t.Helper()
		if _, err := p.Wait(deadline(t), n, func(l plugin.Line) bool { return l.Message == message }); err != nil {
			t.Fatal(err)
		}
	}
	const yes, no = "configuration is reloaded", "configuration is not reloaded, and stays as it was"
	write(narrow)
	outcome(1, yes)
	since := time.Now()
	for i := range all {
		all[i].tenant = all[i].narrowed
	}
	waitTenants(t, p, since, all)
	wantTenants(t, all)
	if lines := p.Lines(bad); len(lines) != 8 {
		t.Errorf("annotations that do not count: %v", lines)
	}
	there, err := partition.List()
	if err != nil {
		t.Fatal(err)
	}

	write("partitionBy: node\n")
	outcome(1, no)
	write(narrow)
	outcome(2, yes)
	if err := p.Reload(); err != nil {
		t.Fatal(err)
	}
	outcome(3, yes)
	if err := partition.WaitFor(deadline(t), there...); err != nil {
		t.Error(err)
	}

	// What it leaves out now is unmerged, and merged again when it does not.
	for i, other := range []struct{ rules, stay string }{
		{"onlyAnnotated: true", "asked demand"},
		{"labels: {include: [pick=me*]}", "picked"},
		{"runtimeHandlers: {include: [kata*]}", ""},
	} {
		write(strings.Replace(narrow, rules, "pods: {"+other.rules+"}\n", 1))
		outcome(4+i, yes)
		since := time.Now()
		var stay []string
		for i, g := range all {
			all[i].tenant = ""
			if slices.Contains(strings.Fields(other.stay), g.Pod.Name) {
				all[i].tenant = g.narrowed
				stay = append(stay, partition.OfPod(g.Pod.ID))
			}
		}
		if err := partition.WaitFor(deadline(t), stay...); err != nil {
			t.Errorf("%s: %v", other.rules, err)
		}
		waitTenants(t, p, since, all)
		wantTenants(t, all)
	}
	for _, g := range all {
		unchanged(t, g.Container)
	}
	for _, g := range all {
		if err := g.Pod.Remove(deadline(t)); err != nil {
			t.Error(err)
		}
	}
	noPartitions(t)
}
