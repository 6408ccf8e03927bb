package attack_test

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest"
)

// role is the environment variable that makes the test's binary the program of a
// container. Its value is one of the roles.
const role = "SELECTIVE_KSM_ATTACK"

const (
	attacker = "attacker"
	victim   = "victim"
	// decoy holds as much as the victim at the same place, but nothing that it holds.
	decoy = "decoy"
)

const (
	// guesses is how many pages of the victim's the attacker guesses, and how many it
	// has besides that nobody else has.
	guesses = 1024
	// calibration is how many it has that it can tell are merged, and are not.
	calibration = 512
)

// kind is what the attacker knows of a page of its own.
type kind int

const (
	// guessed is equal to one that the victim has.
	guessed kind = iota
	// unguessed is the control: equal to none, and treated as those that are guessed.
	unguessed
	// paired has an equal among its twins.
	paired
	// single has none. These two are for calibration.
	single
	// twin is equal to one that is paired, and is not timed.
	twin
	kinds
)

var counts = [kinds]int{guessed: guesses, unguessed: guesses, paired: calibration, single: calibration, twin: calibration}

// timedPages is how many of the attacker's pages are timed, and allPages how many it has.
const (
	timedPages = 2*guesses + 2*calibration
	allPages   = timedPages + calibration
)

var pageSize = os.Getpagesize()

// fill fills a page with what nobody can tell from chance, and is the same for the same
// arguments.
func fill(page []byte, what string, number int) {
	// It never returns an error.
	_, _ = rand.NewChaCha8(sha256.Sum256(fmt.Appendf(nil, "%d %s %d", seed, what, number))).Read(page)
}

// secret is what the pages of the victim are filled with, which the attacker guesses.
const secret = "secret"

// hello is the first thing that a program says.
type hello struct {
	// Start and End are the addresses of its pages.
	Start, End uint64
	// Kinds are those of the attacker's pages, in the order of their addresses.
	Kinds []kind
}

// request is what a program is asked for: to probe, to fork, or to fork as a number.
type request struct {
	Op     string
	Number int
}

const (
	opProbe  = "probe"
	opFork   = "fork"
	opForkAs = "fork as"
)

// reply is the answer.
type reply struct {
	Error  string
	Number int
	Times  *times
}

// times is how long one read and one write of each page that is timed took, in
// nanoseconds.
type times struct {
	Reads, Writes [kinds][]float64
}

// serve is the program of a container: it holds pages, and answers requests until there
// are no more.
func serve(name string, in io.Reader, out io.Writer) error {
	// Children end with the thread that made them, and are reaped by the kernel.
	runtime.LockOSThread()
	signal.Ignore(unix.SIGCHLD)
	var (
		data   []byte
		held   []kind
		err    error
		timing *prober
	)
	switch name {
	case attacker:
		if timing, err = newProber(); err == nil {
			data, held = timing.data, timing.kinds()
		}
	case victim:
		data, err = hold(secret)
	case decoy:
		data, err = hold(decoy)
	default:
		err = fmt.Errorf("unknown role %q", name)
	}
	if err != nil {
		return err
	}
	replies, requests := json.NewEncoder(out), json.NewDecoder(in)
	start := uint64(uintptr(unsafe.Pointer(&data[0])))
	if err := replies.Encode(hello{start, start + uint64(len(data)), held}); err != nil {
		return err
	}
	for {
		var q request
		if err := requests.Decode(&q); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		var r reply
		switch {
		case q.Op == opFork:
			r.Number, err = kerneltest.Fork()
		case q.Op == opForkAs:
			r.Number, err = kerneltest.ForkAs(q.Number)
		case q.Op == opProbe && timing != nil:
			r.Times, err = timing.probe()
		default:
			err = fmt.Errorf("%s does not %q", name, q.Op)
		}
		if err != nil {
			r.Error, err = err.Error(), nil
		}
		if err := replies.Encode(r); err != nil {
			return err
		}
	}
}

// place is where victim and decoy have their pages.
const place = 0x200000000000

// hold maps pages there, and fills them.
func hold(what string) ([]byte, error) {
	size := guesses * pageSize
	at, err := unix.MmapPtr(-1, 0, unsafe.Add(nil, place), uintptr(size),
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED_NOREPLACE)
	if err != nil {
		return nil, fmt.Errorf("map pages: %w", err)
	}
	data := unsafe.Slice((*byte)(at), size)
	for i := range guesses {
		fill(data[i*pageSize:(i+1)*pageSize], what, i)
	}
	return data, nil
}

// prober is the attacker's memory. Pages of all kinds are in one mapping, mixed by
// chance, and were all filled in the order of their addresses: all that tells one kind
// from another is what others have in their memory.
type prober struct {
	data   []byte
	pages  [kinds][]int // where in data
	random *rand.Rand
}

func newProber() (*prober, error) {
	data, err := unix.Mmap(-1, 0, allPages*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map pages: %w", err)
	}
	p := &prober{data: data, random: rand.New(rand.NewPCG(seed, 0))}
	at := p.random.Perm(allPages)
	contents := make([]func(page []byte), allPages)
	for k := range kinds {
		p.pages[k], at = at[:counts[k]], at[counts[k]:]
		what := [kinds]string{guessed: secret, unguessed: "control", paired: "paired", single: "single", twin: "paired"}[k]
		for i, page := range p.pages[k] {
			contents[page] = func(page []byte) { fill(page, what, i) }
		}
	}
	for i, write := range contents {
		write(data[i*pageSize : (i+1)*pageSize])
	}
	return p, nil
}

// kinds are those of the pages, in the order of their addresses.
func (p *prober) kinds() []kind {
	of := make([]kind, allPages)
	for k := range kinds {
		for _, page := range p.pages[k] {
			of[page] = k
		}
	}
	return of
}

// probe times one read of each page, and right after it one write of what it holds
// already: a page that is merged is copied then. What it holds is the same afterwards,
// and a page that is not merged is as it was.
//
// Of each kind one page has its turn, in an order of chance, before the second of any
// has: so none is early or late.
func (p *prober) probe() (*times, error) {
	if err := pin(); err != nil {
		return nil, err
	}
	type turn struct {
		kind kind
		word *uint64
		at   [3]time.Duration // before the read, between, and after the write
	}
	turns := make([]turn, 0, timedPages)
	for i := range guesses {
		from := len(turns)
		for k := range twin {
			// There are fewer for calibration: each has a turn in every so many.
			if every := guesses / counts[k]; i%every == 0 {
				page := p.pages[k][i/every]
				turns = append(turns, turn{kind: k, word: (*uint64)(unsafe.Pointer(&p.data[page*pageSize]))})
			}
		}
		turns = append(turns[:from], shuffled(p.random, turns[from:])...)
	}

	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	runtime.GC()
	began := time.Now()
	for i := range turns {
		t := &turns[i]
		t.at[0] = time.Since(began)
		word := atomic.LoadUint64(t.word)
		t.at[1] = time.Since(began)
		atomic.StoreUint64(t.word, word)
		t.at[2] = time.Since(began)
	}

	r := &times{}
	for _, t := range turns {
		r.Reads[t.kind] = append(r.Reads[t.kind], float64(t.at[1]-t.at[0]))
		r.Writes[t.kind] = append(r.Writes[t.kind], float64(t.at[2]-t.at[1]))
	}
	return r, nil
}

func shuffled[E any](random *rand.Rand, s []E) []E {
	random.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] })
	return s
}

// pin keeps the calling thread on one CPU, the last of those that it may run on.
func pin() error {
	var may unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		return fmt.Errorf("pin to a CPU: %w", err)
	}
	for cpu, left := 0, may.Count(); left > 0; cpu++ {
		if may.IsSet(cpu) {
			if left--; left > 0 {
				may.Clear(cpu)
			}
		}
	}
	if err := unix.SchedSetaffinity(0, &may); err != nil {
		return fmt.Errorf("pin to a CPU: %w", err)
	}
	return nil
}
