// Package e2e_test runs containers on a real containerd, with the plugin and a
// kernel that has partitions, and looks at their physical pages.
//
// The tests run as root in the test VM:
//
//	SELECTIVE_KSM_VM=1 go test -exec 'build/bin/vm -kernel ... --' ./test/e2e
//
// Anywhere else, those that need what is not there are skipped. With
// SELECTIVE_KSM_VM set they fail instead.
package e2e_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/test/e2e/border"
	"github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/e2e/plugin"
	"github.com/selective-ksm/selective-ksm/test/missing"
	"github.com/selective-ksm/selective-ksm/test/pages"
	"github.com/selective-ksm/selective-ksm/test/workload/control"
)

const (
	// dataMiB is what a container holds where its size does not matter.
	dataMiB = 16
	// least is how much of the identical data must be merged, in percent.
	least = 95
	// patience is for what takes a second or two, in a slow VM on a busy machine.
	patience = 3 * time.Minute
)

// build is where make puts what the tests run.
const build = "../../build"

// program is the product.
var program = filepath.Join(build, "bin/selective-ksm")

// needProgram is for tests that only run the program.
func needProgram(t *testing.T) {
	t.Helper()
	if _, err := os.Stat(program); err != nil {
		missing.Skip(t, "not built: %v", err)
	}
}

// needPartitions is for tests that need all of it: root, a kernel with
// partitions, and all programs.
func needPartitions(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		missing.Skip(t, "not root")
	}
	if !partition.Supported() {
		missing.Skip(t, "this kernel has no partitions in /sys/kernel/mm/ksm; make test boots one that has")
	}
	needProgram(t)
	for _, path := range []string{node.Built(build).Tools, node.Built(build).Workload} {
		if _, err := os.Stat(path); err != nil {
			missing.Skip(t, "not built: %v", err)
		}
	}
}

// shared is the containerd of all tests that start the plugin by itself.
var shared struct {
	once sync.Once
	node *node.Node
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if n := shared.node; n != nil {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := n.Stop(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}
	os.Exit(code)
}

// sharedNode returns a containerd without pods and without the plugin. What a
// test starts on it, the test removes.
func sharedNode(t *testing.T) *node.Node {
	t.Helper()
	needPartitions(t)
	shared.once.Do(func() { shared.node, shared.err = node.Start(deadline(t), node.Built(build)) })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(shared.node.Log())
		}
	})
	return shared.node
}

// deadline returns a context for one step of a test.
func deadline(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), patience, fmt.Errorf("not within %s", patience))
	t.Cleanup(cancel)
	return ctx
}

// tenant is a pod with its containers.
type tenant struct {
	*node.Pod
	containers []*node.Container
}

// ready is when the last of its containers had its memory filled.
func (p tenant) ready() time.Time {
	last := slices.MaxFunc(p.containers, func(a, b *node.Container) int { return a.Ready.Compare(b.Ready) })
	return last.Ready
}

// run runs a pod with containers, and removes it after the test if the test
// did not. guard, if not nil, watches each container from when it is ready.
func run(t *testing.T, n *node.Node, guard *border.Guard, pod string, containers ...node.ContainerConfig) tenant {
	t.Helper()
	p, err := n.RunPod(deadline(t), pod)
	if err != nil {
		t.Fatal(err)
	}
	removeAfter(t, p)
	one := tenant{Pod: p}
	for _, config := range containers {
		c, err := p.Start(deadline(t), config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if guard != nil {
			guard.Add(border.Process{Tenant: pod, Name: c.Name, PID: c.PID})
		}
		one.containers = append(one.containers, c)
	}
	return one
}

// removeAfter removes a pod after the test if the test did not.
func removeAfter(t *testing.T, p *node.Pod) {
	t.Helper()
	t.Cleanup(func() {
		// Removing a pod a second time is no error.
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := p.Remove(ctx); err != nil {
			t.Error(err)
		}
	})
}

// startPlugin starts the plugin against a containerd, and stops it after the
// test if the test did not.
func startPlugin(t *testing.T, n *node.Node, config string) *plugin.Process {
	t.Helper()
	return startPluginAt(t, n.NRISocket(), config)
}

// startPluginAt does that by the socket of a runtime.
func startPluginAt(t *testing.T, socket, config string) *plugin.Process {
	t.Helper()
	p, err := plugin.Start(deadline(t), program, configFile(t, config), socket)
	if err != nil {
		t.Fatal(err)
	}
	stopAfter(t, p)
	return p
}

// poll looks again and again until a function says no more what it waits for: it is for
// what nobody tells of.
func poll(t *testing.T, look func(ctx context.Context) (waitsFor string)) {
	t.Helper()
	ctx := deadline(t)
	// What looks takes the time of what it waits for.
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		waitsFor := look(ctx)
		if waitsFor == "" {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: %v", waitsFor, context.Cause(ctx))
		}
	}
}

// waitFor polls until something is so.
func waitFor(t *testing.T, what string, so func() bool) {
	t.Helper()
	poll(t, func(context.Context) string {
		if so() {
			return ""
		}
		return "waiting for " + what
	})
}

// stopAfter stops a plugin after the test.
func stopAfter(t *testing.T, p *plugin.Process) {
	t.Helper()
	t.Cleanup(func() {
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(p.Log())
		}
	})
}

// merged waits for a merge of all containers of a partition that began after
// since.
func merged(t *testing.T, p *plugin.Process, since time.Time, containers ...*node.Container) {
	t.Helper()
	var ids []string
	for _, c := range containers {
		ids = append(ids, c.ID)
	}
	if _, err := p.Merged(deadline(t), since, ids...); err != nil {
		t.Fatalf("merge of pod %s: %v", containers[0].Pod.Name, err)
	}
}

// common returns how many merged physical pages the data of two containers
// share, and how many pages the data of the first has.
func common(t *testing.T, a, b *node.Container) (together, all int) {
	t.Helper()
	inA, err := pages.Range(a.PID, a.Hello.Start, a.Hello.End)
	if err != nil {
		t.Fatal(err)
	}
	inB, err := pages.Range(b.PID, b.Hello.Start, b.Hello.End)
	if err != nil {
		t.Fatal(err)
	}
	together, err = pages.Merged(inA, inB)
	if err != nil {
		t.Fatal(err)
	}
	return together, len(inA)
}

// wantMerged fails the test if less of the data of two containers is merged
// than must be.
func wantMerged(t *testing.T, a, b *node.Container) {
	t.Helper()
	together, all := common(t, a, b)
	t.Logf("%s: %s and %s share %d of %d pages", a.Pod.Name, a.Name, b.Name, together, all)
	if together*100 < all*least {
		t.Errorf("%s: %s and %s share %d of %d pages, less than %d %%", a.Pod.Name, a.Name, b.Name, together, all, least)
	}
}

// waitMerged waits until the data of two containers is merged. It polls the page
// tables, for where no log tells.
func waitMerged(t *testing.T, a, b *node.Container) {
	t.Helper()
	data := int(a.Hello.End-a.Hello.Start) / os.Getpagesize()
	poll(t, func(context.Context) string {
		together, present := common(t, a, b)
		if present < data {
			// Some is swapped out, and comes back when it is looked at.
			unchanged(t, a, b)
			together, _ = common(t, a, b)
		}
		if together*100 < data*least {
			return fmt.Sprintf("%s: %s and %s share %d of %d pages", a.Pod.Name, a.Name, b.Name, together, data)
		}
		return ""
	})
}

// do sends a request to all containers, and fails the test if one finds data
// that it did not write.
func do(t *testing.T, q control.Request, containers ...*node.Container) []control.Reply {
	t.Helper()
	var replies []control.Reply
	for _, c := range containers {
		r, err := c.Do(deadline(t), q)
		if err != nil {
			t.Fatalf("%s/%s: %v\n%s", c.Pod.Name, c.Name, err, c.Pod.Output(c.Name))
		}
		replies = append(replies, r)
	}
	return replies
}

// unchanged fails the test if the data of a container is not what it was
// filled with.
func unchanged(t *testing.T, containers ...*node.Container) {
	t.Helper()
	for i, r := range do(t, control.Request{Op: control.Check}, containers...) {
		if c := containers[i]; r.Sum != c.Hello.Sum {
			t.Errorf("%s/%s: data sums to %#x, to %#x at first", c.Pod.Name, c.Name, r.Sum, c.Hello.Sum)
		}
	}
}

// stopGuard ends a watch that must have found nothing.
func stopGuard(t *testing.T, g *border.Guard) {
	t.Helper()
	g.Sweep()
	sweeps, found, err := g.Stop()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("looked %d times for a page in two tenants", sweeps)
	if len(found) > 0 {
		t.Errorf("%d crossings, the first: %s", len(found), found[0])
	}
}

// noPartitions fails the test if partitions stay.
func noPartitions(t *testing.T) {
	t.Helper()
	if err := partition.WaitFor(deadline(t)); err != nil {
		t.Error(err)
	}
}

func web(seed uint64) node.ContainerConfig {
	return node.ContainerConfig{Name: "web", MiB: dataMiB, Seed: seed}
}

func worker(seed uint64) node.ContainerConfig {
	return node.ContainerConfig{Name: "worker", MiB: dataMiB, Seed: seed}
}

const (
	// never merges nothing, so that containers can fill their memory.
	never = "startDelays: []\ninterval: 1000h\n" + always
	// once merges what runs, and each container that starts, one time.
	once = "startDelays: [0s]\ninterval: 1000h\n" + always
	// often merges a container again and again.
	often = "startDelays: [0s, 1s]\ninterval: 1s\n" + always
	// always merges as fast as it can be done, and at no other times, however short
	// of memory the VM is.
	always = "budget: 200%\npartitionBudget: 100%\npressure: off\nlogFormat: json\n"
)

// replace stops a plugin and starts another one, which takes over.
func replace(t *testing.T, n *node.Node, p *plugin.Process, config string) *plugin.Process {
	t.Helper()
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	return startPlugin(t, n, config)
}

// The first merge finds all there is to merge, inside the pods and nowhere
// else. All of the data is there before it begins.
func TestFirstMerge(t *testing.T) {
	n := sharedNode(t)
	p := startPlugin(t, n, never)
	guard := border.Watch()
	const size = 32
	shop := run(t, n, guard, "shop",
		node.ContainerConfig{Name: "web", MiB: size, Seed: 1}, node.ContainerConfig{Name: "worker", MiB: size, Seed: 1})
	bank := run(t, n, guard, "bank",
		node.ContainerConfig{Name: "web", MiB: size, Seed: 1}, node.ContainerConfig{Name: "worker", MiB: size, Seed: 1})
	all := slices.Concat(shop.containers, bank.containers)
	for _, c := range all {
		if c.Hello.Sum != all[0].Hello.Sum {
			t.Fatalf("%s/%s does not hold the same data", c.Pod.Name, c.Name)
		}
	}
	for _, pod := range []tenant{shop, bank} {
		scanned, err := partition.Counter(partition.OfPod(pod.ID), "pages_scanned")
		if err != nil {
			t.Fatal(err)
		}
		if scanned != 0 {
			t.Errorf("%s: %d pages were looked at before the first merge", pod.Name, scanned)
		}
	}
	p = replace(t, n, p, once)
	for _, pod := range []tenant{shop, bank} {
		merged(t, p, pod.ready(), pod.containers...)
		wantMerged(t, pod.containers[0], pod.containers[1])
		shared, err := partition.Counter(partition.OfPod(pod.ID), "pages_sharing")
		if err != nil {
			t.Fatal(err)
		}
		// The containers' other memory may hold equal pages too.
		if _, pages := common(t, pod.containers[0], pod.containers[1]); shared*100 < pages*least {
			t.Errorf("%s: the partition counts %d pages saved, of %d", pod.Name, shared, pages)
		}
	}
	unchanged(t, all...)
	if lines := p.Lines(func(l plugin.Line) bool { return l.Message == "merged" }); len(lines) != len(all) {
		t.Errorf("%d containers were merged %d times, not once each", len(all), len(lines))
	}

	// An upgrade costs nothing: what is merged stays so while the plugin is away.
	counts := map[string]int{}
	count := func(pod tenant) int {
		t.Helper()
		n, err := partition.Counter(partition.OfPod(pod.ID), "pages_sharing")
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, pod := range []tenant{shop, bank} {
		counts[pod.ID] = count(pod)
	}
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, pod := range []tenant{shop, bank} {
		// Some of what is not their data may have been written to.
		if n := count(pod); n*100 < counts[pod.ID]*least {
			t.Errorf("%s: %d pages are saved without the plugin, %d with it", pod.Name, n, counts[pod.ID])
		}
		wantMerged(t, pod.containers[0], pod.containers[1])
	}
	startPlugin(t, n, never)

	// Unmerged, each has its own pages again, with the same data.
	for _, c := range shop.containers {
		if err := partition.Unmerge(partition.OfPod(shop.ID), c.PID); err != nil {
			t.Fatal(err)
		}
	}
	if together, _ := common(t, shop.containers[0], shop.containers[1]); together != 0 {
		t.Errorf("%d pages are shared after unmerge", together)
	}
	wantMerged(t, bank.containers[0], bank.containers[1])
	unchanged(t, all...)
	stopGuard(t, guard)

	// The partition lives as long as the pod's last container.
	if err := shop.containers[0].Stop(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if err := partition.WaitFor(deadline(t), partition.OfPod(shop.ID), partition.OfPod(bank.ID)); err != nil {
		t.Error(err)
	}
	unchanged(t, shop.containers[1])
	for _, pod := range []tenant{shop, bank} {
		if err := pod.Remove(deadline(t)); err != nil {
			t.Error(err)
		}
	}
	noPartitions(t)
}

// Containers write to their memory while it is merged, again and again.
func TestWritesDuringMerges(t *testing.T) {
	n := sharedNode(t)
	p := startPlugin(t, n, often)
	guard := border.Watch()
	shop := run(t, n, guard, "shop", web(1), worker(1))
	bank := run(t, n, guard, "bank", web(1), worker(1))
	all := slices.Concat(shop.containers, bank.containers)

	// Half of each container's data is written, the other half stays merged.
	pages := dataMiB << 20 / os.Getpagesize()
	do(t, control.Request{Op: control.Churn, First: 0, Count: pages / 2, Seed: 5}, all...)
	// One merge to be sure that there was writing from its beginning to its
	// end, and one more.
	for range 2 {
		began := time.Now()
		merged(t, p, began, shop.containers...)
		merged(t, p, began, bank.containers...)
	}
	for i, r := range do(t, control.Request{Op: control.Settle}, all...) {
		t.Logf("%s/%s wrote and checked %d times", all[i].Pod.Name, all[i].Name, r.Rounds)
		if r.Rounds == 0 {
			t.Errorf("%s/%s never wrote while it was merged", all[i].Pod.Name, all[i].Name)
		}
	}

	// What is equal again is merged again.
	for i, r := range do(t, control.Request{Op: control.Write, First: 0, Count: pages / 2, Seed: 1}, all...) {
		if r.Sum != all[i].Hello.Sum {
			t.Errorf("%s/%s: data sums to %#x, to %#x at first", all[i].Pod.Name, all[i].Name, r.Sum, all[i].Hello.Sum)
		}
	}
	written := time.Now()
	merged(t, p, written, shop.containers...)
	merged(t, p, written, bank.containers...)
	wantMerged(t, shop.containers[0], shop.containers[1])
	wantMerged(t, bank.containers[0], bank.containers[1])
	unchanged(t, all...)
	stopGuard(t, guard)
}

// Each container is a tenant of its own: it is merged with itself alone.
func TestPartitionByContainer(t *testing.T) {
	n := sharedNode(t)
	p := startPlugin(t, n, "partitionBy: container\n"+never)
	guard := border.Watch()
	config := func(name string) node.ContainerConfig {
		return node.ContainerConfig{Name: name, MiB: dataMiB, Seed: 1, Repeat: true}
	}
	shop := run(t, n, nil, "shop", config("web"), config("worker"))
	for _, c := range shop.containers {
		guard.Add(border.Process{Tenant: c.Name, Name: c.Name, PID: c.PID})
	}
	first, second := shop.containers[0], shop.containers[1]
	if err := partition.WaitFor(deadline(t), partition.OfContainer(first.ID), partition.OfContainer(second.ID)); err != nil {
		t.Error(err)
	}
	p = replace(t, n, p, "partitionBy: container\n"+once)
	for _, c := range shop.containers {
		merged(t, p, c.Ready, c)
		middle := c.Hello.Start + (c.Hello.End-c.Hello.Start)/2
		one, err := pages.Range(c.PID, c.Hello.Start, middle)
		if err != nil {
			t.Fatal(err)
		}
		other, err := pages.Range(c.PID, middle, c.Hello.End)
		if err != nil {
			t.Fatal(err)
		}
		together, err := pages.Merged(one, other)
		if err != nil {
			t.Fatal(err)
		}
		if together*100 < len(one)*least {
			t.Errorf("%s: its two halves share %d of %d pages, less than %d %%", c.Name, together, len(one), least)
		}
	}
	unchanged(t, shop.containers...)
	stopGuard(t, guard)

	if err := first.Stop(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if err := partition.WaitFor(deadline(t), partition.OfContainer(second.ID)); err != nil {
		t.Error(err)
	}
	if err := shop.Remove(deadline(t)); err != nil {
		t.Error(err)
	}
	noPartitions(t)
}

// The plugin dies in the middle of a merge; pods come to an end while it is
// away; it comes back.
func TestPluginKilled(t *testing.T) {
	n := sharedNode(t)
	p := startPlugin(t, n, never)
	guard := border.Watch()
	// Enough for a merge to take several turns, of which each uses the budget of seconds.
	const size = 32
	const slowly = "startDelays: [0s]\ninterval: 1000h\nbudget: 200%\npartitionBudget: 2%\nbudgetWindow: 1s\npressure: off\nlogFormat: json\n"
	one := run(t, n, guard, "shop",
		node.ContainerConfig{Name: "web", MiB: size, Seed: 1}, node.ContainerConfig{Name: "worker", MiB: size, Seed: 1})
	other := run(t, n, guard, "bank",
		node.ContainerConfig{Name: "web", MiB: size, Seed: 1}, node.ContainerConfig{Name: "worker", MiB: size, Seed: 1})

	p = replace(t, n, p, slowly)
	// The pod that is being merged stays, the other one goes.
	if !mergeBegun(t, partition.OfPod(one.ID), partition.OfPod(other.ID)) {
		one, other = other, one
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	together, pages := common(t, one.containers[0], one.containers[1])
	t.Logf("killed with %d of %d pages merged in %s", together, pages, one.Name)
	if together == 0 || together == pages {
		t.Error("that was not in the middle of a merge")
	}
	unchanged(t, slices.Concat(one.containers, other.containers)...)

	if err := other.Remove(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if err := partition.WaitFor(deadline(t), partition.OfPod(one.ID), partition.OfPod(other.ID)); err != nil {
		t.Fatalf("while the plugin is away: %v", err)
	}
	p = startPlugin(t, n, often)
	if err := partition.WaitFor(deadline(t), partition.OfPod(one.ID)); err != nil {
		t.Errorf("after the plugin came back: %v", err)
	}
	merged(t, p, time.Now(), one.containers...)
	wantMerged(t, one.containers[0], one.containers[1])
	unchanged(t, one.containers...)
	stopGuard(t, guard)
	if err := one.Remove(deadline(t)); err != nil {
		t.Error(err)
	}
	noPartitions(t)
}

// begun is how many pages a merge has saved that is well under way, and more
// than a container has equal pages of its own.
const begun = 512

// mergeBegun waits until the merge of one of two partitions is under way, and
// tells whether it is the first's. It polls: a counter that changes wakes
// nobody.
func mergeBegun(t *testing.T, first, second string) bool {
	t.Helper()
	ctx := deadline(t)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		for _, name := range []string{first, second} {
			n, err := partition.Counter(name, "pages_sharing")
			if err != nil {
				t.Fatal(err)
			}
			if n >= begun {
				return name == first
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("no merge began: %v", context.Cause(ctx))
		}
	}
}

// startNode starts a containerd for one test.
func startNode(t *testing.T, config node.Config) *node.Node {
	t.Helper()
	n, err := node.Start(deadline(t), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(n.Log())
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := n.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	return n
}

// containerd launches the plugin by itself, from its plugin directory, and keeps
// nothing of what it writes.
func TestLaunchedByContainerd(t *testing.T) {
	needPartitions(t)
	log := filepath.Join(t.TempDir(), "selective-ksm.log")
	config := node.Built(build)
	config.Plugin, config.PluginName, config.PluginConfig = program, plugin.Index+"-"+plugin.Name, often+"logFile: "+log+"\n"
	n := startNode(t, config)
	shop := run(t, n, nil, "shop", web(1), worker(1))
	waitMerged(t, shop.containers[0], shop.containers[1])
	unchanged(t, shop.containers...)
	if err := shop.Remove(deadline(t)); err != nil {
		t.Error(err)
	}
	noPartitions(t)
	said, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"synchronized with the runtime", shop.containers[0].ID} {
		if !strings.Contains(string(said), want) {
			t.Errorf("%q is not in its log:\n%s", want, said)
		}
	}
}

// However much is merged, the plugin answers the runtime long before that would
// disconnect it.
func TestAnswersInTime(t *testing.T) {
	needPartitions(t)
	config := node.Built(build)
	config.PluginTimeout = node.DefaultPluginTimeout
	n := startNode(t, config)
	p := startPlugin(t, n, often+"logLevel: debug\n")
	const pods = 3
	var all []*node.Container
	for i := range pods {
		pod := run(t, n, nil, fmt.Sprintf("pod%d", i), web(1), worker(1))
		// There is always more to merge while the next ones are created.
		do(t, control.Request{Op: control.Churn, Count: dataMiB << 20 / os.Getpagesize(), Seed: uint64(i)}, pod.containers...)
		all = append(all, pod.containers...)
	}
	for c := range slices.Chunk(all, 2) {
		merged(t, p, time.Now(), c...)
	}
	do(t, control.Request{Op: control.Settle}, all...)
	for c := range slices.Chunk(all, 2) {
		if err := c[0].Pod.Remove(deadline(t)); err != nil {
			t.Error(err)
		}
	}
	noPartitions(t)

	answers := map[string]int{}
	var slowest plugin.Line
	for _, l := range p.Lines(func(l plugin.Line) bool { return l.Event != "" }) {
		answers[l.Event]++
		if l.DurationMS > slowest.DurationMS {
			slowest = l
		}
	}
	t.Logf("answered %v; the slowest was %s, in %s", answers, slowest.Event, slowest.Took())
	if slowest.Took() > node.DefaultPluginTimeout/2 {
		t.Errorf("%s took %s to answer, and has %s", slowest.Event, slowest.Took(), node.DefaultPluginTimeout)
	}
	if answers["CreateContainer"] != len(all) {
		t.Errorf("%d containers were created, %d seen", len(all), answers["CreateContainer"])
	}
	// A plugin that was disconnected connects again, and is synchronized anew.
	if answers["Synchronize"] != 1 {
		t.Errorf("the plugin was synchronized %d times", answers["Synchronize"])
	}
}
