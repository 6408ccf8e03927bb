// Package plugin is an NRI plugin: it translates what a container runtime says of
// pods and containers into what the engine understands, and opts containers in
// to merging when they are created.
//
// No container fails or waits because of it: its handlers return no errors other
// than for a bad configuration, and wait for no merge.
package plugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/containerd/ttrpc"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/config/watch"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/optin"
)

const (
	// minRetry and maxRetry bound the time between attempts to connect again.
	minRetry = 100 * time.Millisecond
	maxRetry = 5 * time.Second
	// stable is how long a connection lasts of a runtime that does not close each one.
	stable = 10 * time.Second
	// patience is how long the runtime may take from our connection to its
	// configuring us, and how long the stub may take to stop.
	patience = 10 * time.Second
)

// Engine is what the plugin needs of an [engine.Engine].
type Engine interface {
	Add(ctx context.Context, c engine.Container) error
	Start(containerID string)
	Stop(containerID string)
	StopSandbox(sandboxID string)
	Reconcile(created, running []engine.Container) error
	OptsIn() bool
}

// Options are what a plugin is made of.
type Options struct {
	// Name and Index are what the plugin registers as. A runtime that launched it
	// has given both already.
	Name, Index string
	// Socket is the path of the runtime's NRI socket, for a plugin that no runtime
	// launched.
	Socket string
	// Config is the configuration. Where it is nil, the runtime gives it: that of
	// its own directory to a plugin that it launched, none to others.
	Config *config.Config
	// Load reads the configuration anew, each time that Reload says so. Either both are
	// nil or none is.
	Load   func() (config.Config, error)
	Reload <-chan struct{}
	// Apply is called with a configuration that the runtime gave, or Load. An error
	// refuses it, and must have changed nothing.
	Apply func(config.Config) error
	// Dir is a directory of the plugin's own, at the same path for the runtime. It
	// is made if it is not there.
	Dir string
	// Engine does the work.
	Engine Engine
	// Interface is how the engine asks the kernel, for the annotations of containers.
	Interface string
	// Ignored, if it is not nil, is called with each annotation whose value does not
	// count, when that is logged.
	Ignored func(annotation string)
	// Log gets one line for each container that is not merged, with the reason, for each
	// annotation that does not count, and for each reload; and for debugging one for each
	// event, with the time that it took to answer it.
	Log logrus.FieldLogger
}

// Launched reports whether a container runtime launched this process as a plugin.
func Launched() bool { return os.Getenv(api.PluginSocketEnvVar) != "" }

// ErrConfig is matched by errors of the configuration that the runtime gave.
var ErrConfig = errors.New("configuration from the runtime")

// Run connects to the runtime and serves it until ctx ends, then returns nil. When
// the runtime goes away it connects again and takes everything over anew, unless
// the runtime launched this process: then it will launch another one, and Run
// returns nil. Errors are that there is no socket to connect to at the start, or
// [ErrConfig]. A socket that nobody listens on is what a runtime leaves that was
// killed: Run waits for the next one, which removes the socket before it has its own.
func Run(ctx context.Context, o Options) error {
	p := newPlugin(o)
	if o.Config != nil {
		wrapper, err := p.prepare(*o.Config)
		if err == nil {
			err = wrapper.place()
		}
		if err != nil {
			return err
		}
		p.use(*o.Config, wrapper.path)
	}
	ctx, cancel := context.WithCancel(ctx)
	var reloading sync.WaitGroup
	reloading.Go(func() { watch.Reload(ctx, p.Reload, p.Log, p.reload) })
	defer reloading.Wait()
	defer cancel()
	retry := minRetry
	for connected, waits := false, false; ; {
		began := time.Now()
		err := p.serve(ctx)
		connected = connected || !errors.Is(err, errConnect)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrConfig), !connected && !waits && !errors.Is(err, unix.ECONNREFUSED):
			return err
		case Launched():
			p.Log.WithError(err).Info("the runtime closed the connection")
			return nil
		case !connected && !waits:
			waits = true
			p.Log.WithError(err).Warn("the runtime does not answer: waiting for it")
		case !errors.Is(err, errConnect):
			p.Log.WithError(err).Warn("the runtime closed the connection: connecting again")
		default:
			p.Log.WithError(err).Debug("the runtime does not answer yet")
		}
		if p.get().synchronized && time.Since(began) > stable {
			retry = minRetry
		}
		select {
		case <-time.After(retry):
			retry = min(2*retry, maxRetry)
		case <-ctx.Done():
			return nil
		}
	}
}

// plugin is an Options at work.
type plugin struct {
	Options

	// turn is of whoever tells the engine of containers: it is of one event of the
	// runtime, or one reload, at a time. Nothing waits for a merge in it.
	turn sync.Mutex
	// subjects are all containers that the runtime has told of, by their ids. They and
	// what follows are protected by turn.
	subjects map[string]*subject
	// ignored are the annotations that were logged, by the id of the pod's sandbox, and
	// ignoredCount is how many there were ever.
	ignored      map[string][]config.Ignored
	ignoredCount int
	// vmms are the pods' sandboxes of which the engine knows a VMM, and guests what is known
	// of those whose containers are in one, both by the sandboxes' ids.
	vmms   map[string]bool
	guests map[string]*guest

	mu    sync.Mutex // taken after turn
	state state      // protected by mu
}

func newPlugin(o Options) *plugin {
	return &plugin{
		Options: o, subjects: map[string]*subject{}, ignored: map[string][]config.Ignored{},
		vmms: map[string]bool{}, guests: map[string]*guest{},
	}
}

// state is what handlers read and change.
type state struct {
	policy  config.Config
	wrapper string // path on the host of our copy, if there is one
	// told is the reason that was logged for each container that is not merged, by
	// its id.
	told map[string]string
	// configured and synchronized are what has happened on this connection.
	configured, synchronized bool
	// refused is what is wrong with the configuration that the runtime gave.
	refused error
}

func (p *plugin) get() state {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state
}

func (p *plugin) change(change func(*state)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.state)
}

// errConnect is matched by errors of a connection that was not made.
var errConnect = errors.New("NRI")

// serve makes a connection, and serves it to its end. It always returns an error.
func (p *plugin) serve(ctx context.Context) error {
	p.change(func(s *state) { s.configured, s.synchronized = false, false })

	options := []stub.Option{
		stub.WithLogger(debugLog{p.Log}),
		stub.WithTTRPCOptions(nil, []ttrpc.ServerOpt{ttrpc.WithUnaryServerInterceptor(p.timed)}),
	}
	if !Launched() {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", p.Socket)
		if err != nil {
			return fmt.Errorf("%w socket: %w: enable NRI in the runtime, or name its socket with -socket", errConnect, err)
		}
		defer conn.Close()
		options = append(options, stub.WithPluginName(p.Name), stub.WithPluginIdx(p.Index), stub.WithConnection(conn))
	}
	s, err := stub.New(p, options...)
	if err != nil {
		return fmt.Errorf("%w plugin: %w", errConnect, err)
	}

	// A stub whose runtime goes away between registering and configuring it waits
	// without end (seen with v0.12.5). It is the only thing here that is not waited
	// for.
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	late := time.NewTimer(patience)
	defer late.Stop()
	stopping := ctx.Done()
	for {
		select {
		case err := <-done:
			// The stub's own error may be that the runtime has hung up on us since.
			if refused := p.get().refused; refused != nil {
				err = refused
			} else if err == nil {
				err = errors.New("the runtime closed the connection")
			}
			return err
		case <-stopping:
			stopping = nil
			late.Reset(patience)
		case <-late.C:
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if !p.get().configured {
				return fmt.Errorf("NRI runtime at %s: did not configure the plugin within %v", p.Socket, patience)
			}
		}
	}
}

// running is the program that runs, wherever an upgrade has put its file.
const running = "/proc/self/exe"

// wraps reports whether containers need the wrapper to opt in.
func (p *plugin) wraps(c config.Config) bool {
	return c.OptIn == config.OptInWrapper || c.OptIn == config.OptInAuto && !p.Engine.OptsIn()
}

// prepare makes what a configuration asks for, and changes nothing yet. It returns
// the wrapper for containers, if they need one.
func (p *plugin) prepare(c config.Config) (kept, error) {
	if !p.wraps(c) {
		return kept{}, nil
	}
	wrapper := cmp.Or(c.Wrapper, running)
	if err := optin.CheckBinary(wrapper); err != nil {
		return kept{}, err
	}
	return keepWrapper(p.Dir, wrapper)
}

// apply has everybody take a configuration that is prepared, or nobody.
func (p *plugin) apply(c config.Config, wrapper kept) error {
	if err := p.Apply(c); err != nil {
		return errors.Join(err, wrapper.drop())
	}
	if err := wrapper.place(); err != nil {
		return err
	}
	p.use(c, wrapper.path)
	return nil
}

// use takes a configuration.
func (p *plugin) use(c config.Config, wrapper string) {
	p.change(func(s *state) { s.policy, s.wrapper = c, wrapper })
}

// timed lets a handler answer the runtime, which disconnects a plugin that takes
// too long. Handlers have the turn.
func (p *plugin) timed(ctx context.Context, request ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, handle ttrpc.Method) (any, error) {
	begin := time.Now()
	p.turn.Lock()
	reply, err := handle(ctx, request)
	p.turn.Unlock()
	p.Log.WithFields(logrus.Fields{
		"event": path.Base(info.FullMethod), "duration_ms": float64(time.Since(begin).Microseconds()) / 1000,
	}).Debug("answered the runtime")
	return reply, err
}

// debugLog is the stub's log. What matters in it comes back as an error too.
type debugLog struct{ log logrus.FieldLogger }

func (l debugLog) Debugf(_ context.Context, format string, args ...any) {
	l.log.Debugf(format, args...)
}
func (l debugLog) Infof(_ context.Context, format string, args ...any) { l.log.Debugf(format, args...) }
func (l debugLog) Warnf(_ context.Context, format string, args ...any) { l.log.Debugf(format, args...) }
func (l debugLog) Errorf(_ context.Context, format string, args ...any) {
	l.log.Debugf(format, args...)
}
