package stress_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
)

// family is processes that share a partition, and nothing with anybody else.
// They are found by their control group, which none of them can leave: so it
// is sure, at any time, who is in which family. Pids are not used again, see
// prepareMachine.
type family struct {
	*stress
	name   string // of the partition too
	cgroup string

	done, refused map[string]*atomic.Int64

	mu  sync.Mutex // protects fds
	fds []int      // of the partition
}

func newFamily(t *testing.T, s *stress, number int) *family {
	f := &family{stress: s, name: fmt.Sprintf("family-%d", number)}
	f.cgroup = filepath.Join("/sys/fs/cgroup", f.name)
	if err := os.Mkdir(f.cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(f.cgroup); err != nil {
			t.Error(err)
		}
	})
	// Those who disturb them and look at them get more of an emulated kernel that
	// checks itself, which is slow: else they have next to no turns.
	f.set("pids.max", "12")
	f.set("cpu.weight", "30")
	f.done, f.refused = make(map[string]*atomic.Int64), make(map[string]*atomic.Int64)
	for _, d := range disturbances {
		f.done[d.name], f.refused[d.name] = new(atomic.Int64), new(atomic.Int64)
	}
	return f
}

func (f *family) set(file, value string) {
	if err := os.WriteFile(filepath.Join(f.cgroup, file), []byte(value), 0); err != nil {
		f.t.Error(err)
	}
}

// keepRoot sees to it that there is a first process until ctx ends.
func (f *family) keepRoot(ctx context.Context, r *rand.Rand) {
	for ctx.Err() == nil {
		if err := f.runRoot(r.Uint64()); err != nil {
			f.t.Errorf("%s: %v", f.name, err)
			return
		}
	}
}

// runRoot runs a process to its end, and fails if it or one that it forked
// found something wrong.
func (f *family) runRoot(seed uint64) error {
	cmd := exec.Command(f.program, "churn", strconv.FormatUint(seed, 10), filepath.Join(f.cgroup, "cgroup.procs"))
	// Those that it forked may outlive it: they are read to their end too.
	complaints, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer complaints.Close()
	cmd.Stderr = w
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	for lines := bufio.NewScanner(complaints); lines.Scan(); {
		f.t.Errorf("%s: %s", f.name, lines.Text())
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signaled() {
		switch exit.Sys().(syscall.WaitStatus).Signal() {
		case unix.SIGKILL, unix.SIGTERM:
			return nil
		}
	}
	return err
}

// pids are the family's processes, without those that are exiting.
func (f *family) pids() []int {
	data, err := os.ReadFile(filepath.Join(f.cgroup, "cgroup.procs"))
	if err != nil {
		f.t.Error(err)
	}
	var pids []int
	for _, word := range strings.Fields(string(data)) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			f.t.Error(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

func kill(pid int, signal unix.Signal) {
	// It may have ended by itself.
	_ = unix.Kill(pid, signal)
}

// freeze has all processes of the family stand still, or go on.
func (f *family) freeze(frozen bool) {
	value := map[bool]string{true: "1", false: "0"}[frozen]
	f.set("cgroup.freeze", value)
	if err := f.await("frozen "+value, patience, nil); err != nil {
		f.t.Error(err)
	}
}

// end tells all processes of the family to check their memory and exit.
func (f *family) end() {
	err := f.await("populated 0", patience, func() {
		for _, pid := range f.pids() {
			kill(pid, unix.SIGTERM)
		}
	})
	if err != nil {
		f.t.Error(err)
		f.set("cgroup.kill", "1")
	}
}

// await waits until the control group's events have a line. It calls meanwhile
// again and again, if it is not nil.
func (f *family) await(line string, most time.Duration, meanwhile func()) error {
	events, err := os.Open(filepath.Join(f.cgroup, "cgroup.events"))
	if err != nil {
		return err
	}
	defer events.Close()
	for began := time.Now(); time.Since(began) < most; {
		if meanwhile != nil {
			meanwhile()
		}
		if _, err := events.Seek(0, io.SeekStart); err != nil {
			return err
		}
		data, err := io.ReadAll(events)
		if err != nil {
			return err
		}
		if strings.Contains("\n"+string(data), "\n"+line+"\n") {
			return nil
		}
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(events.Fd()), Events: unix.POLLPRI}}, 200)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return fmt.Errorf("%s: not %q within %s", f.name, line, most)
}

// wantEmpty looks at the partition, if it is there now, after all of the
// family's processes have gone, and removes it.
func (f *family) wantEmpty() {
	for _, counter := range []string{"pages_shared", "pages_sharing", "pages_unshared"} {
		err := eventually(func() error {
			n, err := ksm.Counter(filepath.Join(f.name, counter))
			if errors.Is(err, unix.ENOENT) {
				return nil
			}
			if err == nil && n != 0 {
				err = fmt.Errorf("%s is %d, and the partition has no process", counter, n)
			}
			return err
		})
		if err != nil {
			f.t.Errorf("%s: %v", f.name, err)
		}
	}
	for f.closeAny(0) {
	}
	err := eventually(func() error {
		err := ksm.Write("control/remove_partition", "%s", f.name)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
		if _, err := os.Stat(filepath.Join(ksm.Root, f.name)); err == nil {
			return errors.New("the partition was removed, but has its directory")
		}
		return nil
	})
	if err != nil {
		f.t.Errorf("%s: %v", f.name, err)
	}
}

// eventually calls f until it returns nil, and returns the last error if it
// never does.
func eventually(f func() error) error {
	const most = time.Minute
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for began := time.Now(); ; <-poll.C {
		err := f()
		if err == nil || time.Since(began) > most {
			return err
		}
	}
}
