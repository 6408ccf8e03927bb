package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/syslog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/config/watch"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/optin"
	"github.com/selective-ksm/selective-ksm/hooks"
	"github.com/selective-ksm/selective-ksm/hooks/hooksd"
)

// worker is the subcommand of hook by which one starts an engine.
const worker = "worker"

var errNotRoot = errors.New("not root: the kernel lets only root merge the memory of others")

// runDaemon runs the engine for containers that hooks tell of, until a signal ends it.
func runDaemon(args []string) error {
	var path, address string
	flags := newFlags("daemon")
	flags.StringVar(&path, "config", "", "")
	flags.StringVar(&address, "metrics", "", "")
	if err := parse(flags, args); err != nil {
		return err
	}
	h, err := openHost(path)
	if err != nil {
		return err
	}
	defer h.Close()
	if err := h.serveMetrics(address); err != nil {
		return err
	}
	h.report()
	r := hooks.NewRegistry(h.engine, h.members, h.cfg, h.log)
	if err := r.Reconcile(nil, nil); err != nil {
		h.log.WithError(err).Warn("partitions that are not needed any more may stay")
	}
	changed := make(chan struct{})
	return h.run(r, func(ctx context.Context) error {
		h.ready()
		return h.watching(ctx, changed, func(ctx context.Context) error {
			watch.Reload(ctx, changed, h.log, func() error {
				c, err := h.reload()
				if err != nil {
					return err
				}
				return h.apply(c, r)
			})
			return nil
		})
	})
}

// runHook is a hook, or what installs them.
func runHook(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("hook: no stage: %w", errUsage)
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		return flag.ErrHelp
	case "install":
		return runInstall(args[1:])
	case "uninstall":
		return runUninstall(args[1:])
	case "validate":
		return runValidate(args[1:])
	case worker:
		return runWorker(args[1:])
	}
	stage := hooks.Stage(args[0])
	strict, err := runStage(stage, args[1:])
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return err
	}
	os.Exit(failed(fmt.Errorf("hook %s: %w", stage, err), strict && !errors.Is(err, hooks.ErrLeftOut)))
	return nil
}

// logPatience is how long the system's log may take for a line: it may hang, and has a
// socket that fills then.
const logPatience = 200 * time.Millisecond

// failed says in a line why a hook could not do its work, and returns its exit status:
// a runtime takes any but 0 for the container's failure.
func failed(err error, strict bool) int {
	line := strings.ReplaceAll(err.Error(), "\n", "; ")
	complain(errors.New(line))
	logged := make(chan struct{})
	go func() {
		defer close(logged)
		if w, missing := syslog.New(syslog.LOG_DAEMON|syslog.LOG_WARNING, "selective-ksm"); missing == nil {
			// Standard error has it already.
			_ = w.Warning(line)
			w.Close()
		}
	}()
	select {
	case <-logged:
	case <-time.After(logPatience): // the program ends, and that with it
	}
	if strict {
		return exitFailed
	}
	return 0
}

// runStage is a hook. It reports whether a failure is to be the container's.
func runStage(stage hooks.Stage, args []string) (strict bool, err error) {
	var path string
	var deadline time.Duration
	// The caller puts the stage before it, as before every error.
	flags := newFlags("arguments")
	flags.StringVar(&path, "config", "", "")
	flags.DurationVar(&deadline, "deadline", hooks.Deadline, "")
	flags.BoolVar(&strict, "strict", false, "")
	if err := parse(flags, args); err != nil {
		return strict, err
	}
	if !slices.Contains(hooks.Stages, stage) {
		return strict, fmt.Errorf("the stage is not known: %w", errUsage)
	}
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	// A call to the system may take longer, and end for nothing.
	defer time.AfterFunc(2*deadline, func() {
		os.Exit(failed(fmt.Errorf("hook %s: not done within %v", stage, 2*deadline), strict))
	}).Stop()
	return strict, withoutPanic(func() error {
		cfg, err := load(path)
		if err != nil {
			return err
		}
		if os.Geteuid() != 0 {
			return errNotRoot
		}
		return hooks.Run(ctx, stage, input{ctx}, hooks.Options{
			Dir:    engine.RunDir,
			Policy: cfg,
			Spawn: func(containerID string) error {
				self, err := os.Executable()
				if err != nil {
					return err
				}
				// An id may begin with a dash.
				return hooks.Detach(self, "hook", worker, "-config", path, "--", containerID)
			},
		})
	})
}

// withoutPanic makes an error of a panic, which would fail the container.
func withoutPanic(do func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return do()
}

// input is standard input, as long as a context has not ended: a runtime may not close it.
type input struct{ ctx context.Context }

func (i input) Read(into []byte) (int, error) {
	for {
		wait := time.Second
		if end, ok := i.ctx.Deadline(); ok {
			wait = time.Until(end)
		}
		if wait <= 0 || i.ctx.Err() != nil {
			return 0, fmt.Errorf("standard input: %w", context.DeadlineExceeded)
		}
		fds := []unix.PollFd{{Fd: int32(os.Stdin.Fd()), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(wait.Milliseconds())+1)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("standard input: %w", err)
		case n > 0:
			return os.Stdin.Read(into)
		}
	}
}

// runWorker is an engine that a hook has started for one container, and that ends when
// there is nothing to do for that and others.
func runWorker(args []string) (err error) {
	var path string
	flags := newFlags("hook " + worker)
	flags.StringVar(&path, "config", "", "")
	if err := flags.Parse(args); err != nil || flags.NArg() != 1 {
		return fmt.Errorf("hook %s: is for hooks to start: %w", worker, errUsage)
	}
	cfg, err := load(path)
	if err != nil {
		return err
	}
	log := logrus.New()
	out := io.Discard
	if w, err := syslog.New(syslog.LOG_DAEMON|syslog.LOG_INFO, "selective-ksm"); err == nil {
		defer w.Close()
		out = w
	}
	defer func() {
		// Nobody reads its standard error.
		if err != nil {
			log.WithError(err).Error("containers that hooks have told of are not merged")
		}
	}()
	if err := workerLog(log, out, cfg); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if cfg.Interface == config.InterfaceSyscall {
		return errors.New("interface: syscall: a partition ends with the engine: run selective-ksm daemon")
	}
	if err := hooks.Leave(); err != nil {
		log.WithError(err).Debug("not parted from the container runtime: what ends its cgroup ends the merges after the start, too")
	}
	// Merged after their start, and for no other reason.
	cfg.Pressure = config.PressureOff
	cfg.Interval, cfg.MaxInterval = forever, forever
	log.WithField("container_id", flags.Arg(0)).Debug("worker started")
	h, err := lockHost(cfg, log, func(ctx context.Context, dir string) (*os.File, error) {
		return hooks.LockOrSync(ctx, dir, flags.Arg(0))
	})
	if err != nil || h == nil {
		return err
	}
	defer h.Close()
	w := hooks.NewWorker(h.engine, h.members, cfg, log, h.kernel.Features().OneSpace)
	if err := w.Reconcile(nil, nil); err != nil {
		log.WithError(err).Warn("partitions that are not needed any more may stay")
	}
	defer log.Debug("worker ended")
	return h.run(w, w.Work)
}

// workerLog makes the log of a worker as it is configured, which goes to the system's log
// where no file is named for it.
func workerLog(log *logrus.Logger, system io.Writer, cfg config.Config) error {
	err := setLog(log, cfg)
	if err != nil || cfg.LogFile == "" {
		log.SetOutput(system)
	}
	return err
}

// forever is longer than any worker works.
const forever = 1000 * time.Hour

// runRuntime becomes an OCI runtime whose containers are mergeable, and returns only if
// it cannot.
func runRuntime(args []string) error {
	if len(args) < 2 || args[0] != "--" {
		return fmt.Errorf("runtime: write runtime -- RUNTIME [ARG]...: %w", errUsage)
	}
	status, err := optin.Exec(args)
	complain(err)
	os.Exit(status)
	return nil
}

// annotations are flags of the form KEY=VALUE.
func annotations(flags *flag.FlagSet) map[string]string {
	into := map[string]string{}
	flags.Func("annotation", "", func(text string) error {
		key, value, ok := strings.Cut(text, "=")
		if !ok || key == "" {
			return errors.New("write KEY=VALUE")
		}
		into[key] = value
		return nil
	})
	return into
}

// runInstall writes the hooks.
func runInstall(args []string) error {
	var dir, path string
	var deadline time.Duration
	flags := newFlags("hook install")
	flags.StringVar(&dir, "dir", hooksd.DefaultDir, "")
	flags.StringVar(&path, "config", "", "")
	flags.DurationVar(&deadline, "deadline", hooks.Deadline, "")
	o := hooksd.Options{Annotations: annotations(flags)}
	if err := parse(flags, args); err != nil {
		return err
	}
	// A hook that hangs ends after twice that.
	if deadline <= 0 || deadline >= hooksd.Timeout/2 {
		return fmt.Errorf("hook install: -deadline %v: write a time shorter than %v, half of what the runtime gives a hook: %w", deadline, hooksd.Timeout/2, errUsage)
	}
	var err error
	if o.Binary, err = os.Executable(); err != nil {
		return err
	}
	if path != "" {
		// A hook's working directory is the runtime's.
		if path, err = filepath.Abs(path); err != nil {
			return err
		}
		if _, err := config.Load(path); err != nil {
			return err
		}
		o.Args = append(o.Args, "-config", path)
	}
	if deadline != hooks.Deadline {
		o.Args = append(o.Args, "-deadline", deadline.String())
	}
	written, err := hooksd.Install(dir, o)
	for _, path := range written {
		fmt.Println(path)
	}
	return err
}

// runUninstall removes the hooks.
func runUninstall(args []string) error {
	var dir string
	flags := newFlags("hook uninstall")
	flags.StringVar(&dir, "dir", hooksd.DefaultDir, "")
	if err := parse(flags, args); err != nil {
		return err
	}
	removed, err := hooksd.Uninstall(dir)
	for _, path := range removed {
		fmt.Println(path)
	}
	return err
}

// runValidate checks the hooks.
func runValidate(args []string) error {
	var dirs []string
	flags := newFlags("hook validate")
	flags.Func("dir", "", func(dir string) error {
		dirs = append(dirs, dir)
		return nil
	})
	want := annotations(flags)
	if err := parse(flags, args); err != nil {
		return err
	}
	if len(dirs) == 0 {
		dirs = []string{hooksd.DefaultDir}
	}
	if err := hooksd.Validate(context.Background(), dirs, want); err != nil {
		return err
	}
	given := "every container"
	if len(want) > 0 {
		given = fmt.Sprintf("a container with %s", strings.Join(slices.Sorted(maps.Keys(want)), ", "))
	}
	fmt.Printf("%s has the hooks\n", given)
	return nil
}
