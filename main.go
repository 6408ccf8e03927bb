// Command selective-ksm merges the identical memory of containers inside of
// partitions that the kernel keeps apart.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"reflect"
	"runtime/debug"
	"sync"

	"github.com/containerd/nri/pkg/api"
	"github.com/sirupsen/logrus"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/budget"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/kernel/detect"
	"github.com/selective-ksm/selective-ksm/engine/kernel/mainline"
	kernelsyscall "github.com/selective-ksm/selective-ksm/engine/kernel/syscall"
	"github.com/selective-ksm/selective-ksm/engine/memory"
	"github.com/selective-ksm/selective-ksm/engine/optin"
	"github.com/selective-ksm/selective-ksm/hooks"
	"github.com/selective-ksm/selective-ksm/plugin"
)

const usage = `selective-ksm merges the identical memory of containers, inside of partitions only.

  selective-ksm plugin [-config FILE] [-name NAME] [-idx NN] [-socket PATH]
                       [-metrics [HOST]:PORT] [-remove-on-exit]
        run as an NRI plugin that connects to the container runtime. -metrics is for
        Prometheus: without HOST only this machine reaches it. -remove-on-exit unmerges
        and removes the partitions at the end, which otherwise stay
  selective-ksm daemon [-config FILE] [-metrics [HOST]:PORT]
        run without NRI, for containers that OCI hooks tell of
  selective-ksm hook createRuntime|poststart|poststop [-config FILE] [-deadline 1s] [-strict]
        be an OCI hook: the state of the container is read from standard input
  selective-ksm hook install [-dir DIR] [-config FILE] [-deadline 1s] [-annotation KEY=VALUE]...
        have CRI-O and podman run the hooks, for all containers or those with annotations
  selective-ksm hook uninstall [-dir DIR]
        take the hooks out of the directory
  selective-ksm hook validate [-dir DIR]... [-annotation KEY=VALUE]...
        check that a container with these annotations would have the hooks
  selective-ksm runtime -- RUNTIME [ARG]...
        make this process mergeable, and so its containers, and become an OCI runtime
  selective-ksm status [-json] [-watch[=2s]]
        show what the running engine has, and why what is not merged; it fails where
        none runs
  selective-ksm explain POD|CONTAINER
        say what becomes of a container, and why; names as status has them, or an id
  selective-ksm merge [PARTITION]
        have the running engine merge a partition now, or all
  selective-ksm unmerge [PARTITION]
        have it unmerge a partition, or all, and not merge it until merge asks for it
  selective-ksm doctor [-config FILE] [-socket PATH]
        say what this machine has of what is needed, and what to do for the rest
  selective-ksm estimate [-config FILE] [-pid N]... [-interval 5s] [-sample 1] [-json]
        say what each policy would save of the containers that run, or of processes; changes nothing
  selective-ksm audit [-config FILE] [-by container|pod|group|namespace] [-strict] [-json]
        prove by physical pages that nothing is merged across partitions, those of the running
        engine or by policy; exit 1 if something is, with -strict also with a process in none,
        and 3 if it could not look
  selective-ksm report [-status FILE]... [-estimate FILE] [-bench FILE] [-o FILE]
        write one HTML page of what status, estimate and benchmarks told as JSON
  selective-ksm optin -- COMMAND [ARG]...
        make this process mergeable and become COMMAND
  selective-ksm version
  selective-ksm help

Launched by a runtime from its NRI plugin directory it needs no arguments.
`

// Exit statuses.
const (
	exitFailed = 1
	exitUsage  = 2
	exitBlind  = 3 // of an audit that has proved nothing
)

// collect is how much garbage there may be, in percent of what is in use.
const collect = 25

// errUsage is matched by errors of the command line.
var errUsage = errors.New("see selective-ksm help")

func main() {
	args := os.Args[1:]
	if len(args) == 0 && plugin.Launched() {
		args = []string{"plugin"}
	}
	if len(args) == 0 {
		args = []string{""}
	}
	var err error
	switch args[0] {
	case "plugin":
		err = runPlugin(args[1:])
	case "merge":
		err = runMerge(args[1:])
	case "unmerge":
		err = runUnmerge(args[1:])
	case "explain":
		err = runExplain(args[1:])
	case "status":
		err = runStatus(args[1:])
	case "doctor":
		err = runDoctor(args[1:])
	case "estimate":
		err = runEstimate(args[1:])
	case "audit":
		err = runAudit(args[1:])
	case "report":
		err = runReport(args[1:])
	case "daemon":
		err = runDaemon(args[1:])
	case "hook":
		err = runHook(args[1:])
	case "runtime":
		err = runRuntime(args[1:])
	case optin.Command:
		status, err := optin.Exec(args[1:])
		complain(err)
		os.Exit(status)
	case "version":
		fmt.Println(currentVersion())
	case "help", "-h", "-help", "--help":
		fmt.Print(usage)
	case "":
		err = fmt.Errorf("no command: %w", errUsage)
	default:
		err = fmt.Errorf("unknown command %q: %w", args[0], errUsage)
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(usage)
	case errors.Is(err, errUsage):
		complain(err)
		os.Exit(exitUsage)
	case errors.Is(err, errBlind):
		complain(err)
		os.Exit(exitBlind)
	case err != nil:
		complain(err)
		os.Exit(exitFailed)
	}
}

func newFlags(name string) *flag.FlagSet {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	return flags
}

// parse parses flags of a command that takes nothing else.
func parse(flags *flag.FlagSet, args []string) error {
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return err
	} else if err != nil {
		return fmt.Errorf("%s: %w: %w", flags.Name(), err, errUsage)
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("%s: argument %q is not known: %w", flags.Name(), flags.Arg(0), errUsage)
	}
	return nil
}

func complain(err error) { fmt.Fprintf(os.Stderr, "selective-ksm: %v\n", err) }

// runPlugin runs the plugin until a signal ends it, or its runtime. What is merged
// then stays merged, unless a flag says otherwise.
func runPlugin(args []string) error {
	var (
		path, address string
		remove        bool
		o             plugin.Options
	)
	flags := newFlags("plugin")
	flags.StringVar(&path, "config", "", "")
	flags.StringVar(&o.Name, "name", "selective-ksm", "")
	flags.StringVar(&o.Index, "idx", "90", "")
	flags.StringVar(&o.Socket, "socket", api.DefaultSocketPath, "")
	flags.StringVar(&address, "metrics", "", "")
	flags.BoolVar(&remove, "remove-on-exit", false, "")
	if err := parse(flags, args); err != nil {
		return err
	}
	if err := api.CheckPluginIndex(o.Index); err != nil {
		return fmt.Errorf("plugin: -idx %s: write two digits: %w", o.Index, errUsage)
	}

	h, err := openHost(path)
	if err != nil {
		return err
	}
	defer h.Close()
	h.remove = remove
	if err := h.serveMetrics(address); err != nil {
		return err
	}
	e, cfg, log := h.engine, h.cfg, h.log
	if path != "" {
		o.Config = &cfg
	}
	registry := hooks.NewRegistry(e, h.members, cfg, log)
	o.Log, o.Dir, o.Interface = log, engine.RunDir, interfaceOf(h.kernel)
	o.Engine = reporting{e, registry, sync.OnceFunc(h.report), sync.OnceFunc(h.ready)}
	o.Ignored = h.metrics.Ignored
	o.Apply = func(c config.Config) error {
		if path == "" && !reflect.DeepEqual(lookFor(c), lookFor(cfg)) {
			log.Warn("interface, syscalls and mainlinePartition are taken from a file that -config names, not from the runtime")
		}
		return h.apply(c, registry)
	}
	o.Load = h.reload
	reload := make(chan struct{})
	o.Reload = reload
	return h.run(registry, func(ctx context.Context) error {
		return h.watching(ctx, reload, func(ctx context.Context) error { return plugin.Run(ctx, o) })
	})
}

// interfaceOf names an interface as the configuration does.
func interfaceOf(k kernel.Kernel) string {
	switch k.(type) {
	case *mainline.Kernel:
		return string(config.InterfaceMainline)
	case *kernelsyscall.Kernel:
		return string(config.InterfaceSyscall)
	}
	return string(config.InterfaceSysfs)
}

// reporting is an engine that says what the kernel has when the runtime is there. A
// plugin that cannot start says why, and no more.
type reporting struct {
	*engine.Engine
	hooks  *hooks.Registry
	report func()
	ready  func()
}

// Reconcile takes over what the runtime has, and what hooks have told of.
func (r reporting) Reconcile(created, running []engine.Container) error {
	r.report()
	defer r.ready()
	return r.hooks.Reconcile(created, running)
}

// load reads the configuration, if there is a file.
func load(path string) (config.Config, error) {
	if path == "" {
		return config.Default(), nil
	}
	return config.Load(path)
}

// lookFor says what to look for in the kernel.
func lookFor(c config.Config) detect.Options {
	o := detect.Options{Interface: detect.Interface(c.Interface), Mainline: mainline.Options{Dir: engine.RunDir}}
	if len(c.Syscalls) == 2 {
		o.Syscalls = &kernelsyscall.Numbers{Open: uintptr(c.Syscalls[0]), Merge: uintptr(c.Syscalls[1])}
	}
	if c.MainlinePartition == config.First {
		o.Mainline.First = true
	} else {
		o.Mainline.Partition = c.MainlinePartition
	}
	return o
}

// suits returns an error if a kernel would merge what the configuration leaves out.
func suits(k kernel.Kernel, c config.Config) error {
	if k.Features().OneSpace && !c.Secrets {
		return errors.New("secrets: false: an unpatched kernel merges all memory of a process, that which is marked as secret too: " +
			"set secrets: true to accept that, or boot a kernel with Selective KSM")
	}
	return nil
}

// settings are the engine's.
func settings(c config.Config, log logrus.FieldLogger) engine.Settings {
	s := engine.Settings{
		StartDelays: c.StartDelays,
		Interval:    c.Interval,
		MaxInterval: c.MaxInterval,
		Budget: budget.Limits{
			Total: c.Budget, Partition: c.PartitionBudget, Window: c.BudgetWindow, Workers: c.Workers,
		},
		Pressure: engine.Pressure(c.Pressure),
		Zero:     c.ZeroPages,
		Dirty:    c.Incremental == config.BySoftDirty && tellsDirty(log),
		OptedIn:  c.OptIn != config.OptInAuto,
	}
	if s.MaxInterval == 0 {
		s.MaxInterval = 8 * c.Interval
	}
	return s
}

// tellsDirty reports whether the kernel knows what was written to, and says so if not.
func tellsDirty(log logrus.FieldLogger) bool {
	tells, err := memory.TellsDirty()
	if err == nil && !tells {
		err = errors.New("the kernel does not tell what was written to")
	}
	if err != nil {
		log.WithError(err).Warn("incremental: softDirty is not used, but faults")
	}
	return err == nil
}

// millis is RFC 3339 to the millisecond: merges are often shorter than a second.
const millis = "2006-01-02T15:04:05.000Z07:00"

// openLog opens what the log goes to.
func openLog(c config.Config) (*os.File, error) {
	if c.LogFile == "" {
		return os.Stderr, nil
	}
	file, err := os.OpenFile(c.LogFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return nil, fmt.Errorf("logFile: %w: name a file that can be written", err)
	}
	return file, nil
}

// setLog makes the log as it is configured, or leaves it as it was. A file is opened
// anew, as the one before may have been moved away.
func setLog(log *logrus.Logger, c config.Config) error {
	out, err := openLog(c)
	if err != nil {
		return err
	}
	before := log.Out
	log.SetOutput(out)
	if file, ok := before.(*os.File); ok && file != os.Stderr {
		// There is nowhere to say that this failed, and nothing to be done.
		_ = file.Close()
	}
	// The configuration has been checked for a level that there is.
	if level, err := logrus.ParseLevel(c.LogLevel); err == nil {
		log.SetLevel(level)
	}
	if c.LogFormat == config.LogJSON {
		log.SetFormatter(&logrus.JSONFormatter{TimestampFormat: millis})
	} else {
		log.SetFormatter(&logrus.TextFormatter{FullTimestamp: true})
	}
	return nil
}

// version is set when a release is built.
var version string

// currentVersion is that of the release, or of the module.
func currentVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}
