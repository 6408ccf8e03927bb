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
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"

	"github.com/containerd/nri/pkg/api"
	"github.com/sirupsen/logrus"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/kernel/sysfs"
	"github.com/selective-ksm/selective-ksm/engine/optin"
	"github.com/selective-ksm/selective-ksm/plugin"
)

const usage = `selective-ksm merges the identical memory of containers, inside their pod only.

  selective-ksm plugin [-config FILE] [-name NAME] [-idx NN] [-socket PATH]
        run as an NRI plugin that connects to the container runtime
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
)

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
	case err != nil:
		complain(err)
		os.Exit(exitFailed)
	}
}

func complain(err error) { fmt.Fprintf(os.Stderr, "selective-ksm: %v\n", err) }

// runPlugin runs the plugin until a signal ends it, or its runtime. What is merged
// then stays merged.
func runPlugin(args []string) error {
	var (
		path string
		o    plugin.Options
	)
	flags := flag.NewFlagSet("plugin", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&path, "config", "", "")
	flags.StringVar(&o.Name, "name", "selective-ksm", "")
	flags.StringVar(&o.Index, "idx", "90", "")
	flags.StringVar(&o.Socket, "socket", api.DefaultSocketPath, "")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return err
	} else if err != nil {
		return fmt.Errorf("plugin: %w: %w", err, errUsage)
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("plugin: argument %q is not known: %w", flags.Arg(0), errUsage)
	}
	if err := api.CheckPluginIndex(o.Index); err != nil {
		return fmt.Errorf("plugin: -idx %s: write two digits: %w", o.Index, errUsage)
	}

	cfg := config.Default()
	if path != "" {
		var err error
		if cfg, err = config.Load(path); err != nil {
			return err
		}
		o.Config = &cfg
	}
	if os.Geteuid() != 0 {
		return errors.New("not root: the kernel lets only root merge the memory of others")
	}
	ksm, err := sysfs.Open()
	if err != nil {
		return err
	}

	log := logrus.New()
	if err := setLog(log, cfg); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	e := engine.New(engine.Options{
		Kernel:      ksm,
		Owned:       config.Owned,
		StartDelays: cfg.StartDelays,
		Interval:    cfg.Interval,
		Log:         log,
	})
	o.Engine, o.Log, o.Dir = e, log, plugin.DefaultDir
	o.Apply = func(c config.Config) error {
		if err := setLog(log, c); err != nil {
			return err
		}
		e.SetSchedule(c.StartDelays, c.Interval)
		return nil
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { e.Run(ctx) })
	defer running.Wait()
	defer cancel()
	log.WithFields(logrus.Fields{"version": currentVersion(), "interface": ksm.Root()}).Debug("selective KSM is there")
	return plugin.Run(ctx, o)
}

// millis is RFC 3339 to the millisecond: merges are often shorter than a second.
const millis = "2006-01-02T15:04:05.000Z07:00"

// setLog makes the log as it is configured, or leaves it as it was.
func setLog(log *logrus.Logger, c config.Config) error {
	if c.LogFile != "" {
		// Open until the process ends: a configuration comes only once.
		file, err := os.OpenFile(c.LogFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
		if err != nil {
			return fmt.Errorf("logFile: %w: name a file that can be written", err)
		}
		log.SetOutput(file)
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
