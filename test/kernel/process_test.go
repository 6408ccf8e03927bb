package kernel_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/pages"
	"github.com/selective-ksm/selective-ksm/test/workload/memory"
)

// child is the environment variable that makes the test binary a process to be
// merged.
const child = "SELECTIVE_KSM_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(child) != "" {
		if err := serve(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// serve does what the test asks for, a line each, until there are no more.
func serve(in io.Reader, out io.Writer) error {
	var region *memory.Region
	var children []*exec.Cmd
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var command string
		var a, b int
		var seed uint64
		fmt.Sscan(lines.Text(), &command, &a, &b, &seed)
		var answer any = "ok"
		var err error
		switch command {
		case "mergeable":
			err = unix.Prctl(unix.PR_SET_MEMORY_MERGE, 1, 0, 0, 0)
		case "map": // pages, distinct ones, seed
			if region, err = memory.Map(a, b, seed); err == nil {
				answer, _ = region.Range()
			}
		case "unmap":
			err = region.Close()
		case "write": // first page, number of pages, seed
			region.Write(a, b, seed)
		case "check":
			_, err = region.Check()
		case "spawn": // a process by fork and exec, that only waits
			cmd := exec.Command("sleep", "infinity")
			cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
			if err = cmd.Start(); err == nil {
				children = append(children, cmd)
				answer = cmd.Process.Pid
			}
		default:
			err = fmt.Errorf("no command %q", command)
		}
		if err != nil {
			answer = err
		}
		fmt.Fprintln(out, answer)
	}
	for _, c := range children {
		c.Process.Kill()
		c.Wait()
	}
	return lines.Err()
}

// process is a child that holds memory.
type process struct {
	t          *testing.T
	cmd        *exec.Cmd
	in         io.WriteCloser
	out        *bufio.Reader
	start, end uint64
}

// start runs a child that made its memory mergeable.
func start(t *testing.T) *process {
	t.Helper()
	p := startUnmergeable(t)
	p.ask("mergeable")
	return p
}

func startUnmergeable(t *testing.T) *process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: exec.Command(self)}
	p.cmd.Env = append(os.Environ(), child+"=1")
	p.cmd.Stderr = os.Stderr
	p.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		p.cmd.Wait()
	})
	return p
}

// holding runs a child that holds a number of pages, all different, that are
// the same for the same seed.
func holding(t *testing.T, number int, seed uint64) *process {
	t.Helper()
	p := start(t)
	p.hold(number, number, seed)
	return p
}

func (p *process) hold(number, distinct int, seed uint64) {
	p.t.Helper()
	if _, err := fmt.Sscan(p.ask("map %d %d %d", number, distinct, seed), &p.start); err != nil {
		p.t.Fatal(err)
	}
	p.end = p.start + uint64(number*memory.PageSize)
}

// ask has the child do something, and fails the test if it could not.
func (p *process) ask(format string, args ...any) string {
	p.t.Helper()
	if _, err := fmt.Fprintf(p.in, format+"\n", args...); err != nil {
		p.t.Fatal(err)
	}
	answer, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("%s: no answer from pid %d: %v", fmt.Sprintf(format, args...), p.pid(), err)
	}
	answer = strings.TrimSpace(answer)
	if answer != "ok" && strings.Trim(answer, "0123456789") != "" {
		p.t.Fatalf("%s: %s", fmt.Sprintf(format, args...), answer)
	}
	return answer
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// kill ends the child at once, and waits until it is gone.
func (p *process) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

// merge merges the pages from first on, as many as count says.
func (p *process) merge(partition string, first, count int) error {
	from := p.start + uint64(first*memory.PageSize)
	return write(partition+"/trigger_merge", "%d %x %x", p.pid(), from, from+uint64(count*memory.PageSize))
}

func (p *process) mergeAll(partition string) {
	p.t.Helper()
	if err := write(partition+"/trigger_merge", "%d %x %x", p.pid(), p.start, p.end); err != nil {
		p.t.Fatal(err)
	}
}

func (p *process) pages() []pages.Page {
	p.t.Helper()
	found, err := pages.Range(p.pid(), p.start, p.end)
	if err != nil {
		p.t.Fatal(err)
	}
	return found
}

// ksmPages counts the page table entries of processes that map a ksm page, and
// the ksm pages.
func ksmPages(t *testing.T, processes ...*process) (mappings, frames int) {
	t.Helper()
	seen := make(map[uint64]bool)
	for _, p := range processes {
		all, err := pages.All(p.pid())
		if err != nil {
			t.Fatal(err)
		}
		numbers := make([]uint64, len(all))
		for i, page := range all {
			numbers[i] = page.Frame
		}
		flags, err := pages.FlagsOf(numbers...)
		if err != nil {
			t.Fatal(err)
		}
		for i, f := range flags {
			if f.KSM() {
				mappings++
				seen[numbers[i]] = true
			}
		}
	}
	return mappings, len(seen)
}
