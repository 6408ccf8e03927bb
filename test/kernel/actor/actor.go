// Package actor runs the processes that the kernel's tests merge, the program
// in program/. A test tells each what to do, over a socket of its own, also
// those that it forks.
package actor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// PageSize is the unit of an actor's memory.
const PageSize = 4096

// patience is how long an actor may take to answer. It is much more than the
// slowest kernel needs: who runs into it has found a hang.
const patience = 3 * time.Minute

// Stage is where actors report, as they do when they begin.
type Stage struct {
	program  string
	address  string
	listener *net.UnixListener
	wg       sync.WaitGroup

	mu      sync.Mutex // protects what follows
	arrived map[int]chan *net.UnixConn
}

var stages atomic.Int64 // opened so far

// OpenStage opens a stage for actors that are of a program.
func OpenStage(program string) (*Stage, error) {
	if _, err := os.Stat(program); err != nil {
		return nil, fmt.Errorf("no actor; make build/bin/actor builds it: %w", err)
	}
	s := &Stage{
		program: program,
		address: fmt.Sprintf("selective-ksm-actor-%d-%d", os.Getpid(), stages.Add(1)),
		arrived: make(map[int]chan *net.UnixConn),
	}
	var err error
	s.listener, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: "@" + s.address, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	s.wg.Go(s.accept)
	return s, nil
}

// Close closes the stage. Actors end when they have nobody to obey.
func (s *Stage) Close() error {
	err := s.listener.Close()
	s.wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.arrived {
		select {
		case conn := <-c:
			err = errors.Join(err, conn.Close())
		default:
		}
	}
	return err
}

func (s *Stage) accept() {
	for {
		conn, err := s.listener.AcceptUnix()
		if err != nil {
			return // closed
		}
		greeting, err := receive(conn)
		pid, convErr := strconv.Atoi(greeting)
		if err != nil || convErr != nil {
			conn.Close() // it was killed
			continue
		}
		s.arrival(pid) <- conn
	}
}

// arrival is where the connection of an actor comes, one at a time.
func (s *Stage) arrival(pid int) chan *net.UnixConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.arrived[pid]
	if !ok {
		c = make(chan *net.UnixConn, 1)
		s.arrived[pid] = c
	}
	return c
}

func (s *Stage) await(ctx context.Context, pid int) (*net.UnixConn, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	select {
	case conn := <-s.arrival(pid):
		return conn, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("actor %d did not report: %w", pid, ctx.Err())
	}
}

// Actor is a process. One goroutine at a time may tell it what to do, another
// one may kill it.
type Actor struct {
	Pid int

	stage *Stage
	conn  *net.UnixConn
	pidfd *os.File
	cmd   *exec.Cmd // nil if another actor forked it

	killOnce sync.Once
	killErr  error
}

// Start starts an actor, as another user if attr says so. It is killed when
// the thread that calls Start ends.
func (s *Stage) Start(ctx context.Context, attr unix.SysProcAttr, files ...*os.File) (*Actor, error) {
	cmd := exec.Command(s.program, "serve", s.address)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = files
	attr.Pdeathsig = unix.SIGKILL
	cmd.SysProcAttr = &attr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	a, err := s.enter(ctx, cmd.Process.Pid)
	if err != nil {
		err = errors.Join(err, cmd.Process.Kill())
		_ = cmd.Wait() // it was killed
		return nil, err
	}
	a.cmd = cmd
	return a, nil
}

// enter makes an actor of a process that has reported, or will.
func (s *Stage) enter(ctx context.Context, pid int) (*Actor, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open pid %d: %w", pid, err)
	}
	a := &Actor{Pid: pid, stage: s, pidfd: os.NewFile(uintptr(pidfd), "pidfd")}
	if a.conn, err = s.await(ctx, pid); err != nil {
		return nil, errors.Join(err, a.pidfd.Close())
	}
	return a, nil
}

// Kill ends the actor, and returns when it has: its memory is gone then.
func (a *Actor) Kill() error {
	a.killOnce.Do(func() { a.killErr = a.kill() })
	return a.killErr
}

func (a *Actor) kill() error {
	err := unix.PidfdSendSignal(int(a.pidfd.Fd()), unix.SIGKILL, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		err = nil
	}
	if a.cmd != nil {
		_ = a.cmd.Wait() // it was killed
	} else if err == nil {
		err = wait(a.pidfd)
	}
	return errors.Join(err, a.conn.Close(), a.pidfd.Close())
}

// wait returns when the process that somebody else reaps has ended.
func wait(pidfd *os.File) error {
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd.Fd()), Events: unix.POLLIN}}, -1)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Ask has the actor do something, and returns the number that it answers, an
// errno of its own if it is that of a call that failed.
func (a *Actor) Ask(format string, args ...any) (int64, error) {
	if err := a.Tell(format, args...); err != nil {
		return 0, err
	}
	return a.answer(fmt.Sprintf(format, args...))
}

// Tell has the actor do something, and does not wait for it. All that can be
// done to the actor from then on is to kill it.
func (a *Actor) Tell(format string, args ...any) error {
	command := fmt.Sprintf(format, args...)
	if err := a.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := a.conn.Write([]byte(command)); err != nil {
		return fmt.Errorf("tell actor %d: %s: %w", a.Pid, command, err)
	}
	return nil
}

func (a *Actor) answer(command string) (int64, error) {
	answer, err := receive(a.conn)
	if err != nil {
		return 0, fmt.Errorf("no answer from actor %d to %s: %w", a.Pid, command, err)
	}
	n, err := strconv.ParseInt(answer, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("actor %d: %s: %s", a.Pid, command, answer)
	}
	if n < 0 {
		return 0, fmt.Errorf("actor %d: %s: %w", a.Pid, command, unix.Errno(-n))
	}
	return n, nil
}

// Fork has the actor fork, and returns the other process.
func (a *Actor) Fork(ctx context.Context) (*Actor, error) { return a.beget(ctx, "fork") }

// Vfork has the actor start another one by vfork and exec.
func (a *Actor) Vfork(ctx context.Context) (*Actor, error) { return a.beget(ctx, "vfork") }

func (a *Actor) beget(ctx context.Context, how string) (*Actor, error) {
	pid, err := a.Ask("%s", how)
	if err != nil {
		return nil, err
	}
	return a.stage.enter(ctx, int(pid))
}

// Exec has the actor execute its program anew, without the memory it had.
func (a *Actor) Exec(ctx context.Context) error {
	if err := a.Tell("exec"); err != nil {
		return err
	}
	conn, err := a.stage.await(ctx, a.Pid)
	if err != nil {
		return err
	}
	err = a.conn.Close()
	a.conn = conn
	return err
}

func receive(conn *net.UnixConn) (string, error) {
	buf := make([]byte, 512)
	n, err := conn.Read(buf)
	return string(buf[:n]), err
}
