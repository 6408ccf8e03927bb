// Package control lets the command line ask the engine that runs on this machine,
// over a socket that only root may open.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine"
)

// socket is the name of the socket in the directory of the engine.
const socket = "control.sock"

// patience is how long either side waits for the other.
const patience = 10 * time.Second

// ErrNoEngine says that no engine runs on this machine.
var ErrNoEngine = errors.New("no engine runs on this machine")

// Engine is what can be asked for.
type Engine interface {
	Merge(partition string) error
	Unmerge(partition string) error
	Report() Report
	// Sync looks at what OCI hooks have written down of a container. An error that
	// matches [ErrNoEngine] is that the engine is ending.
	Sync(ctx context.Context, containerID string) error
	// Yield ends the engine for another one, and reports whether it does that.
	Yield() bool
}

// Report is what an engine tells of itself.
type Report struct {
	// Version is the program's, Kernel is the release of the kernel that runs, Interface is
	// how that is asked, and Detail what of it is used.
	Version   string `json:"version"`
	Kernel    string `json:"kernel"`
	Interface string `json:"interface"`
	Detail    string `json:"detail,omitempty"`
	engine.Report
}

// request is one line in JSON; so is the reply.
type request struct {
	Command   string `json:"command"`
	Partition string `json:"partition,omitempty"`
	Container string `json:"container,omitempty"`
}

type reply struct {
	Error  string `json:"error,omitempty"`
	Ending bool   `json:"ending,omitempty"`
	Yields bool   `json:"yields,omitempty"`
	// Not by the name that it had in another form.
	Report *Report `json:"status,omitempty"`
}

const (
	commandMerge   = "merge"
	commandUnmerge = "unmerge"
	commandReport  = "report"
	commandSync    = "sync"
	commandYield   = "yield"
)

// Server is a socket that is listened at.
type Server struct {
	listener *net.UnixListener
}

// Listen makes the socket in a directory, of which the caller must have the
// [engine.Lock]: one that an engine before it left is replaced.
func Listen(dir string) (*Server, error) {
	path := filepath.Join(dir, socket)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		listener.Close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return &Server{listener: listener}, nil
}

// short are errors of a machine that has too little of something for now.
var short = []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM}

// again is the pause before the next who asks is looked for when there is too little for
// that.
const again = 100 * time.Millisecond

// Serve answers until ctx ends, then removes the socket and returns nil.
func (s *Server) Serve(ctx context.Context, e Engine) error {
	defer s.listener.Close()
	defer context.AfterFunc(ctx, func() { s.listener.Close() })()
	return serve(ctx, s.listener.AcceptUnix, e)
}

func serve(ctx context.Context, accept func() (*net.UnixConn, error), e Engine) error {
	var asking sync.WaitGroup
	defer asking.Wait()
	for {
		conn, err := accept()
		switch {
		case ctx.Err() != nil:
			return nil
		case slices.ContainsFunc(short, func(s error) bool { return errors.Is(err, s) }):
			select {
			case <-time.After(again):
			case <-ctx.Done():
			}
			continue
		case err != nil:
			return fmt.Errorf("control socket: %w", err)
		}
		asking.Go(func() {
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			// The one who asks is told, or is gone.
			_ = answer(ctx, conn, e)
		})
	}
}

// maxRequest is how many bytes of a request are read.
const maxRequest = 64 << 10

func answer(ctx context.Context, conn *net.UnixConn, e Engine) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	var (
		q request
		r reply
	)
	if err := json.NewDecoder(io.LimitReader(conn, maxRequest)).Decode(&q); err != nil {
		return err
	}
	if err := fromRoot(conn); err != nil {
		return json.NewEncoder(conn).Encode(reply{Error: err.Error()})
	}
	switch q.Command {
	case commandMerge:
		if err := e.Merge(q.Partition); err != nil {
			r.Error = err.Error()
		}
	case commandUnmerge:
		if err := e.Unmerge(q.Partition); err != nil {
			r.Error = err.Error()
		}
	case commandReport:
		report := e.Report()
		r.Report = &report
	case commandSync:
		err := e.Sync(ctx, q.Container)
		if r.Ending = errors.Is(err, ErrNoEngine); err != nil {
			r.Error = err.Error()
		}
	case commandYield:
		r.Yields = e.Yield()
	default:
		r.Error = fmt.Sprintf("unknown command %q", q.Command)
	}
	return json.NewEncoder(conn).Encode(r)
}

// errNotRoot is the answer to those who may not ask.
var errNotRoot = errors.New("only root may ask the engine")

// fromRoot tells whether it is root who asks. The socket's mode says so too, but
// somebody may change that.
func fromRoot(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var (
		peer   *unix.Ucred
		failed error
	)
	if err := raw.Control(func(fd uintptr) {
		peer, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if failed != nil {
		return fmt.Errorf("who asks the engine: %w", failed)
	}
	if peer.Uid != 0 {
		return errNotRoot
	}
	return nil
}

// Merge asks the engine to merge a partition, or all if there is no name. It does not
// wait for the merge. It returns an error that matches [ErrNoEngine] where none runs.
func Merge(ctx context.Context, dir, partition string) error {
	_, err := ask(ctx, dir, request{Command: commandMerge, Partition: partition})
	return err
}

// Unmerge asks the engine to unmerge a partition, or all if there is no name, and not to
// merge it until [Merge] is called. It does not wait for that. It returns an error that
// matches [ErrNoEngine] where none runs.
func Unmerge(ctx context.Context, dir, partition string) error {
	_, err := ask(ctx, dir, request{Command: commandUnmerge, Partition: partition})
	return err
}

// Ask asks the engine what it has. It returns an error that matches [ErrNoEngine] where
// none runs.
func Ask(ctx context.Context, dir string) (Report, error) {
	r, err := ask(ctx, dir, request{Command: commandReport})
	if err != nil {
		return Report{}, err
	}
	if r.Report == nil {
		return Report{}, errors.New("asking the engine: no answer: it is of another version")
	}
	return *r.Report, nil
}

// Sync has the engine look at what OCI hooks have written down of a container. It waits
// for no merge. It returns an error that matches [ErrNoEngine] where none runs, or
// where it is ending.
func Sync(ctx context.Context, dir, containerID string) error {
	_, err := ask(ctx, dir, request{Command: commandSync, Container: containerID})
	return err
}

// Yield asks the engine to end, which one does that hooks have started for a while. It
// reports whether it will, and does not wait for it. It returns an error that matches
// [ErrNoEngine] where none runs.
func Yield(ctx context.Context, dir string) (bool, error) {
	r, err := ask(ctx, dir, request{Command: commandYield})
	return r.Yields, err
}

func ask(ctx context.Context, dir string, q request) (reply, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, socket))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return reply{}, fmt.Errorf("%w: %w", ErrNoEngine, err)
	} else if err != nil {
		return reply{}, fmt.Errorf("asking the engine: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	var r reply
	err = json.NewEncoder(conn).Encode(q)
	if err == nil {
		err = json.NewDecoder(conn).Decode(&r)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return reply{}, fmt.Errorf("%w any more: %w", ErrNoEngine, err)
	} else if err != nil {
		return reply{}, fmt.Errorf("asking the engine: %w", err)
	}
	switch {
	case r.Ending:
		return reply{}, ErrNoEngine
	case r.Error != "":
		return reply{}, errors.New(r.Error)
	}
	return r, nil
}
