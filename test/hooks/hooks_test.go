// Package hooks tests the hooks under the runtimes that call them. It needs what make
// has built, and the runtimes.
package hooks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/test/e2e/border"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/missing"
	"github.com/selective-ksm/selective-ksm/test/pages"
	workloads "github.com/selective-ksm/selective-ksm/test/workload/control"
)

// Where make puts what the tests run.
var product, workload = built("selective-ksm"), built("workload")

func built(name string) string {
	path, err := filepath.Abs("../../build/bin/" + name)
	if err != nil {
		panic(err)
	}
	return path
}

// size is how many MiB of data a container has.
const size = 8

// patience is how long anything may take, in an emulated VM that is busy.
const patience = 2 * time.Minute

// within waits until something works.
func within(t testing.TB, what string, works func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := works()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s: %v", patience, what, err)
		}
		<-tick.C
	}
}

// node is the machine with the hooks installed.
type node struct {
	config  string
	hooks   string
	control string
	log     string
	// process is the daemon's.
	process *os.Process
	// mainline is that the kernel has one merge space, so that one pod is merged.
	mainline bool
	// wrapper is a runtime whose containers are mergeable, where the kernel does not
	// make them so.
	wrapper map[string]string
}

func newNode(t testing.TB) *node {
	t.Helper()
	if os.Getuid() != 0 {
		missing.Skip(t, "not root")
	}
	for _, path := range []string{product, workload} {
		if _, err := os.Stat(path); err != nil {
			missing.Skip(t, "not built: %v", err)
		}
	}
	dir := t.TempDir()
	n := &node{
		config: filepath.Join(dir, "config.yaml"), hooks: filepath.Join(dir, "hooks.d"),
		log: filepath.Join(dir, "log"), mainline: !partition.Supported(),
	}
	lock, err := engine.Lock(engine.RunDir)
	if err != nil {
		missing.Skip(t, "no engine can run: %v", err)
	}
	lock.Close()
	settings := "startDelays: [0s, 3s, 10s, 30s, 90s]\nbudget: 100%\npartitionBudget: 100%\nlogFile: " + n.log + "\nlogLevel: debug\n"
	if n.mainline {
		settings += "interface: mainline\nmainlinePartition: first\nsecrets: true\n"
	}
	if err := os.WriteFile(n.config, []byte(settings), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := try(product, "doctor", "-config", n.config); err != nil {
		missing.Skip(t, "no engine can run: %s", out)
	}
	command(t, product, "hook", "install", "-dir", n.hooks, "-config", n.config, "-deadline", "8s")
	command(t, product, "hook", "validate", "-dir", n.hooks)
	// The path of a socket is short.
	if n.control, err = os.MkdirTemp("", "control-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(n.log)
			t.Logf("the engine has logged:\n%s", log)
		}
		if err := os.RemoveAll(n.control); err != nil {
			t.Error(err)
		}
	})
	n.wrapper = map[string]string{}
	for _, name := range []string{"runc", "crun"} {
		path := filepath.Join(dir, name+"-mergeable")
		script := fmt.Sprintf("#!/bin/sh\nexec %s runtime -- %s \"$@\"\n", product, name)
		if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		n.wrapper[name] = path
	}
	return n
}

// merged is the runtime for containers that are to be merged.
func (n *node) merged(name string) string {
	if n.mainline {
		return n.wrapper[name]
	}
	return name
}

// daemon runs the daemon until the test ends, or the function is called.
func (n *node) daemon(t testing.TB, args ...string) (stop func()) {
	t.Helper()
	cmd := exec.Command(product, append([]string{"daemon", "-config", n.config}, args...)...)
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	n.process = cmd.Process
	stop = sync.OnceFunc(func() {
		if err := errors.Join(cmd.Process.Signal(os.Interrupt), cmd.Wait()); err != nil {
			t.Errorf("daemon: %v: %s", err, said.String())
		}
	})
	t.Cleanup(stop)
	within(t, "daemon answers", func() error {
		// A worker answers, too, until the daemon has taken over from it.
		if workers := n.workers(t); len(workers) > 0 {
			return fmt.Errorf("workers %d run", workers)
		}
		_, err := control.Ask(t.Context(), engine.RunDir)
		return err
	})
	return stop
}

// running is a container that runs, as the test sees it.
type running struct {
	name, tenant string
	pid          int
	data         workloads.Hello
	conn         *workloads.Conn
}

// run starts a container, and waits for its data.
func (n *node) run(t *testing.T, r runtime, name, pod string, args ...string) *running {
	t.Helper()
	listener, err := workloads.Listen(n.control)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	r.start(t, name, pod, append([]string{"-control", n.control, "-size", fmt.Sprint(size)}, args...)...)
	return n.accept(t, listener, name, pod)
}

func (n *node) accept(t *testing.T, listener *workloads.Listener, name, tenant string) *running {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := listener.Accept(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &running{name: name, tenant: tenant, pid: conn.Peer, data: conn.Hello, conn: conn}
}

// processes are those of a name.
func processes(t testing.TB, name string) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	for _, e := range entries {
		var pid int
		if _, err := fmt.Sscan(e.Name(), &pid); err != nil {
			continue
		}
		if comm, err := os.ReadFile(filepath.Join("/proc", e.Name(), "comm")); err == nil && strings.TrimSpace(string(comm)) == name {
			found = append(found, pid)
		}
	}
	return found
}

// workers are the engines in the background that hooks have started.
func (n *node) workers(t testing.TB) []int {
	t.Helper()
	return slices.DeleteFunc(processes(t, "selective-ksm"), func(pid int) bool {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		return err != nil || !strings.Contains(string(line), "\x00worker\x00") || !strings.Contains(string(line), n.config)
	})
}

// check has a container look at its data.
func (c *running) check(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := c.conn.Do(ctx, workloads.Request{Op: workloads.Check}); err != nil {
		t.Errorf("%s: %v", c.name, err)
	}
}

func (c *running) process() border.Process {
	return border.Process{Tenant: c.tenant, Name: c.name, PID: c.pid}
}

// shared is how many pages of data two containers share.
func shared(a, b *running) (int, error) {
	mine, err := pages.Range(a.pid, a.data.Start, a.data.End)
	if err != nil {
		return 0, err
	}
	theirs, err := pages.Range(b.pid, b.data.Start, b.data.End)
	if err != nil {
		return 0, err
	}
	return pages.Merged(mine, theirs)
}

// merge waits until two containers share all data.
func merge(t *testing.T, a, b *running) {
	t.Helper()
	within(t, fmt.Sprintf("%s and %s are merged", a.name, b.name), func() error {
		n, err := shared(a, b)
		if err == nil && n < size<<20/os.Getpagesize() {
			err = fmt.Errorf("they share %d pages", n)
		}
		return err
	})
}

// clean waits until there is nothing left of any container.
func (n *node) clean(t testing.TB) {
	t.Helper()
	within(t, "nothing is left", func() error {
		files, err := os.ReadDir(filepath.Join(engine.RunDir, "hooks"))
		files = slices.DeleteFunc(files, func(e os.DirEntry) bool { return e.Name() == "lock" })
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		} else if err == nil && len(files) > 0 {
			err = fmt.Errorf("files %v", files)
		}
		if err != nil {
			return err
		}
		if n.mainline {
			return n.nothingMerged(t)
		}
		partitions, err := partition.List()
		if err == nil && len(partitions) > 0 {
			err = fmt.Errorf("partitions %q", partitions)
		}
		return err
	})
}

// nothingMerged returns an error if a partition has the merge space of an unpatched kernel.
func (n *node) nothingMerged(t testing.TB) error {
	t.Helper()
	report, err := control.Ask(t.Context(), engine.RunDir)
	if err == nil && len(report.Partitions) > 0 {
		return fmt.Errorf("partitions %+v", report.Partitions)
	}
	if err != nil && !errors.Is(err, control.ErrNoEngine) {
		return err
	}
	// Nobody else has anything merged here.
	merged, err := os.ReadFile("/sys/kernel/mm/ksm/pages_sharing")
	if err == nil && string(merged) != "0\n" {
		err = fmt.Errorf("pages that are merged: %s", merged)
	}
	return err
}

// ended waits until no engine runs any more.
func ended(t testing.TB) {
	t.Helper()
	within(t, "the worker has ended", func() error {
		lock, err := engine.Lock(engine.RunDir)
		if err != nil {
			return err
		}
		return lock.Close()
	})
}

// each runs a test with each runtime, by a worker and by the daemon.
func each(t *testing.T, test func(t *testing.T, n *node, r runtime, use func(mergeable bool))) {
	for _, engines := range []string{"worker", "daemon"} {
		for _, name := range []string{"podman", "runc", "crun"} {
			t.Run(name+" with "+engines, func(t *testing.T) {
				n := newNode(t)
				if _, err := exec.LookPath(name); err != nil {
					missing.Skip(t, "%v", err)
				}
				if _, err := os.Stat(cgroup.DefaultRoot + "/cgroup.controllers"); err != nil && name == "crun" {
					missing.Skip(t, "crun of Debian 12 takes no hybrid cgroups: %v", err)
				}
				if engines == "daemon" {
					n.daemon(t)
				}
				var r runtime
				var set *string
				low := name
				if name == "podman" {
					low = "runc"
					p := &podman{hooks: n.hooks, control: n.control, native: n.mainline}
					r, set = p, &p.runtime
				} else {
					b := &bundles{hooks: n.hooks, control: n.control}
					r, set = b, &b.runtime
				}
				test(t, n, r, func(mergeable bool) {
					if *set = low; mergeable {
						*set = n.merged(low)
					}
				})
				n.clean(t)
				if engines == "worker" {
					ended(t)
				}
			})
		}
	}
}

// Containers of a pod share what is the same in them, from their start, and those of
// two pods nothing, whatever happens to them.
func TestPods(t *testing.T) {
	each(t, func(t *testing.T, n *node, r runtime, use func(bool)) {
		use(true)
		shop := r.pod(t, "hooks-shop")
		a := n.run(t, r, "hooks-a", shop)
		b := n.run(t, r, "hooks-b", shop)
		use(false)
		bank := r.pod(t, "hooks-bank")
		c := n.run(t, r, "hooks-c", bank)
		d := n.run(t, r, "hooks-d", bank)
		guard := border.Watch()
		guard.Add(a.process(), b.process(), c.process(), d.process())

		merge(t, a, b)
		if !n.mainline {
			merge(t, c, d)
		}
		for _, each := range []*running{a, b, c, d} {
			each.check(t)
		}
		guard.Sweep()

		// One that comes back, as another process with the same id.
		listener, err := workloads.Listen(n.control)
		if err != nil {
			t.Fatal(err)
		}
		b.conn.Close()
		r.restart(t, "hooks-b")
		b = n.accept(t, listener, "hooks-b", shop)
		listener.Close()
		guard.Add(b.process())
		merge(t, a, b)

		guard.Sweep()
		_, crossings, err := guard.Stop()
		if err != nil {
			t.Error(err)
		}
		for _, x := range crossings {
			t.Error(x)
		}
		r.stop(t, "hooks-a", true)
		r.stop(t, "hooks-c", false)
		r.stop(t, "hooks-b", false)
		r.stop(t, "hooks-d", true)
	})
}

// many is how many containers come and go at the same time. Podman, which takes minutes
// for as many in an emulated VM, is given them there once only: where each hook may have
// to start an engine.
const many, manyEmulated = 50, 10

// Containers that come and go at once, in pods of five, end with nothing left, however
// they end.
func TestMany(t *testing.T) {
	each(t, func(t *testing.T, n *node, r runtime, use func(bool)) {
		use(false)
		many := many
		if _, slow := r.(*podman); slow && !n.mainline && n.process != nil {
			many = manyEmulated
		}
		var pods []string
		for i := range many / 5 {
			pods = append(pods, r.pod(t, fmt.Sprint("hooks-pod", i)))
		}
		// A runtime is given what it needs for a container before it is asked for many.
		lives := make([]life, many)
		for i := range lives {
			lives[i] = r.brief(t, fmt.Sprint("hooks-many", i), pods[i%len(pods)], i%2 == 0)
		}
		// One half ends as soon as it has started, the other after a look at it.
		var working, started sync.WaitGroup
		failed, looked := make(chan error, many), make(chan struct{})
		release := sync.OnceFunc(func() { close(looked) })
		defer working.Wait()
		defer release()
		for i, l := range lives {
			waits := i < many/2
			if waits {
				started.Add(1)
			}
			working.Go(func() {
				err := l.start()
				if err != nil {
					failed <- err
				}
				if waits {
					started.Done()
					<-looked
				}
				if err != nil {
					return
				}
				if err := l.end(); err != nil {
					failed <- err
				}
			})
		}
		started.Wait()
		if len(failed) == 0 {
			within(t, "containers of all pods run, and are merged where they can be", func() (err error) {
				seen, merged := look(t)
				if seen != len(pods) || merged == 0 && !n.mainline {
					err = fmt.Errorf("those of %d of %d pods do, and have %d merged pages in common", seen, len(pods), merged)
				}
				return err
			})
		}
		release()
		working.Wait()
		close(failed)
		for err := range failed {
			t.Error(err)
		}
	})
}

// podVariable is what tells, in a container's environment, of which pod it is.
const podVariable = "TEST_POD"

// look looks at all containers that run, and fails the test if two of different pods share a
// page. It returns how many pods there are, and how many merged pages the first two containers
// of one have in common.
func look(t *testing.T) (pods, merged int) {
	t.Helper()
	var all []border.Process
	pids := map[string][]int{}
	for _, pid := range processes(t, "workload") {
		environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if err != nil {
			continue // it has ended
		}
		for variable := range strings.SplitSeq(string(environ), "\x00") {
			if pod, ok := strings.CutPrefix(variable, podVariable+"="); ok {
				all = append(all, border.Process{Tenant: pod, Name: fmt.Sprint(pid), PID: pid})
				pids[pod] = append(pids[pod], pid)
			}
		}
	}
	crossings, err := border.Crossings(all...)
	if err != nil {
		t.Error(err)
	}
	for _, c := range crossings {
		t.Error(c)
	}
	for _, of := range pids {
		var memory [][]pages.Page
		for _, pid := range of {
			if all, err := pages.All(pid); err == nil { // or it has ended
				memory = append(memory, all)
			}
		}
		if len(memory) < 2 {
			continue
		}
		n, err := pages.Merged(memory[0], memory[1])
		if err != nil {
			t.Error(err)
		}
		merged += n
	}
	return len(pids), merged
}

// Engines come and go under containers: a daemon takes over from a worker, and workers
// from one that was killed.
func TestEngines(t *testing.T) {
	n := newNode(t)
	r := &bundles{hooks: n.hooks, control: n.control, runtime: n.merged("runc")}
	if _, err := exec.LookPath("runc"); err != nil {
		missing.Skip(t, "%v", err)
	}
	pod := r.pod(t, "hooks-shop")
	a := n.run(t, r, "hooks-a", pod)
	stop := n.daemon(t)
	within(t, "the daemon has it", func() error {
		report, err := control.Ask(t.Context(), engine.RunDir)
		all := report.Partitions
		if err == nil && (len(all) != 1 || len(all[0].Containers) != 1 || !all[0].Containers[0].Running) {
			err = fmt.Errorf("it has %+v", all)
		}
		return err
	})
	if again, err := try(product, "daemon", "-config", n.config); err == nil || !strings.Contains(again, "another engine runs on this machine: stop it first") {
		t.Errorf("a second daemon: %s, %v", again, err)
	}
	stop()
	b := n.run(t, r, "hooks-b", pod)
	merge(t, a, b)

	c := n.run(t, r, "hooks-c", pod)
	killed := 0
	for _, pid := range n.workers(t) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err == nil {
			killed++
		}
	}
	if killed == 0 {
		t.Error("no worker runs")
	}
	d := n.run(t, r, "hooks-d", pod)
	merge(t, c, d)
	merge(t, a, d)
	for _, each := range []*running{a, b, c, d} {
		each.check(t)
		r.stop(t, each.name, true)
	}
	n.clean(t)
	ended(t)
}

// Containers that have what is the machine's are left out, as podman says it.
func TestLeftOut(t *testing.T) {
	n := newNode(t)
	if _, err := exec.LookPath("podman"); err != nil {
		missing.Skip(t, "%v", err)
	}
	n.daemon(t)
	p := &podman{hooks: n.hooks, control: n.control, native: n.mainline, runtime: "runc"}
	for name, tc := range map[string]struct {
		args []string
		out  bool
	}{
		"nothing":    {nil, false},
		"devices":    {[]string{"--device", "/dev/null"}, false},
		"privileged": {[]string{"--privileged"}, true},
		"processes":  {[]string{"--pid", "host"}, true},
		"sysfs":      {[]string{"--volume", "/sys:/sys"}, true},
	} {
		p.more = tc.args
		id := p.start(t, "hooks-"+name, "")
		files, err := filepath.Glob(filepath.Join(engine.RunDir, "hooks", "*.json"))
		if err != nil {
			t.Fatal(err)
		}
		told := false
		for _, path := range files {
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			told = told || strings.Contains(string(content), id)
		}
		if told == tc.out {
			t.Errorf("%s: the engine is told %v", name, told)
		}
		p.stop(t, "hooks-"+name, true)
	}
	n.clean(t)
}

// The daemon merges what hooks tell of by its schedule, and tells of it.
func TestSchedule(t *testing.T) {
	n := newNode(t)
	if _, err := exec.LookPath("runc"); err != nil {
		missing.Skip(t, "%v", err)
	}
	content, err := os.ReadFile(n.config)
	if err != nil {
		t.Fatal(err)
	}
	const atStart = "startDelays: [0s, 3s, 10s, 30s, 90s]\n"
	changed := strings.Replace(string(content), atStart, "startDelays: []\ninterval: 1s\nmaxInterval: 1s\n", 1)
	if changed == string(content) {
		t.Fatalf("the configuration has not %s", atStart)
	}
	if err := os.WriteFile(n.config, []byte(changed), 0o644); err != nil {
		t.Fatal(err)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := free.Addr().String()
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	n.daemon(t, "-metrics", address)
	r := &bundles{hooks: n.hooks, control: n.control, runtime: n.merged("runc")}
	pod := r.pod(t, "hooks-shop")
	a, b := n.run(t, r, "hooks-a", pod), n.run(t, r, "hooks-b", pod)
	merge(t, a, b)

	within(t, "status tells of it", func() error {
		if status := command(t, product, "status"); !strings.Contains(status, "2 containers in 1 partition, 0 not merged") {
			return errors.New(status)
		}
		return nil
	})
	merges := regexp.MustCompile(`(?m)^selective_ksm_partition_merge_duration_seconds_count\{partition="sksm-pod-.*"\} (\d+)$`)
	count := func() (sum int, err error) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
		if err != nil {
			return 0, err
		}
		answer, err := http.DefaultClient.Do(request)
		if err != nil {
			return 0, err
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		found := merges.FindAllStringSubmatch(string(text), -1)
		if err == nil && found == nil {
			err = fmt.Errorf("no merge in\n%s", text)
		}
		for _, m := range found {
			n, _ := strconv.Atoi(m[1])
			sum += n
		}
		return sum, err
	}
	first := 0
	within(t, "metrics tell of merges", func() (err error) {
		first, err = count()
		return err
	})
	within(t, "there are more merges", func() error {
		now, err := count()
		if err == nil && now <= first {
			err = fmt.Errorf("there are %d", now)
		}
		return err
	})
	r.stop(t, "hooks-a", false)
	r.stop(t, "hooks-b", true)
	n.clean(t)
}

// The daemon takes another configuration whole, also for a container that runs, or not
// at all.
func TestReload(t *testing.T) {
	n := newNode(t)
	if _, err := exec.LookPath("runc"); err != nil {
		missing.Skip(t, "%v", err)
	}
	n.daemon(t)
	r := &bundles{hooks: n.hooks, control: n.control, runtime: n.merged("runc")}
	n.run(t, r, "hooks-a", r.pod(t, "hooks-shop"))
	content, err := os.ReadFile(n.config)
	if err != nil {
		t.Fatal(err)
	}
	change := func(more string) {
		t.Helper()
		if err := os.WriteFile(n.config, append(content[:len(content):len(content)], more...), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	partition := func(prefix string) {
		t.Helper()
		within(t, "the container is in a partition "+prefix, func() error {
			report, err := control.Ask(t.Context(), engine.RunDir)
			if err != nil {
				return err
			}
			for _, p := range report.Partitions {
				for _, c := range p.Containers {
					if c.ID == "hooks-a" && strings.HasPrefix(p.Name, prefix) {
						return nil
					}
				}
			}
			return fmt.Errorf("there is %+v", report.Partitions)
		})
	}
	logged := func(line string, times int) {
		t.Helper()
		within(t, "the log says "+line, func() error {
			log, err := os.ReadFile(n.log)
			if have := strings.Count(string(log), line); err == nil && have != times {
				err = fmt.Errorf("%d times, not %d", have, times)
			}
			return err
		})
	}
	partition("sksm-pod-")
	change("partitionBy: container\n")
	partition("sksm-ctr-")
	logged("configuration is reloaded", 1)
	// One part of it is wrong.
	change("partitionBy: pod\ninterval: soon\n")
	logged("configuration is not reloaded, and stays as it was", 1)
	partition("sksm-ctr-")
	change("partitionBy: pod\ninterface: syscall\n")
	logged("configuration is not reloaded, and stays as it was", 2)
	partition("sksm-ctr-")
	change("partitionBy: container\n")
	logged("configuration is reloaded", 2)
	if err := n.process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	logged("configuration is reloaded", 3)
	r.stop(t, "hooks-a", true)
	n.clean(t)
}

// late is long after any hook's deadline, of two seconds at most, and less than whoever does
// not know of one waits.
func (n *node) late() time.Duration {
	if n.mainline {
		return 3 * time.Second // the machine itself, where nothing is emulated
	}
	return 8 * time.Second
}

// Hooks are installed for containers with an annotation, and taken away again.
func TestInstall(t *testing.T) {
	n := newNode(t)
	dir := filepath.Join(t.TempDir(), "hooks.d")
	const wanted = "selective-ksm.dev/merge=yes"
	command(t, product, "hook", "install", "-dir", dir, "-config", n.config, "-annotation", wanted)
	command(t, product, "hook", "validate", "-dir", dir, "-annotation", wanted)
	if said, err := try(product, "hook", "validate", "-dir", dir); err == nil {
		t.Errorf("a container without the annotation: %s", said)
	}
	command(t, product, "hook", "uninstall", "-dir", dir)
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

// A hook that cannot do its work says why in a line, in time, and is no failure of the
// container, unless it is told to be.
func TestFailures(t *testing.T) {
	n := newNode(t)
	hook := func(t *testing.T, stdin any, args ...string) (status int, line string, took time.Duration) {
		t.Helper()
		cmd := exec.Command(product, append([]string{"hook"}, args...)...)
		switch in := stdin.(type) {
		case string:
			cmd.Stdin = strings.NewReader(in)
		case *os.File:
			cmd.Stdin = in
		}
		begin := time.Now()
		out, err := cmd.CombinedOutput()
		if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return cmd.ProcessState.ExitCode(), string(out), time.Since(begin)
	}
	read, keep, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer keep.Close()
	broken := n.config + ".broken"
	if err := os.WriteFile(broken, []byte("partitionBy: moon\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	self := fmt.Sprintf(`{"ociVersion":"1.0.2","id":"hooks-self","status":"creating","pid":%d,"bundle":"/"}`, os.Getpid())
	for name, tc := range map[string]struct {
		stdin any
		args  []string
		want  string
	}{
		"malformed": {"{", []string{"createRuntime", "-config", n.config},
			"selective-ksm: hook createRuntime: state of the container: not JSON as the runtime specification has it: unexpected end of JSON input\n"},
		"not its container": {self, []string{"createRuntime", "-config", n.config},
			fmt.Sprintf("selective-ksm: hook createRuntime: container hooks-self is not merged: process %d is in no cgroup that is named after the container\n", os.Getpid())},
		"configuration": {self, []string{"poststart", "-config", broken},
			"selective-ksm: hook poststart: " + broken + `: line 1: partitionBy: "moon" is not known: write container or pod or group or namespace` + "\n"},
		"stage": {self, []string{"prestart", "-config", n.config},
			"selective-ksm: hook prestart: the stage is not known: see selective-ksm help\n"},
		"says nothing": {read, []string{"createRuntime", "-config", n.config, "-deadline", "2s"},
			"selective-ksm: hook createRuntime: state of the container: standard input: context deadline exceeded\n"},
	} {
		t.Run(name, func(t *testing.T) {
			status, line, took := hook(t, tc.stdin, tc.args...)
			if status != 0 || line != tc.want {
				t.Errorf("status %d, and it says\n\t%swant\n\t%s", status, line, tc.want)
			}
			if took > n.late() {
				t.Errorf("took %v", took)
			}
			if status, line, _ := hook(t, tc.stdin, append(tc.args, "-strict")...); status != 1 || line != tc.want {
				t.Errorf("strict: status %d, and it says\n\t%swant\n\t%s", status, line, tc.want)
			}
		})
	}
	t.Run("hung daemon", func(t *testing.T) {
		stop := n.daemon(t)
		pid, end := waiting(t, "hooks-hung")
		bundle := write(t, (&bundles{hooks: n.hooks}).config(t, "/", "", nil))
		state := fmt.Sprintf(`{"ociVersion":"1.0.2","id":"hooks-hung","status":"creating","pid":%d,"bundle":%q}`, pid, bundle)
		if err := n.process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		status, line, took := hook(t, state, "createRuntime", "-config", n.config)
		if err := n.process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		if status != 0 || !strings.HasPrefix(line, "selective-ksm: hook createRuntime: ") || strings.Count(line, "\n") != 1 || took > n.late() {
			t.Errorf("status %d after %v, and it says\n\t%s", status, took, line)
		}
		end()
		if status, line, _ := hook(t, state, "poststop", "-config", n.config, "-strict"); status != 0 {
			t.Errorf("poststop: status %d, and it says\n\t%s", status, line)
		}
		n.clean(t)
		// The hook has started one, as nobody answered.
		within(t, "the worker leaves it to the daemon", func() (err error) {
			if all := n.workers(t); len(all) > 0 {
				err = fmt.Errorf("there are %d", all)
			}
			return err
		})
		stop()
	})
	t.Run("id like a flag", func(t *testing.T) {
		const id = "-hooks"
		pid, end := waiting(t, id)
		bundle := write(t, (&bundles{hooks: n.hooks}).config(t, "/", "", nil))
		state := fmt.Sprintf(`{"ociVersion":"1.0.2","id":%q,"status":"creating","pid":%d,"bundle":%q}`, id, pid, bundle)
		if status, line, _ := hook(t, state, "createRuntime", "-config", n.config, "-strict"); status != 0 {
			t.Errorf("status %d, and it says\n\t%s", status, line)
		}
		within(t, "a worker has it", func() error {
			log, err := os.ReadFile(n.log)
			if err == nil && !strings.Contains(string(log), `msg="worker started" container_id=`+id) {
				err = fmt.Errorf("the log is\n%s", log)
			}
			return err
		})
		end()
		if status, line, _ := hook(t, state, "poststop", "-config", n.config, "-strict"); status != 0 {
			t.Errorf("poststop: status %d, and it says\n\t%s", status, line)
		}
		n.clean(t)
		ended(t)
	})
	t.Run("left out", func(t *testing.T) {
		// Nothing is wrong with it.
		pid, end := waiting(t, "hooks-waiting")
		defer end()
		bundle := write(t, (&bundles{hooks: n.hooks}).config(t, "/", "", nil))
		state := fmt.Sprintf(`{"ociVersion":"1.0.2","id":"hooks-waiting","status":"creating","pid":%d,"bundle":%q,"annotations":{"merge.selective-ksm.dev":"off"}}`, pid, bundle)
		const want = `selective-ksm: hook createRuntime: container hooks-waiting is not merged: merge.selective-ksm.dev is "off"` + "\n"
		if status, line, _ := hook(t, state, "createRuntime", "-config", n.config, "-strict"); status != 0 || line != want {
			t.Errorf("strict: status %d, and it says\n\t%swant\n\t%s", status, line, want)
		}
	})
	n.clean(t)
}

// The line is in the system's log, too.
func TestSystemLog(t *testing.T) {
	n := newNode(t)
	const path = "/dev/log"
	system, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		missing.Skip(t, "the system has a log: %v", err)
	}
	defer func() {
		if err := errors.Join(system.Close(), os.Remove(path)); err != nil {
			t.Error(err)
		}
	}()
	cmd := exec.Command(product, "hook", "createRuntime", "-config", n.config)
	cmd.Stdin = strings.NewReader("{")
	said, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	if err := system.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 1<<16)
	size, err := system.Read(data)
	want := ": " + strings.TrimPrefix(string(said), "selective-ksm: ")
	if err != nil || !strings.HasSuffix(string(data[:size]), want) {
		t.Errorf("the system's log has %q, %v, want it to end with %q", data[:size], err, want)
	}
}
