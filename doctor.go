package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/nri/pkg/api"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/cgroup"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/engine/kernel/detect"
	"github.com/selective-ksm/selective-ksm/engine/memory"
	"github.com/selective-ksm/selective-ksm/engine/optin"
	"github.com/selective-ksm/selective-ksm/engine/pressure"
)

// prerequisite is something that the engine needs, or could use.
type prerequisite struct {
	what string
	// needed is that the engine does not run without it.
	needed bool
	// err is why it is not there, and fix is what to do then.
	err error
	fix string
}

var errUnfit = errors.New("the engine could not run here: see what is missing")

// runDoctor says what this machine has of what is needed, and what to do for the rest.
// The error is that the engine could not run here.
func runDoctor(args []string) error {
	var path, socket string
	flags := newFlags("doctor")
	flags.StringVar(&path, "config", "", "")
	flags.StringVar(&socket, "socket", api.DefaultSocketPath, "")
	if err := parse(flags, args); err != nil {
		return err
	}
	cfg, err := load(path)
	if err != nil {
		return err
	}
	for _, f := range detect.Probe(lookFor(cfg)) {
		fmt.Printf("interface %s\n", f)
	}
	unfit := diagnose(os.Stdout, prerequisites(cfg, socket))
	// Not by its lock: an engine that starts meanwhile would find it taken.
	switch r, err := control.Ask(context.Background(), engine.RunDir); {
	case err == nil:
		fmt.Printf("running  engine %s, interface %s: no other can start beside it\n", r.Version, r.Interface)
	case !errors.Is(err, control.ErrNoEngine):
		fmt.Printf("running  could not tell: %v\n", err)
	}
	if unfit {
		return errUnfit
	}
	return nil
}

// diagnose says of each prerequisite whether it is there, and otherwise what to do. It
// reports whether the engine could not run.
func diagnose(out io.Writer, all []prerequisite) (unfit bool) {
	for _, p := range all {
		switch {
		case p.err == nil:
			fmt.Fprintf(out, "ok       %s\n", p.what)
			continue
		case p.needed:
			unfit = true
			fmt.Fprintf(out, "MISSING  %s: %v\n", p.what, p.err)
		default:
			fmt.Fprintf(out, "without  %s: %v\n", p.what, p.err)
		}
		fmt.Fprintf(out, "         fix: %s\n", p.fix)
	}
	return unfit
}

// prerequisites looks for all.
func prerequisites(cfg config.Config, socket string) []prerequisite {
	var root error
	if os.Geteuid() != 0 {
		root = errNotRoot
	}
	all := []prerequisite{{"root", true, root, "run it as root, or as a service of the machine"}}

	k, detail, err := detect.Open(lookFor(cfg))
	what := "kernel"
	if err == nil {
		what += ", used by " + detail
		err = suits(k, cfg)
	}
	// Such an error says what to do by itself.
	all = append(all, prerequisite{what, true, err, "kernel/README.md has kernels, and README.md what each can do"})
	wraps := cfg.OptIn == config.OptInWrapper
	if k != nil {
		wraps = wraps || cfg.OptIn == config.OptInAuto && !k.Features().Bind
		if k.Features().OneSpace {
			all = append(all, prerequisite{"merge space that is nobody else's", false, sharers(),
				"end these processes, or do not have them mergeable: nothing is merged beside those of other containers"})
		}
		if err := k.Close(); err != nil {
			all = append(all, prerequisite{what, true, err, "see the error"})
		}
	}
	all = append(all,
		prerequisite{"capabilities", true, capable(cfg), "give them to the container or service; examples/systemd has what each is for"},
		prerequisite{"the machine's processes", true, initPID(), "set hostPID: true for the pod, or run it outside of containers"},
		prerequisite{"cgroups at " + cgroup.DefaultRoot, true, exists(cgroup.DefaultRoot), "mount the machine's there, read-only"},
		prerequisite{"directory " + engine.RunDir, true, writable(engine.RunDir), "have the machine's there, for writing: the runtime mounts the wrapper from it"},
		prerequisite{"NRI at " + socket, false, connects(socket),
			"enable NRI in the runtime (for containerd 2 it is on by default), name its socket with -socket, or use hooks with selective-ksm daemon"},
	)
	if wraps {
		binary := cfg.Wrapper
		if binary == "" {
			binary = "/proc/self/exe"
		}
		all = append(all, prerequisite{"wrapper for containers", true, optin.CheckBinary(binary), "name a static one with wrapper in the configuration"})
	}
	all = append(all, prerequisite{"pressure stall information", false, exists(pressure.Node),
		"boot with psi=1; or set pressure: off, as merges do not come forward when memory is short"})
	if cfg.Pressure == config.PressurePod {
		all = append(all, prerequisite{"pressure stall information of pods", false, exists(filepath.Join(cgroup.DefaultRoot, "memory.pressure")),
			"set pressure: node, or mount cgroup v2 there, which alone has it"})
	}
	tells, err := memory.TellsDirty()
	if err == nil && !tells {
		err = errors.New("the kernel does not tell what was written to")
	}
	return append(all, prerequisite{"soft-dirty bits", false, err, "leave incremental at faults, which needs none; or boot a kernel with CONFIG_MEM_SOFT_DIRTY"})
}

// sharers says who shares the merge space.
func sharers() error {
	found, err := memory.AllMergeable()
	if err == nil && len(found) > 0 {
		err = fmt.Errorf("processes %d share it", found)
	}
	return err
}

// capability is one that the engine uses (capabilities(7)).
type capability struct {
	name  string
	bit   int
	needs func(config.Config) bool
}

var (
	always       = func(config.Config) bool { return true }
	bySyscall    = func(c config.Config) bool { return c.Interface == config.InterfaceSyscall }
	capabilities = []capability{
		{"CAP_SYS_PTRACE", unix.CAP_SYS_PTRACE, always},
		{"CAP_DAC_READ_SEARCH", unix.CAP_DAC_READ_SEARCH, always},
		{"CAP_DAC_OVERRIDE", unix.CAP_DAC_OVERRIDE, func(c config.Config) bool { return c.Incremental == config.BySoftDirty }},
		{"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN, bySyscall},
		{"CAP_SYS_NICE", unix.CAP_SYS_NICE, bySyscall},
	}
)

// capable says which capabilities are not there.
func capable(cfg config.Config) error {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	_, rest, _ := strings.Cut(string(status), "\nCapEff:")
	line, _, _ := strings.Cut(rest, "\n")
	have, err := strconv.ParseUint(strings.TrimSpace(line), 16, 64)
	if err != nil {
		return fmt.Errorf("/proc/self/status: %w", err)
	}
	var lacks []string
	for _, c := range capabilities {
		// CAP_DAC_OVERRIDE has all that CAP_DAC_READ_SEARCH has.
		overridden := c.bit == unix.CAP_DAC_READ_SEARCH && have&(1<<unix.CAP_DAC_OVERRIDE) != 0
		if c.needs(cfg) && have&(1<<c.bit) == 0 && !overridden {
			lacks = append(lacks, c.name)
		}
	}
	if len(lacks) > 0 {
		return fmt.Errorf("no %s", strings.Join(slices.Sorted(slices.Values(lacks)), ", "))
	}
	return nil
}

// initPIDNamespace is the inode of the machine's pid namespace (PROC_PID_INIT_INO in the
// kernel's include/linux/proc_ns.h).
const initPIDNamespace = 0xEFFFFFFC

// initPID says that others' processes cannot be seen.
func initPID() error {
	info, err := os.Stat("/proc/self/ns/pid")
	if err != nil {
		return err
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Ino != initPIDNamespace {
		return errors.New("this is a pid namespace of its own")
	}
	return nil
}

// writable says why nothing can be written in a directory, which need not be there yet.
func writable(dir string) error {
	for {
		err := unix.Access(dir, unix.W_OK)
		if parent := dir[:max(strings.LastIndexByte(dir, '/'), 1)]; errors.Is(err, unix.ENOENT) && parent != dir {
			dir = parent
			continue
		}
		if err != nil {
			return &os.PathError{Op: "write", Path: dir, Err: err}
		}
		return nil
	}
}

// connects says why a socket does not take connections.
func connects(socket string) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	return conn.Close()
}

func exists(path string) error {
	_, err := os.Stat(path)
	return err
}
