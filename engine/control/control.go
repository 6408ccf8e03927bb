// Package control lets the command line ask the engine that runs on this machine,
// over a socket that only root may open.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

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
	Status() []engine.PartitionStatus
}

// request is one line in JSON; so is the reply.
type request struct {
	Command   string `json:"command"`
	Partition string `json:"partition,omitempty"`
}

type reply struct {
	Error      string                   `json:"error,omitempty"`
	Partitions []engine.PartitionStatus `json:"partitions"`
}

const (
	commandMerge  = "merge"
	commandStatus = "status"
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

// Serve answers until ctx ends, then removes the socket and returns nil.
func (s *Server) Serve(ctx context.Context, e Engine) error {
	var asking sync.WaitGroup
	defer asking.Wait()
	defer s.listener.Close()
	defer context.AfterFunc(ctx, func() { s.listener.Close() })()
	for {
		conn, err := s.listener.Accept()
		if ctx.Err() != nil {
			return nil
		} else if err != nil {
			return fmt.Errorf("control socket: %w", err)
		}
		asking.Go(func() {
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			// The one who asks is told, or is gone.
			_ = answer(conn, e)
		})
	}
}

func answer(conn net.Conn, e Engine) error {
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	var (
		q request
		r reply
	)
	if err := json.NewDecoder(conn).Decode(&q); err != nil {
		return err
	}
	switch q.Command {
	case commandMerge:
		if err := e.Merge(q.Partition); err != nil {
			r.Error = err.Error()
		}
	case commandStatus:
		r.Partitions = e.Status()
	default:
		r.Error = fmt.Sprintf("unknown command %q", q.Command)
	}
	return json.NewEncoder(conn).Encode(r)
}

// Merge asks the engine to merge a partition, or all if there is no name. It does not
// wait for the merge. It returns an error that matches [ErrNoEngine] where none runs.
func Merge(ctx context.Context, dir, partition string) error {
	_, err := ask(ctx, dir, request{Command: commandMerge, Partition: partition})
	return err
}

// Status asks the engine what it has. It returns an error that matches [ErrNoEngine]
// where none runs.
func Status(ctx context.Context, dir string) ([]engine.PartitionStatus, error) {
	r, err := ask(ctx, dir, request{Command: commandStatus})
	return r.Partitions, err
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
	if err := json.NewEncoder(conn).Encode(q); err != nil {
		return reply{}, fmt.Errorf("asking the engine: %w", err)
	}
	if err := json.NewDecoder(conn).Decode(&r); err != nil {
		return reply{}, fmt.Errorf("asking the engine: %w", err)
	}
	if r.Error != "" {
		return reply{}, errors.New(r.Error)
	}
	return r, nil
}
