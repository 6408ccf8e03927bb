package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"reflect"
	"runtime/debug"
	"sync"
	"syscall"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/config/watch"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/kernel/detect"
	"github.com/selective-ksm/selective-ksm/engine/metrics"
	"github.com/selective-ksm/selective-ksm/engine/notify"
	"github.com/selective-ksm/selective-ksm/hooks"
	"github.com/selective-ksm/selective-ksm/hooks/member"
)

// host is the engine of the machine, and what it needs.
type host struct {
	path    string // of the configuration; empty if there is no file
	cfg     config.Config
	log     *logrus.Logger
	kernel  kernel.Kernel
	detail  string // what the kernel has, for people
	lock    *os.File
	server  *control.Server
	members *member.Dir
	engine  *engine.Engine
	metrics *metrics.Metrics
	serving *metrics.Server // nil if nobody is told of the metrics
	remove  bool            // all partitions, when a signal ends this process
	// service is that a service manager may have started this process for the engine. The
	// one that a hook finds in its environment is somebody else's.
	service bool
}

// openHost makes the caller's engine that of the machine, as a file configures it if
// there is one. An error is that it cannot be, or that there is one.
func openHost(path string) (*host, error) {
	cfg, err := load(path)
	if err != nil {
		return nil, err
	}
	log := logrus.New()
	if err := setLog(log, cfg); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	h, err := lockHost(cfg, log, hooks.Lock)
	if err != nil {
		return nil, err
	}
	h.path = path
	h.service = true
	return h, nil
}

// lockHost makes the caller's engine that of the machine if it gets the lock. It returns
// no host where there is neither lock nor error.
func lockHost(cfg config.Config, log *logrus.Logger, take func(ctx context.Context, dir string) (*os.File, error)) (h *host, err error) {
	if os.Geteuid() != 0 {
		return nil, errNotRoot
	}
	k, detail, err := detect.Open(lookFor(cfg))
	if err != nil {
		return nil, err
	}
	defer func() {
		if h == nil {
			err = errors.Join(err, k.Close())
		}
	}()
	if err := suits(k, cfg); err != nil {
		return nil, err
	}
	lock, err := take(context.Background(), engine.RunDir)
	if err != nil || lock == nil {
		return nil, err
	}
	defer func() {
		if h == nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	members, err := hooks.Members(engine.RunDir)
	if err != nil {
		return nil, err
	}
	server, err := control.Listen(engine.RunDir)
	if err != nil {
		return nil, err
	}
	// It is idle most of the time, and its memory is better somebody else's. Who wants
	// it otherwise sets GOGC.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(collect)
	}
	h = &host{
		cfg: cfg, log: log, kernel: k, detail: detail, lock: lock, server: server, members: members,
		engine: engine.New(engine.Options{Kernel: k, Owned: config.Owned, Settings: settings(cfg, log), Log: log}),
	}
	h.metrics = metrics.New(h, config.Annotations())
	return h, nil
}

// serveMetrics has the engine's metrics served at an address, if it is not empty, once it
// runs.
func (h *host) serveMetrics(address string) error {
	if address == "" {
		return nil
	}
	s, err := metrics.Listen(address, h.metrics)
	if err != nil {
		return err
	}
	log := h.log.WithField("address", s.Addr().String())
	if s.Loopback() {
		log.Info("metrics are served")
	} else {
		log.Warn("metrics are served to other machines: what is saved and when tells something of what is in the containers")
	}
	h.serving = s
	return nil
}

// Close lets the machine have another engine.
func (h *host) Close() error {
	return errors.Join(h.kernel.Close(), h.lock.Close())
}

// Report tells all of the engine.
func (h *host) Report() control.Report {
	r := control.Report{Version: currentVersion(), Interface: interfaceOf(h.kernel), Detail: h.detail, Report: h.engine.Report()}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err == nil {
		r.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	return r
}

// ready says that the engine has all containers, and is told of new ones.
func (h *host) ready() {
	if err := notify.Ready(); err != nil {
		h.log.WithError(err).Warn("the service manager may end this process")
	}
}

// report says what the kernel has.
func (h *host) report() {
	for _, f := range detect.Probe(lookFor(h.cfg)) {
		h.log.Info("interface " + f.String())
	}
	h.log.WithFields(logrus.Fields{"version": currentVersion(), "kernel": h.detail}).Info("started")
}

// reload reads the configuration anew, and checks that all of it can be had. It changes
// nothing.
func (h *host) reload() (config.Config, error) {
	c, err := load(h.path)
	switch {
	case err != nil:
		return c, err
	case h.path == "":
		return c, errors.New("there is no file: start anew with -config to have one read again")
	case !reflect.DeepEqual(lookFor(c), lookFor(h.cfg)):
		return c, fmt.Errorf("%s: interface, syscalls or mainlinePartition is another than at the start: start anew for that", h.path)
	}
	if err := suits(h.kernel, c); err != nil {
		return c, fmt.Errorf("%s: %w", h.path, err)
	}
	if out, err := openLog(c); err != nil {
		return c, fmt.Errorf("%s: %w", h.path, err)
	} else if out != os.Stderr {
		return c, out.Close()
	}
	return c, nil
}

// apply takes a configuration, or changes nothing and returns an error.
func (h *host) apply(c config.Config, r *hooks.Registry) error {
	if err := setLog(h.log, c); err != nil {
		return err
	}
	h.engine.Configure(settings(c, h.log))
	r.Use(c)
	return nil
}

// watching tells reload when the configuration may have changed, while a function runs.
func (h *host) watching(ctx context.Context, reload chan<- struct{}, while func(ctx context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	var watchers sync.WaitGroup
	watchers.Go(func() { watch.Signal(ctx, syscall.SIGHUP, reload) })
	if h.path != "" {
		watchers.Go(func() {
			if err := watch.File(ctx, h.path, reload); err != nil {
				h.log.WithError(err).Warn("configuration is reloaded on SIGHUP only")
			}
		})
	}
	defer watchers.Wait()
	defer cancel()
	return while(ctx)
}

// registry is what hooks ask.
type registry interface {
	Run(ctx context.Context)
	Sync(ctx context.Context, containerID string) error
	Yield() bool
}

// asked is what may be asked for over the control socket.
type asked struct {
	*host
	registry registry
}

func (a asked) Merge(partition string) error { return a.engine.Merge(partition) }

func (a asked) Unmerge(partition string) error { return a.engine.Unmerge(partition) }

func (a asked) Sync(ctx context.Context, containerID string) error {
	return a.registry.Sync(ctx, containerID)
}

func (a asked) Yield() bool { return a.registry.Yield() }

// run runs the engine while a function runs, until that returns or a signal ends it.
// What is merged then stays merged, unless it is to be removed.
func (h *host) run(r registry, while func(ctx context.Context) error) error {
	signalled, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithCancel(signalled)
	var running sync.WaitGroup
	running.Go(func() { h.engine.Run(ctx) })
	running.Go(func() { r.Run(ctx) })
	running.Go(func() {
		if err := h.server.Serve(ctx, asked{h, r}); err != nil {
			h.log.WithError(err).Error("merge, status and hooks do not work")
		}
	})
	if h.serving != nil {
		running.Go(func() {
			if err := h.serving.Serve(ctx); err != nil {
				h.log.WithError(err).Error("metrics are not served any more")
			}
		})
	}
	if h.service {
		running.Go(func() {
			notify.Watchdog(ctx, h.engine.Alive, func(err error) { h.log.WithError(err).Error("watchdog") })
		})
	}
	err := while(ctx)
	if h.service {
		if err := notify.Stopping(); err != nil {
			h.log.WithError(err).Debug("the service manager does not know that this process ends")
		}
	}
	cancel()
	running.Wait()
	if h.remove && signalled.Err() != nil {
		// A second signal ends this, too.
		stop()
		err = errors.Join(err, h.engine.RemoveAll(context.Background()))
	}
	return err
}
