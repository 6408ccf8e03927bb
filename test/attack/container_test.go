package attack_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/test/e2e/plugin"
)

// patience is how long anything may take, in an emulated VM that is busy.
const patience = 2 * time.Minute

// deadline returns a context for one step of a test.
func deadline(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), patience, fmt.Errorf("not within %s", patience))
	t.Cleanup(cancel)
	return ctx
}

// poll looks again and again until a function returns no error: it is for what nobody
// tells of.
func poll(t *testing.T, look func() error) {
	t.Helper()
	tick, late := time.NewTicker(20*time.Millisecond), time.After(patience)
	defer tick.Stop()
	for {
		err := look()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("not within %s: %v", patience, err)
		}
	}
}

// container is a process in a cgroup of its own, which is all that makes one for the
// engine.
type container struct {
	t                *testing.T
	id, name, tenant string
	pid              int
	pages            hello

	in  io.WriteCloser
	out *json.Decoder
}

// launch starts a container whose program does not run before [container.start]. That
// makes itself mergeable, if that is wanted, and has some namespaces of its own.
func launch(t *testing.T, tenant, name string, mergeable bool, namespaces uintptr) *container {
	t.Helper()
	c := &container{
		t: t, name: name, tenant: tenant,
		id: fmt.Sprintf("%x", sha256.Sum256([]byte(t.Name()+tenant+name))),
	}
	dir := filepath.Join(cgroup.DefaultRoot, c.id)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		poll(t, func() error {
			if cgroup.Populated(dir) {
				return fmt.Errorf("processes are left in %s", dir)
			}
			return os.Remove(dir)
		})
	})
	within, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer within.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	command := []string{self}
	if mergeable {
		command = []string{program, "optin", "--", self}
	}
	cmd := exec.Command("/bin/sh", append([]string{"-c", `read -r start && exec "$@"`, "sh"}, command...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, UseCgroupFD: true, CgroupFD: int(within.Fd())}
	// A signal to the thread that takes the times would be in them.
	cmd.Env = append(os.Environ(), role+"="+name, "GODEBUG=asyncpreemptoff=1")
	cmd.Stderr = os.Stderr
	if c.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.out = json.NewDecoder(out)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c.pid = cmd.Process.Pid
	t.Cleanup(func() {
		c.in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	})
	return c
}

// start has the container run its program, and waits until that has filled its memory.
func (c *container) start() {
	c.t.Helper()
	if _, err := fmt.Fprintln(c.in, "start"); err != nil {
		c.t.Fatal(err)
	}
	if err := c.out.Decode(&c.pages); err != nil {
		c.t.Fatalf("%s said nothing: %v", c.name, err)
	}
}

// ask has the program do something.
func (c *container) ask(op string, number int) reply {
	c.t.Helper()
	r, err := c.try(op, number)
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}

// try is ask for other goroutines than the test's. Only one asks at a time.
func (c *container) try(op string, number int) (reply, error) {
	var r reply
	err := json.NewEncoder(c.in).Encode(request{op, number})
	if err == nil {
		err = c.out.Decode(&r)
	}
	if err == nil && r.Error != "" {
		err = errors.New(r.Error)
	}
	if err != nil {
		return r, fmt.Errorf("%s: %s: %w", c.name, op, err)
	}
	return r, nil
}

// program is the product, where make puts it.
var program = func() string {
	path, err := filepath.Abs("../../build/bin/selective-ksm")
	if err != nil {
		panic(err)
	}
	return path
}()

const (
	// onDemand merges only when somebody asks for it.
	onDemand = "startDelays: []\ninterval: 1000h\npressure: off\nbudget: 200%\npartitionBudget: 100%\nlogFormat: json\n"
	// oneSpace is for an unpatched kernel.
	oneSpace = "interface: mainline\nmainlinePartition: first\nsecrets: true\n"
)

// node is the machine with the daemon running. Containers are told to it as runtimes
// tell of theirs, by hooks.
type node struct {
	t       *testing.T
	config  string
	bundle  string
	process *plugin.Process
}

func startNode(t *testing.T, config string) *node {
	t.Helper()
	n := &node{t: t, config: filepath.Join(t.TempDir(), "config.yaml"), bundle: t.TempDir()}
	// That sysfs is read-only says that a container is not privileged.
	spec, err := json.Marshal(specs.Spec{Mounts: []specs.Mount{{Destination: "/sys", Type: "sysfs", Options: []string{"ro"}}}})
	if err != nil {
		t.Fatal(err)
	}
	for path, content := range map[string][]byte{n.config: []byte(config), filepath.Join(n.bundle, "config.json"): spec} {
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if n.process == nil {
			return
		}
		// Containers have ended by now.
		poll(t, func() error {
			r, err := n.report()
			if err == nil && len(r.Partitions) > 0 {
				err = fmt.Errorf("there is still partition %s", r.Partitions[0].Name)
			}
			return err
		})
		if err := n.process.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(n.process.Log())
		}
	})
	n.start()
	return n
}

// start starts the daemon.
func (n *node) start() {
	n.t.Helper()
	var err error
	if n.process, err = plugin.Launch(program, "daemon", "-config", n.config); err != nil {
		n.t.Fatal(err)
	}
	poll(n.t, func() error {
		_, err := n.report()
		return err
	})
}

// restart kills the daemon, and starts another one.
func (n *node) restart() {
	n.t.Helper()
	if err := n.process.Kill(); err != nil {
		n.t.Fatal(err)
	}
	n.start()
}

func (n *node) report() (control.Report, error) {
	return control.Ask(context.Background(), engine.RunDir)
}

// run runs a container of a pod. Its program makes itself mergeable before it runs, if
// that is wanted.
func (n *node) run(pod, name string, mergeable bool) *container {
	n.t.Helper()
	c := launch(n.t, pod, name, mergeable, syscall.CLONE_NEWPID|syscall.CLONE_NEWNS)
	n.hook("createRuntime", c)
	c.start()
	n.hook("poststart", c)
	poll(n.t, func() error {
		s, _, err := n.status(c)
		if err == nil && !s.Running {
			err = fmt.Errorf("the engine does not know that %s runs", name)
		}
		return err
	})
	return c
}

// remove has the engine forget a container, as when it is deleted, though it runs on.
func (n *node) remove(c *container) {
	n.t.Helper()
	n.hook("poststop", c)
}

// hook runs a hook of the container's runtime.
func (n *node) hook(stage string, c *container) {
	n.t.Helper()
	state, err := json.Marshal(specs.State{
		Version: specs.Version, ID: c.id, Status: specs.StateCreated, Pid: c.pid, Bundle: n.bundle,
		Annotations: map[string]string{
			"io.kubernetes.cri.sandbox-id":     fmt.Sprintf("%x", sha256.Sum256([]byte(c.tenant))),
			"io.kubernetes.cri.sandbox-name":   c.tenant,
			"io.kubernetes.cri.container-name": c.name,
		},
	})
	if err != nil {
		n.t.Fatal(err)
	}
	n.command(bytes.NewReader(state), "hook", stage, "-config", n.config, "-deadline", "8s")
}

// command runs the product, which must have nothing to complain of but that a partition
// is kept out.
func (n *node) command(in io.Reader, args ...string) {
	n.t.Helper()
	cmd := exec.CommandContext(deadline(n.t), program, args...)
	cmd.Stdin = in
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 && !strings.Contains(string(out), "kept out") {
		n.t.Fatalf("%s: %v: %s", args[0], err, out)
	}
}

// merge has everything merged, and waits until these containers are.
func (n *node) merge(containers ...*container) {
	n.t.Helper()
	of := func(c *container) func(plugin.Line) bool {
		return func(l plugin.Line) bool { return l.Message == "merged" && l.ContainerID == c.id }
	}
	var before []int
	for _, c := range containers {
		before = append(before, len(n.process.Lines(of(c))))
	}
	n.command(nil, "merge")
	for i, c := range containers {
		if _, err := n.process.Wait(deadline(n.t), before[i]+1, of(c)); err != nil {
			n.t.Fatalf("merge of %s: %v", c.name, err)
		}
	}
}

// unmerge has everything unmerged, and waits until it is.
func (n *node) unmerge() {
	n.t.Helper()
	n.command(nil, "unmerge")
	poll(n.t, func() error {
		r, err := n.report()
		for _, p := range r.Partitions {
			if p.Hold != engine.HoldUnmerged && p.Reason == "" {
				err = errors.Join(err, fmt.Errorf("partition %s is not unmerged", p.Name))
			}
		}
		return err
	})
}

// errUnknown says that the engine does not know a container.
var errUnknown = errors.New("the engine does not know it")

// status is what the engine has of a container, and of its partition.
func (n *node) status(c *container) (engine.ContainerStatus, engine.PartitionStatus, error) {
	r, err := n.report()
	if err != nil {
		return engine.ContainerStatus{}, engine.PartitionStatus{}, err
	}
	for _, p := range r.Partitions {
		for _, s := range p.Containers {
			if s.ID == c.id {
				return s, p, nil
			}
		}
	}
	return engine.ContainerStatus{}, engine.PartitionStatus{}, fmt.Errorf("%s: %w", c.name, errUnknown)
}

// forgotten waits until the engine does not know containers any more.
func (n *node) forgotten(containers ...*container) {
	n.t.Helper()
	poll(n.t, func() error {
		for _, c := range containers {
			if _, _, err := n.status(c); !errors.Is(err, errUnknown) {
				return fmt.Errorf("%s is still there: %w", c.name, err)
			}
		}
		return nil
	})
}

// wantKeptOut waits until the engine keeps a container's partition out.
func (n *node) wantKeptOut(c *container) {
	n.t.Helper()
	poll(n.t, func() error {
		_, p, err := n.status(c)
		if err == nil && !strings.Contains(p.Reason, "kept out") {
			err = fmt.Errorf("the partition of %s is not kept out: %q", c.name, p.Reason)
		}
		return err
	})
}
