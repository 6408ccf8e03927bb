// Package node runs a containerd of the test's own, with a root directory,
// sockets and NRI plugins that nothing else on the machine uses, and runs pods
// on it over CRI. Pods have the machine's network, so no network plugin is
// needed.
package node

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"text/template"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selective-ksm/selective-ksm/test/e2e/image"
)

// Config says what a node is made from.
type Config struct {
	// Tools is the directory with containerd, its shim and ctr, and runc.
	Tools string
	// Workload is the program of all containers, pause included.
	Workload string
	// Plugin, if not empty, is an NRI plugin for containerd to launch by
	// itself, under the name PluginName with the configuration PluginConfig.
	Plugin, PluginName, PluginConfig string
	// PluginTimeout is how long a plugin may take to answer before containerd
	// disconnects it. Zero is ten times the usual, as the other time limits.
	PluginTimeout time.Duration
	// Hooks, if not nil, are those of all containers' bundles, pause's included.
	Hooks *specs.Hooks
	// Under, if not empty, is a command that becomes containerd when it is given that as
	// further arguments.
	Under []string
	// File, if not empty, is a configuration of containerd to start it with, that
	// imports those in conf.d beside it. The node's own is put there, without NRI's
	// settings: these are the file's, and the fields above have no effect.
	File string
}

// DefaultPluginTimeout is containerd's own PluginTimeout.
const DefaultPluginTimeout = 2 * time.Second

// Built returns a Config with the tools and the workload of a build directory.
func Built(build string) Config {
	return Config{Tools: filepath.Join(build, "tools"), Workload: filepath.Join(build, "bin", "workload")}
}

// Node is a running containerd.
type Node struct {
	dir    string
	tools  string
	under  []string
	config string // containerd's
	socket string // NRI's
	cri    runtime.RuntimeServiceClient
	conn   *grpc.ClientConn
	pods   atomic.Int64 // run so far

	containerd *exec.Cmd
	exited     chan struct{} // closed when containerd has exited
	exitErr    error         // set before
}

// Image is the only image's name. It has one file, its entry point, which is also what
// pause runs.
const (
	Image        = "selective-ksm.test/workload:latest"
	workloadPath = "/workload"
)

// configTemplate is containerd's configuration. Its time limits are ten times
// the usual, as an emulated machine is ten times slower.
var configTemplate = template.Must(template.New("config").Parse(`version = 4
root = '{{.Dir}}/root'
state = '{{.Dir}}/state'
imports = []
disabled_plugins = ['io.containerd.internal.v1.opt']

[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '` + Image + `'

[plugins.'io.containerd.cri.v1.runtime']
  # Without CAP_SYS_RESOURCE, as in a machine that is itself a container,
  # lowering a score is refused.
  restrict_oom_score_adj = true

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
{{- if .Hooks}}
  base_runtime_spec = '{{.Dir}}/base.json'
{{- end}}
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    Root = '{{.Dir}}/runc'

{{if .PluginTimeout -}}
[plugins.'io.containerd.nri.v1.nri']
  socket_path = '{{.Dir}}/nri.sock'
  plugin_path = '{{.Dir}}/plugins'
  plugin_config_path = '{{.Dir}}/conf.d'
  plugin_registration_timeout = '50s'
  plugin_request_timeout = '{{.PluginTimeout}}'
{{- end}}

[plugins.'io.containerd.server.v1.grpc']
  address = '{{.Dir}}/containerd.sock'

[plugins.'io.containerd.server.v1.ttrpc']
  address = '{{.Dir}}/containerd.sock.ttrpc'

[timeouts]
  'io.containerd.timeout.shim.cleanup' = '50s'
  'io.containerd.timeout.shim.load' = '50s'
  'io.containerd.timeout.shim.shutdown' = '30s'
  'io.containerd.timeout.task.state' = '20s'
`))

// Start starts containerd, waits until it answers, and gives it the workload's
// image.
func Start(ctx context.Context, c Config) (_ *Node, err error) {
	// On a tmpfs: overlayfs does not take its own kind for a container's
	// upper directory, and that is what /tmp may be.
	dir, err := os.MkdirTemp("/run", "selective-ksm-test-")
	if err != nil {
		return nil, fmt.Errorf("start node: %w", err)
	}
	n := &Node{dir: dir, tools: c.Tools, under: c.Under}
	n.config, n.socket = n.Path("config.toml"), n.Path("nri.sock")
	defer func() {
		if err != nil {
			err = fmt.Errorf("start node: %w\n%s", err, n.Log())
			err = errors.Join(err, n.Stop(context.WithoutCancel(ctx)))
		}
	}()
	// Root of a user namespace is another user, and its root directory is in there.
	if err := os.Chmod(dir, 0o711); err != nil {
		return nil, err
	}
	if err := n.configure(c); err != nil {
		return nil, err
	}
	n.conn, err = grpc.NewClient("unix://"+n.Path("containerd.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond},
		}))
	if err != nil {
		return nil, err
	}
	n.cri = runtime.NewRuntimeServiceClient(n.conn)
	if err := n.startContainerd(ctx); err != nil {
		return nil, err
	}
	if err := n.importWorkload(ctx, c.Workload); err != nil {
		return nil, err
	}
	return n, nil
}

// Path returns the path of a file or directory of the node's own.
func (n *Node) Path(name string) string { return filepath.Join(n.dir, name) }

// NRISocket returns the socket on which containerd waits for plugins.
func (n *Node) NRISocket() string { return n.socket }

// Stop stops and removes all pods, stops containerd, and removes all that the
// node left on disk.
func (n *Node) Stop(ctx context.Context) error {
	var errs []error
	if n.containerd != nil {
		errs = append(errs, n.removePods(ctx))
		errs = append(errs, n.stopContainerd())
	}
	if n.conn != nil {
		errs = append(errs, n.conn.Close())
	}
	errs = append(errs, n.unmountAll())
	errs = append(errs, os.RemoveAll(n.dir))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("stop node: %w", err)
	}
	return nil
}

// Log returns the warnings and errors at the end of containerd's log.
func (n *Node) Log() string {
	f, err := os.Open(n.Path("containerd.log"))
	if err != nil {
		return ""
	}
	defer f.Close()
	const most = 20
	var kept []string
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		if strings.Contains(line, "level=info") || strings.Contains(line, "level=debug") {
			continue
		}
		if kept = append(kept, line); len(kept) > most {
			kept = kept[1:]
		}
	}
	return "containerd's log, warnings and errors:\n" + strings.Join(kept, "\n")
}

func (n *Node) configure(c Config) error {
	for _, name := range []string{"plugins", "conf.d", "logs", "control"} {
		if err := os.Mkdir(n.Path(name), 0o755); err != nil {
			return err
		}
	}
	timeout := c.PluginTimeout
	if timeout == 0 {
		timeout = 10 * DefaultPluginTimeout
	}
	own := n.config
	if c.File != "" {
		own = filepath.Join(filepath.Dir(c.File), "conf.d", "99-node.toml")
		n.config, n.socket, timeout = c.File, api.DefaultSocketPath, 0
	}
	var text strings.Builder
	if err := configTemplate.Execute(&text, struct {
		Dir           string
		PluginTimeout time.Duration
		Hooks         bool
	}{n.dir, timeout, c.Hooks != nil}); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	if c.Hooks != nil {
		if err := n.base(c.Hooks); err != nil {
			return err
		}
	}
	if err := os.WriteFile(own, []byte(text.String()), 0o644); err != nil {
		return err
	}
	if c.Plugin == "" {
		return nil
	}
	if err := os.WriteFile(n.Path("conf.d/"+c.PluginName+".conf"), []byte(c.PluginConfig), 0o644); err != nil {
		return err
	}
	return copyProgram(n.Path("plugins/"+c.PluginName), c.Plugin)
}

// base writes what containerd makes all containers' configurations of: its own, with hooks.
func (n *Node) base(hooks *specs.Hooks) error {
	out, err := exec.Command(filepath.Join(n.tools, "ctr"), "oci", "spec").Output()
	if err != nil {
		return fmt.Errorf("ctr oci spec: %w", err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(out, &spec); err != nil {
		return fmt.Errorf("ctr oci spec: %w", err)
	}
	spec.Hooks = hooks
	data, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	return os.WriteFile(n.Path("base.json"), data, 0o644)
}

func copyProgram(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

func (n *Node) startContainerd(ctx context.Context) error {
	log, err := os.OpenFile(n.Path("containerd.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	tools, err := filepath.Abs(n.tools)
	if err != nil {
		return err
	}
	args := slices.Concat(n.under, []string{filepath.Join(tools, "containerd"), "--config", n.config})
	cmd := exec.Command(args[0], args[1:]...)
	// containerd looks for its shim in PATH, and the shim for runc.
	cmd.Env = append(os.Environ(), "PATH="+tools+":"+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	n.containerd, n.exited = cmd, make(chan struct{})
	go func() {
		defer close(n.exited)
		n.exitErr = cmd.Wait()
	}()

	return n.waitForCRI(ctx)
}

// Kill kills containerd as the kernel would, and waits until it is gone. Containers
// run on. [Node.Restart] comes next.
func (n *Node) Kill() error {
	if err := n.containerd.Process.Kill(); err != nil {
		return fmt.Errorf("kill containerd: %w", err)
	}
	<-n.exited
	n.containerd = nil
	return nil
}

// Restart starts a containerd that was killed, and waits until it answers.
func (n *Node) Restart(ctx context.Context) error {
	if err := n.startContainerd(ctx); err != nil {
		return fmt.Errorf("restart containerd: %w", err)
	}
	return nil
}

// CRI is the runtime's own interface, for what the methods of a node do not have.
func (n *Node) CRI() runtime.RuntimeServiceClient { return n.cri }

// waitForCRI polls: the socket is there before the CRI service answers, and
// nothing tells when it does.
func (n *Node) waitForCRI(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := n.cri.Version(ctx, &runtime.VersionRequest{})
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-n.exited:
			return fmt.Errorf("containerd exited: %v", n.exitErr)
		case <-ctx.Done():
			return fmt.Errorf("wait for containerd to answer: %w", errors.Join(context.Cause(ctx), err))
		}
	}
}

func (n *Node) stopContainerd() error {
	// It may have exited by itself; waiting tells.
	n.containerd.Process.Signal(syscall.SIGTERM)
	var late error
	select {
	case <-n.exited:
	case <-time.After(stopGrace):
		n.containerd.Process.Kill()
		<-n.exited
		late = errors.New("containerd did not stop when asked to, and was killed")
	}
	return errors.Join(late, n.exitErr)
}

func (n *Node) importWorkload(ctx context.Context, program string) error {
	f, err := os.Create(n.Path("image.tar"))
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	m := image.Image{Name: Image, Program: program, Path: workloadPath}
	if err := errors.Join(m.Write(f), f.Close()); err != nil {
		return err
	}
	return n.Import(ctx, f.Name(), Image)
}

// Import gives containerd the image in a tar archive, which has a name in it.
func (n *Node) Import(ctx context.Context, archive, name string) error {
	out, err := exec.CommandContext(ctx, filepath.Join(n.tools, "ctr"),
		"--address", n.Path("containerd.sock"), "--namespace", "k8s.io",
		"images", "import", archive).CombinedOutput()
	if err != nil {
		return fmt.Errorf("import image: %w\n%s", err, out)
	}
	// CRI hears of an import from an event, in its own time.
	images := runtime.NewImageServiceClient(n.conn)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		r, err := images.ImageStatus(ctx, &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: name}})
		if err != nil {
			return fmt.Errorf("look for image: %w", err)
		}
		if r.GetImage() != nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for the image to be known: %w", context.Cause(ctx))
		}
	}
}

// unmountAll unmounts what a containerd that was killed left behind, so that
// removing the directory does not reach into a container.
func (n *Node) unmountAll() error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	var errs []error
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && strings.HasPrefix(fields[4], n.dir+"/") {
			if err := syscall.Unmount(fields[4], syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) {
				errs = append(errs, fmt.Errorf("unmount %s: %w", fields[4], err))
			}
		}
	}
	return errors.Join(append(errs, lines.Err())...)
}
