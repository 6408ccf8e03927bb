package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"

	"github.com/sirupsen/logrus"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/kernel/detect"
	"github.com/selective-ksm/selective-ksm/hooks"
	"github.com/selective-ksm/selective-ksm/hooks/member"
)

// host is the engine of the machine, and what it needs.
type host struct {
	cfg     config.Config
	log     *logrus.Logger
	kernel  kernel.Kernel
	detail  string // what the kernel has, for people
	lock    *os.File
	server  *control.Server
	members *member.Dir
	engine  *engine.Engine
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
	return lockHost(cfg, log, hooks.Lock)
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
	return &host{
		cfg: cfg, log: log, kernel: k, detail: detail, lock: lock, server: server, members: members,
		engine: engine.New(engine.Options{Kernel: k, Owned: config.Owned, Settings: settings(cfg, log), Log: log}),
	}, nil
}

// Close lets the machine have another engine.
func (h *host) Close() error {
	return errors.Join(h.kernel.Close(), h.lock.Close())
}

// report says what the kernel has.
func (h *host) report() {
	for _, f := range detect.Probe(lookFor(h.cfg)) {
		h.log.Info("interface " + f.String())
	}
	h.log.WithFields(logrus.Fields{"version": currentVersion(), "kernel": h.detail}).Info("started")
}

// registry is what hooks ask.
type registry interface {
	Run(ctx context.Context)
	Sync(ctx context.Context, containerID string) error
	Yield() bool
}

// asked is what may be asked for over the control socket.
type asked struct {
	*engine.Engine
	registry registry
}

func (a asked) Sync(ctx context.Context, containerID string) error {
	return a.registry.Sync(ctx, containerID)
}

func (a asked) Yield() bool { return a.registry.Yield() }

// run runs the engine while a function runs, until that returns or a signal ends it.
// What is merged then stays merged.
func (h *host) run(r registry, while func(ctx context.Context) error) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { h.engine.Run(ctx) })
	running.Go(func() { r.Run(ctx) })
	running.Go(func() {
		if err := h.server.Serve(ctx, asked{h.engine, r}); err != nil {
			h.log.WithError(err).Error("merge, status and hooks do not work")
		}
	})
	defer running.Wait()
	defer cancel()
	return while(ctx)
}
