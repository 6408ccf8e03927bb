// Package control is how a test talks to the program in its containers: the
// test listens on a Unix socket in a directory that is mounted into the
// container, the program connects when its memory is filled, says where it is,
// and answers one request after another. So a test never has to guess whether
// a container is ready.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Hello is the first message of a connection, from the container.
type Hello struct {
	// Start and End are the addresses of the data in the program's memory.
	Start, End uint64
	// Sum is equal for containers that hold the same data.
	Sum uint64
}

// Op names what a test asks for.
type Op string

const (
	// Check compares all data with what was written.
	Check Op = "check"
	// Write writes Count pages from First on, from Seed.
	Write Op = "write"
	// Churn starts writing and checking, over and over, until Settle. The
	// pages written are First up to First+Count, each from one of Seeds seeds, or, if
	// that is zero, from one that no other has. Between two rounds is a Pause.
	Churn Op = "churn"
	// Settle ends a Churn, and checks all data.
	Settle Op = "settle"
)

// Request is one request of a test.
type Request struct {
	Op           Op
	First, Count int
	Seed         uint64
	Seeds        uint64        `json:",omitempty"`
	Pause        time.Duration `json:",omitempty"`
}

// Reply is the container's answer.
type Reply struct {
	// Sum is the sum of the data as of this answer.
	Sum uint64
	// Rounds is how often a Churn wrote and checked.
	Rounds int
	// Error is why the request failed; corrupt data also ends the program.
	Error string
}

// Socket returns the socket's path in a directory.
func Socket(dir string) string { return filepath.Join(dir, "control.sock") }

// Listener waits for a container to be ready.
type Listener struct{ l *net.UnixListener }

// Listen creates the socket in a directory.
func Listen(dir string) (*Listener, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: Socket(dir), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for the workload: %w", err)
	}
	return &Listener{l}, nil
}

// Close stops listening and removes the socket.
func (l *Listener) Close() error { return l.l.Close() }

// Accept returns when the container has filled its memory.
func (l *Listener) Accept(ctx context.Context) (*Conn, error) {
	stop := context.AfterFunc(ctx, func() { l.l.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c, err := l.l.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("wait for the workload: %w", errors.Join(context.Cause(ctx), err))
	}
	conn := newConn(c)
	if conn.Peer, err = peer(c); err != nil {
		return nil, errors.Join(fmt.Errorf("who is the workload: %w", err), c.Close())
	}
	if err := conn.receive(ctx, &conn.Hello); err != nil {
		return nil, errors.Join(fmt.Errorf("wait for the workload: %w", err), c.Close())
	}
	return conn, nil
}

// Conn is the test's end of a connection. It is for one goroutine at a time.
type Conn struct {
	// Hello is what the container said of itself.
	Hello Hello
	// Peer is the number that the process on the other side has here.
	Peer int

	c   net.Conn
	in  *json.Decoder
	out *json.Encoder
}

func newConn(c net.Conn) *Conn {
	return &Conn{c: c, in: json.NewDecoder(c), out: json.NewEncoder(c)}
}

// peer is the process that has connected.
func peer(c *net.UnixConn) (pid int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var is *unix.Ucred
	controlErr := raw.Control(func(fd uintptr) { is, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(controlErr, err); err != nil {
		return 0, err
	}
	return int(is.Pid), nil
}

// Close closes the connection; the program goes on.
func (c *Conn) Close() error { return c.c.Close() }

// Do sends a request and waits for the answer.
func (c *Conn) Do(ctx context.Context, q Request) (Reply, error) {
	var r Reply
	if err := c.out.Encode(q); err != nil {
		return r, fmt.Errorf("ask the workload to %s: %w", q.Op, err)
	}
	if err := c.receive(ctx, &r); err != nil {
		return r, fmt.Errorf("%s: no answer from the workload: %w", q.Op, err)
	}
	if r.Error != "" {
		return r, fmt.Errorf("%s: %s", q.Op, r.Error)
	}
	return r, nil
}

func (c *Conn) receive(ctx context.Context, v any) error {
	stop := context.AfterFunc(ctx, func() { c.c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := c.in.Decode(v); err != nil {
		return errors.Join(context.Cause(ctx), err)
	}
	return nil
}

// Serve connects to the socket in dir, sends hello and hands every request to
// answer, until ctx or the connection ends, or answer returns an error. That
// error is sent, as the last Reply, before Serve returns it.
func Serve(ctx context.Context, dir string, hello Hello, answer func(Request) (Reply, error)) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", Socket(dir))
	if err != nil {
		return fmt.Errorf("connect to the test: %w", err)
	}
	conn := newConn(c)
	defer conn.Close()
	if err := conn.out.Encode(hello); err != nil {
		return fmt.Errorf("greet the test: %w", err)
	}
	for {
		var q Request
		if err := conn.receive(ctx, &q); err != nil {
			return nil // the test is done with us
		}
		r, answerErr := answer(q)
		if answerErr != nil {
			r.Error = answerErr.Error()
		}
		if err := errors.Join(answerErr, conn.out.Encode(r)); err != nil {
			return err
		}
	}
}
