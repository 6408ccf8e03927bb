package kerneltest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/test/pages"
	"github.com/selective-ksm/selective-ksm/test/workload/memory"
)

// role is the environment variable that makes a test's binary the program of a
// [Process]. Its value is the number of pages to hold.
const role = "SELECTIVE_KSM_HOLD_PAGES"

// Main runs the tests of a package that starts processes. Its TestMain calls it.
func Main(m *testing.M) {
	if n, err := strconv.Atoi(os.Getenv(role)); err == nil {
		if err := hold(n); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// HaveMachine gives a test the machine's ksmd until it ends, and keeps those of other
// packages waiting: there is one, and one merge space for it. With -short, as it takes
// long, it skips the test.
func HaveMachine(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("with -short ksmd is left alone: make test-native has it run")
	}
	lock, err := os.OpenFile(filepath.Join(os.TempDir(), "selective-ksm-test.lock"), os.O_CREATE|os.O_RDWR, 0o666)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lock.Close() })
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX)
		if err == nil {
			return
		} else if !errors.Is(err, unix.EINTR) {
			t.Fatalf("lock %s: %v", lock.Name(), err)
		}
	}
}

// hold holds pages, all different, and the same in all who do. It says where they
// are, and then answers each line of its input.
func hold(n int) error {
	region, err := memory.Map(n, n, 1, false)
	if err != nil {
		return err
	}
	start, _ := region.Range()
	fmt.Printf("%d %d\n", os.Getpid(), start)

	var children []io.Closer
	defer func() {
		for _, c := range children {
			c.Close()
		}
	}()
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		answer := "done"
		switch lines.Text() {
		case "mergeable":
			err = unix.Prctl(unix.PR_SET_MEMORY_MERGE, 1, 0, 0, 0)
		case "check":
			_, err = region.Check()
		case "write": // what is there already
			region.Write(0, n, 1)
		case "change": // to what no other has
			region.Write(0, n, uint64(os.Getpid()))
		case "zeroes": // as many pages more, written to; of a huge page nobody knows which were
			err = touch(n*memory.PageSize, unix.MADV_NOHUGEPAGE)
		case "huge": // one huge page more, if the kernel has one
			err = touch(2*hugePage, unix.MADV_HUGEPAGE)
		case "spawn": // one more that holds
			var child *Process
			if child, err = launch(n); err == nil {
				children = append(children, child)
				answer = fmt.Sprintf("%d %d", child.PID, child.Held.Start)
			}
		default:
			err = errors.New("unknown command")
		}
		if err != nil {
			answer, err = err.Error(), nil
		}
		fmt.Println(answer)
	}
	return lines.Err()
}

// hugePage is the size of one, on x86-64.
const hugePage = 2 << 20

// touch maps memory of zeroes, advises on it, and writes to each page.
func touch(size, advice int) error {
	data, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	// A kernel without huge pages knows no advice on them.
	if err := unix.Madvise(data, advice); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	for at := 0; at < size; at += memory.PageSize {
		data[at] = 0
	}
	return nil
}

// Process is a process that holds the same memory as all others of the same size.
type Process struct {
	// PID is its number, and Held where the memory is.
	PID  int
	Held kernel.Range

	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

// Start starts a process that holds a number of pages, and ends it with the test.
func Start(t testing.TB, pages int) *Process {
	t.Helper()
	p, err := launch(pages)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("process %d: %v", p.PID, err)
		}
	})
	return p
}

// StartMergeable starts one that has made its memory mergeable.
func StartMergeable(t testing.TB, pages int) *Process {
	t.Helper()
	p := Start(t, pages)
	p.Do(t, "mergeable")
	return p
}

func launch(n int) (*Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &Process{cmd: exec.Command(self)}
	p.cmd.Env = append(os.Environ(), role+"="+strconv.Itoa(n))
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewScanner(out)
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	if !p.out.Scan() {
		return nil, errors.Join(errors.New("process said nothing"), p.out.Err(), p.Close())
	}
	if err := p.place(p.out.Text(), n); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func (p *Process) place(line string, n int) error {
	if _, err := fmt.Sscan(line, &p.PID, &p.Held.Start); err != nil {
		return fmt.Errorf("process said %q: %w", line, err)
	}
	p.Held.End = p.Held.Start + uint64(n*memory.PageSize)
	return nil
}

// Close ends the process, if it has not been. One that was killed is no error.
func (p *Process) Close() error {
	if p.cmd == nil {
		return nil
	}
	p.in.Close()
	err := p.cmd.Wait()
	p.cmd = nil
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Sys().(unix.WaitStatus).Signal() == unix.SIGKILL {
		return nil
	}
	return err
}

// Kill kills the process, and waits until it is gone.
func (p *Process) Kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
	p.cmd = nil
}

// Do has the process do something: make itself mergeable, check its memory, write
// what it holds already, or change it.
func (p *Process) Do(t testing.TB, command string) {
	t.Helper()
	if answer := p.ask(t, command); answer != "done" {
		t.Errorf("process %d: %s: %s", p.PID, command, answer)
	}
}

// Spawn has the process start a child that holds the same. It ends with its parent.
func (p *Process) Spawn(t testing.TB) *Process {
	t.Helper()
	child := &Process{}
	if err := child.place(p.ask(t, "spawn"), int(p.Held.Len())/memory.PageSize); err != nil {
		t.Fatal(err)
	}
	return child
}

func (p *Process) ask(t testing.TB, command string) string {
	t.Helper()
	if _, err := fmt.Fprintln(p.in, command); err != nil {
		t.Fatalf("process %d: %v", p.PID, err)
	}
	if !p.out.Scan() {
		t.Fatalf("process %d: no answer to %s: %v", p.PID, command, p.out.Err())
	}
	return strings.TrimSpace(p.out.Text())
}

// Shared is how many of the pages that two processes hold are one physical page in
// both.
func Shared(t testing.TB, a, b *Process) int {
	t.Helper()
	var frames [2][]pages.Page
	for i, p := range []*Process{a, b} {
		held, err := pages.Range(p.PID, p.Held.Start, p.Held.End)
		if err != nil {
			t.Fatal(err)
		}
		frames[i] = pages.ByFrame(held)
	}
	return len(pages.Common(frames[0], frames[1]))
}
