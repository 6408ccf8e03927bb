// Command bench measures what the plugin costs on a node with many containers: 250
// pods of four containers, each with one small process, on a kernel with partitions.
// It is the runtime's half of NRI itself. It prints what it has measured, and fails if
// any of it is above its limit. make bench runs it in the test VM, which is emulated
// where there is no KVM: so what a round may take is for BenchmarkRound of package
// engine to say, on the machine itself.
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
)

const (
	containers = 4 // in each pod
	root       = "/sys/fs/cgroup"
	below      = "sksm-bench"

	// idle is shorter than the interval, so that there is no merge in it.
	idle     = 30 * time.Second
	patience = 8 * time.Minute
)

// Limits.
const (
	maxReconcile = 2 * time.Second
	maxResident  = 40 << 20 // bytes
	maxIdle      = 0.005    // of one CPU
)

const config = `startDelays: [0s]
interval: 60s
maxInterval: 60s
budget: 100%
partitionBudget: 100%
logFormat: json
logLevel: debug
`

// pods is how many there are.
var pods = 250

func main() {
	flag.IntVar(&pods, "pods", pods, "")
	program := flag.String("program", "build/bin/selective-ksm", "what is measured")
	flag.Parse()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := run(ctx, *program); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, program string) (err error) {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	fmt.Printf("Starting %d containers in %d pods.\n", pods*containers, pods)
	n, err := startNode()
	defer func() { err = errors.Join(err, n.stop()) }()
	if err != nil {
		return err
	}

	synchronized := make(chan time.Duration, 1)
	runtime, err := startRuntime(dir, n, synchronized)
	if err != nil {
		return err
	}
	defer runtime.Stop()
	d, err := startDaemon(program, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()

	var took time.Duration
	select {
	case took = <-synchronized:
	case <-ctx.Done():
		return fmt.Errorf("the plugin did not connect: %w\n%s", ctx.Err(), d.last())
	}
	began := time.Now()
	for {
		names, err := partition.List()
		if err != nil {
			return err
		}
		if len(names) == pods {
			break
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%d partitions of %d: %w", len(names), pods, ctx.Err())
		}
		time.Sleep(5 * time.Millisecond) // sysfs does not tell when a directory comes
	}
	took += time.Since(began)
	if err := d.waitMerged(ctx, pods*containers); err != nil {
		return err
	}

	first, err := d.cpu()
	if err != nil {
		return err
	}
	// Between the first merge and the next, by the interval, nothing is to be done.
	before, err := d.cpu()
	if err != nil {
		return err
	}
	time.Sleep(idle)
	after, err := d.cpu()
	if err != nil {
		return err
	}
	if merged := d.merged(); merged != pods*containers {
		return fmt.Errorf("%d merges while nothing was to be done", merged-pods*containers)
	}
	resident, err := d.resident()
	if err != nil {
		return err
	}
	quiet := after - before

	if err := d.waitMerged(ctx, 2*pods*containers); err != nil {
		return err
	}
	end, err := d.cpu()
	if err != nil {
		return err
	}
	round := end - after
	fmt.Printf("first merge of all  %8.2f s     of CPU time\n", first.Seconds())
	return report(took, resident, float64(quiet)/float64(idle), round)
}

// report prints what was measured, and returns an error for what is above its limit.
func report(reconcile time.Duration, resident int, busy float64, round time.Duration) error {
	fmt.Printf("start-up reconcile  %8.2f s     below %v\n", reconcile.Seconds(), maxReconcile)
	fmt.Printf("resident memory     %8.1f MiB   below %d MiB\n", float64(resident)/(1<<20), maxResident>>20)
	fmt.Printf("idle CPU            %8.3f %%     below %.1f %%\n", 100*busy, 100*maxIdle)
	fmt.Printf("round, no change    %8.2f s     of CPU time\n", round.Seconds())
	var over []string
	for what, is := range map[string]bool{
		"start-up reconcile": reconcile >= maxReconcile, "resident memory": resident >= maxResident,
		"idle CPU": busy >= maxIdle,
	} {
		if is {
			over = append(over, what)
		}
	}
	if len(over) > 0 {
		return fmt.Errorf("above the limit: %s", strings.Join(over, ", "))
	}
	return nil
}

// node is the containers.
type node struct {
	pods       []*api.PodSandbox
	containers []*api.Container
	processes  []*exec.Cmd
	cgroups    []string // in the order in which they were made
}

func startNode() (*node, error) {
	n := &node{}
	if err := n.cgroup(below); err != nil {
		return n, err
	}
	for p := range pods {
		pod := &api.PodSandbox{Id: id("pod", p), Name: fmt.Sprintf("pod-%d", p), Namespace: "bench"}
		n.pods = append(n.pods, pod)
		parent := filepath.Join(below, pod.Name)
		if err := n.cgroup(parent); err != nil {
			return n, err
		}
		for c := range containers {
			ctr := &api.Container{
				Id: id("container", p*containers+c), PodSandboxId: pod.Id, Name: fmt.Sprintf("container-%d", c),
				State: api.ContainerState_CONTAINER_RUNNING, Args: []string{"sleep", "infinity"},
				Mounts: []*api.Mount{{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro"}}},
			}
			path := filepath.Join(parent, ctr.Id)
			ctr.Linux = &api.LinuxContainer{CgroupsPath: "/" + path, Namespaces: []*api.LinuxNamespace{{Type: "pid"}}}
			if err := n.cgroup(path); err != nil {
				return n, err
			}
			if err := n.process(path); err != nil {
				return n, err
			}
			n.containers = append(n.containers, ctr)
		}
	}
	return n, nil
}

func id(kind string, n int) string {
	sum := sha256.Sum256(fmt.Append(nil, kind, n))
	return hex.EncodeToString(sum[:])
}

func (n *node) cgroup(path string) error {
	dir := filepath.Join(root, path)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	n.cgroups = append(n.cgroups, dir)
	return nil
}

func (n *node) process(cgroup string) error {
	dir, err := os.Open(filepath.Join(root, cgroup))
	if err != nil {
		return err
	}
	defer dir.Close()
	cmd := exec.Command("sleep", "infinity")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		return err
	}
	n.processes = append(n.processes, cmd)
	return nil
}

func (n *node) stop() error {
	for _, p := range n.processes {
		p.Process.Kill()
		p.Wait()
	}
	var errs []error
	for i := len(n.cgroups) - 1; i >= 0; i-- {
		errs = append(errs, os.Remove(n.cgroups[i]))
	}
	return errors.Join(errs...)
}

// silent is the log of the runtime's half.
type silent struct{}

func (silent) Debugf(context.Context, string, ...any) {}
func (silent) Infof(context.Context, string, ...any)  {}
func (silent) Warnf(context.Context, string, ...any)  {}
func (silent) Errorf(context.Context, string, ...any) {}

// startRuntime serves the node's containers, and tells how long a plugin takes to take
// them over.
func startRuntime(dir string, n *node, synchronized chan<- time.Duration) (*adaptation.Adaptation, error) {
	nrilog.Set(silent{})
	launched := true // the first is for plugins that the runtime has launched: none
	a, err := adaptation.New("bench", "v1",
		func(ctx context.Context, synchronize adaptation.SyncCB) error {
			began := time.Now()
			_, err := synchronize(ctx, n.pods, n.containers)
			if !launched && err == nil {
				synchronized <- time.Since(began)
			}
			launched = false
			return err
		},
		func(context.Context, []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) { return nil, nil },
		adaptation.WithSocketPath(filepath.Join(dir, "nri.sock")),
		adaptation.WithPluginPath(filepath.Join(dir, "plugins")),
		adaptation.WithPluginConfigPath(filepath.Join(dir, "conf.d")),
	)
	if err != nil {
		return nil, err
	}
	return a, a.Start()
}

// daemon is the plugin.
type daemon struct {
	cmd  *exec.Cmd
	read chan struct{} // closed when the log has ended

	mu    sync.Mutex    // protects what follows
	lines int           // of merges
	text  string        // the last line that is none
	more  chan struct{} // closed, and made anew, when there is more
}

func startDaemon(program, dir string) (*daemon, error) {
	path := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		return nil, err
	}
	d := &daemon{
		cmd:  exec.Command(program, "plugin", "-config", path, "-socket", filepath.Join(dir, "nri.sock")),
		read: make(chan struct{}), more: make(chan struct{}),
	}
	log, err := d.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	go d.follow(log)
	return d, nil
}

func (d *daemon) follow(log io.Reader) {
	defer close(d.read)
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		var line struct {
			Message string `json:"msg"`
		}
		err := json.Unmarshal(lines.Bytes(), &line)
		d.mu.Lock()
		if err == nil && (line.Message == "merged" || line.Message == "unchanged") {
			d.lines++
		} else {
			d.text = lines.Text()
		}
		close(d.more)
		d.more = make(chan struct{})
		d.mu.Unlock()
	}
}

// waitMerged waits until the log has so many merges of containers.
func (d *daemon) waitMerged(ctx context.Context, want int) error {
	for {
		d.mu.Lock()
		more := d.more
		d.mu.Unlock()
		if d.merged() >= want {
			return nil
		}
		select {
		case <-more:
		case <-d.read:
			return errors.New("the plugin ended: " + d.last())
		case <-ctx.Done():
			return fmt.Errorf("%d merges of %d: %w\n%s", d.merged(), want, ctx.Err(), d.last())
		}
	}
}

func (d *daemon) merged() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.lines
}

func (d *daemon) last() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text
}

// cpu is the CPU time that it has taken (clock_getcpuclockid(3)).
func (d *daemon) cpu() (time.Duration, error) {
	const scheduler = 2 // as the scheduler has it, and not in ticks
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^d.cmd.Process.Pid<<3|scheduler), &ts); err != nil {
		return 0, fmt.Errorf("CPU time of the plugin: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// resident is its memory that is present, in bytes.
func (d *daemon) resident() (int, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", d.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(data))
	if len(f) < 2 {
		return 0, fmt.Errorf("statm of another form: %q", data)
	}
	pages, err := strconv.Atoi(f[1])
	return pages * os.Getpagesize(), err
}

func (d *daemon) stop() error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	<-d.read
	return d.cmd.Wait()
}
