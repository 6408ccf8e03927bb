// Command workload is what runs in the containers of the end-to-end tests and
// of the demo. With -control it fills memory with data that is known in
// advance, tells the test where it is, and checks and writes it on request
// (package control); without, it is the pod's pause program. With -report it tells what
// it sees of itself (package report), and ends as it is told to.
//
// It exits with an error as soon as it finds data that it did not write.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/selective-ksm/selective-ksm/test/workload/control"
	"github.com/selective-ksm/selective-ksm/test/workload/memory"
	"github.com/selective-ksm/selective-ksm/test/workload/report"
)

func main() {
	var (
		dir    = flag.String("control", "", "directory of the test's socket; without it, only wait")
		size   = flag.Int("size", 64, "MiB of data")
		repeat = flag.Bool("repeat", false, "hold all data twice, in a first and a second half")
		secret = flag.Bool("secret", false, "mark the data as secret")
		seed   = flag.Uint64("seed", 1, "what the data is made from: the same seed, the same data")
	)
	tells := flag.Bool("report", false, "tell what the process sees of itself")
	status := flag.Int("exit", -1, "exit with this status then")
	sent := flag.Int("kill", 0, "send this signal to itself then")
	asked := flag.Int("term", 0, "exit with this status when asked to end by a signal")
	flag.Parse()

	// The first process of a pid namespace gets no signal that it has no
	// handler for: without this only SIGKILL would stop the container.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	if *tells {
		if err := tell(*status, syscall.Signal(*sent)); err != nil {
			fmt.Fprintln(os.Stderr, "workload:", err)
			os.Exit(1)
		}
	}
	if *dir != "" {
		pages := *size << 20 / memory.PageSize
		distinct := pages
		if *repeat {
			distinct = pages / 2
		}
		if err := serve(ctx, *dir, pages, distinct, *seed, *secret); err != nil {
			fmt.Fprintln(os.Stderr, "workload:", err)
			os.Exit(1)
		}
	}
	<-ctx.Done()
	os.Exit(*asked)
}

// tell tells what the process sees of itself. Then it exits with a status, if that is
// not negative, or sends itself a signal, if that is not zero.
func tell(status int, sent syscall.Signal) error {
	own, err := report.Own()
	if err := errors.Join(err, own.Print(os.Stdout)); err != nil {
		return err
	}
	if status >= 0 {
		os.Exit(status)
	}
	return syscall.Kill(os.Getpid(), sent)
}

// serve returns nil when the test has no more requests.
func serve(ctx context.Context, dir string, pages, distinct int, seed uint64, secret bool) error {
	data, err := memory.Map(pages, distinct, seed, secret)
	if err != nil {
		return err
	}
	var hello control.Hello
	hello.Start, hello.End = data.Range()
	if hello.Sum, err = data.Check(); err != nil {
		return err
	}
	var c *churn
	err = control.Serve(ctx, dir, hello, func(q control.Request) (r control.Reply, err error) {
		if (c != nil) != (q.Op == control.Settle) {
			return r, fmt.Errorf("%q is not for now: churning is %t", q.Op, c != nil)
		}
		if q.First < 0 || q.Count < 0 || q.First+q.Count > data.Pages() {
			return r, fmt.Errorf("no pages %d to %d here", q.First, q.First+q.Count)
		}
		switch q.Op {
		case control.Check:
		case control.Write:
			data.Write(q.First, q.Count, q.Seed)
		case control.Churn:
			c = startChurn(ctx, data, q)
			return r, nil
		case control.Settle:
			r.Rounds, err = c.stop()
			c = nil
			if err != nil {
				return r, err
			}
		default:
			return r, fmt.Errorf("unknown request %q", q.Op)
		}
		r.Sum, err = data.Check()
		return r, err
	})
	if c != nil {
		_, churnErr := c.stop()
		err = errors.Join(err, churnErr)
	}
	return errors.Join(err, data.Close())
}

// churn writes to a region, and checks all of it, until it is stopped. The
// region is its own until then.
type churn struct {
	cancel context.CancelFunc
	done   chan struct{}

	// Set before done is closed.
	rounds int
	err    error
}

// writesPerRound is how many pages a round writes before it checks them all.
const writesPerRound = 256

func startChurn(ctx context.Context, data *memory.Region, q control.Request) *churn {
	ctx, cancel := context.WithCancel(ctx)
	c := &churn{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		pick := rand.New(rand.NewPCG(q.Seed, 0))
		seed := pick.Uint64
		if q.Seeds > 0 {
			seed = func() uint64 { return pick.Uint64N(q.Seeds) }
		}
		for ctx.Err() == nil && c.err == nil {
			for range writesPerRound {
				data.Write(q.First+pick.IntN(q.Count), 1, seed())
			}
			_, c.err = data.Check()
			c.rounds++
			select {
			case <-time.After(q.Pause):
			case <-ctx.Done():
			}
		}
	}()
	return c
}

func (c *churn) stop() (rounds int, err error) {
	c.cancel()
	<-c.done
	return c.rounds, c.err
}
