package stress_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/actor"
	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
)

// A disturbance is something that is done to a family from outside. What it
// meets may go at any time, so some errors are as good as none.
type disturbance struct {
	name   string
	weight int
	do     func(f *family, r *rand.Rand) error
	refuse []error
}

// The errors of a call that names a process of the family and its partition.
var mayBeGone = []error{
	unix.ESRCH,  // the process has gone
	unix.EINVAL, // it is going
	unix.ENOENT, // the partition has gone, or is going
	unix.ENODEV, // and with it the file, while it was open
	unix.EBUSY,  // the process is still bound to a partition of that name that is going
}

var disturbances []disturbance

func init() {
	disturbances = []disturbance{
		{"merge a process", 20, toProcess(mergeProcess), mayBeGone},
		{"merge a mapping", 20, toMapping(mergeMapping), mayBeGone},
		{"merge by ksm_merge", 30, toMapping(mergeBySyscall), mayBeGone},
		{"merge and be killed", 2, toProcess(mergeAndBeKilled), nil},
		{"unmerge a process", 5, toProcess(unmergeProcess), mayBeGone},
		{"unmerge a mapping", 5, toMapping(unmergeMapping), mayBeGone},
		{"add a process", 30, toProcess(addProcess), mayBeGone},
		{"remove a process", 4, toProcess(removeProcess), mayBeGone},
		{"kill a process", 3, toProcess(killProcess), nil},
		{"reclaim memory", 6, reclaim, []error{unix.EAGAIN, unix.EINTR}},
		{"move memory between nodes", 4, toProcess(migrate), []error{unix.ESRCH, unix.EINVAL}},
		{"read the counters", 6, readCounters, mayBeGone},
		{"turn the knobs", 3, turnKnobs, mayBeGone},
		{"add the partition", 10, addPartition, []error{unix.EEXIST, unix.EBUSY}},
		{"open the partition", 5, openPartition, []error{unix.EEXIST, unix.ENOENT}},
		{"close the partition", 4, closePartition, nil},
		{"remove the partition", 1, removePartition, []error{unix.ENOENT, unix.EBUSY}},
	}
}

// disturb does one of them after the other until ctx ends.
func (f *family) disturb(ctx context.Context, r *rand.Rand) {
	total := 0
	for _, d := range disturbances {
		total += d.weight
	}
	for ctx.Err() == nil {
		n, which := r.IntN(total), 0
		for n >= disturbances[which].weight {
			n -= disturbances[which].weight
			which++
		}
		d := &disturbances[which]
		f.still.RLock()
		err := d.do(f, r)
		f.still.RUnlock()
		switch {
		case err == nil:
			f.done[d.name].Add(1)
		case errors.Is(err, errNothing), slices.ContainsFunc(d.refuse, func(e error) bool { return errors.Is(err, e) }):
			f.refused[d.name].Add(1)
		default:
			f.t.Errorf("%s: %s: %v", f.name, d.name, err)
			return
		}
	}
}

// errNothing says that there was nothing to do it to.
var errNothing = errors.New("nothing to disturb")

// toProcess makes a disturbance of one that needs a process.
func toProcess(do func(f *family, r *rand.Rand, pid int) error) func(f *family, r *rand.Rand) error {
	return func(f *family, r *rand.Rand) error {
		pids := f.pids()
		if len(pids) == 0 {
			return errNothing
		}
		return do(f, r, pids[r.IntN(len(pids))])
	}
}

// toMapping makes one of one that needs a range of a process's memory.
func toMapping(do func(f *family, r *rand.Rand, pid int, start, end uint64) error) func(f *family, r *rand.Rand) error {
	return toProcess(func(f *family, r *rand.Rand, pid int) error {
		start, end, err := anyMapping(pid, r)
		if err != nil {
			return err
		}
		return do(f, r, pid, start, end)
	})
}

const everything = 0x7fffffffffff

// anyMapping returns a part of a private mapping that is written to, at random.
func anyMapping(pid int, r *rand.Rand) (start, end uint64, err error) {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, 0, errNothing
	}
	defer maps.Close()
	found := 0
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var s, e uint64
		var rights string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &s, &e, &rights); err != nil || !strings.HasPrefix(rights, "rw-p") {
			continue
		}
		if found++; r.IntN(found) == 0 {
			start, end = s, e
		}
	}
	if found == 0 {
		return 0, 0, errNothing
	}
	first := r.Uint64N((end - start) / actor.PageSize)
	count := 1 + r.Uint64N((end-start)/actor.PageSize-first)
	return start + first*actor.PageSize, start + (first+count)*actor.PageSize, nil
}

func mergeProcess(f *family, r *rand.Rand, pid int) error {
	if err := ksm.Write(f.name+"/trigger_merge", "%d 0 %x", pid, uint64(everything)); err != nil {
		return err
	}
	n, err := ksm.Counter(f.name + "/pages_sharing")
	f.saved(n)
	return err
}

func mergeMapping(f *family, r *rand.Rand, pid int, start, end uint64) error {
	return ksm.Write(f.name+"/trigger_merge", "%d %x %x", pid, start, end)
}

func mergeBySyscall(f *family, r *rand.Rand, pid int, start, end uint64) error {
	if r.IntN(2) == 0 {
		start, end = 0, everything&^(actor.PageSize-1)
	}
	f.mu.Lock()
	if len(f.fds) == 0 {
		f.mu.Unlock()
		return errNothing
	}
	fd, err := unix.FcntlInt(uintptr(f.fds[r.IntN(len(f.fds))]), unix.F_DUPFD_CLOEXEC, 0)
	f.mu.Unlock()
	if err != nil {
		return err
	}
	return errors.Join(ksm.Merge(fd, pid, start, end-start), unix.Close(fd))
}

func mergeAndBeKilled(f *family, r *rand.Rand, pid int) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(r.IntN(50))*time.Millisecond)
	defer cancel()
	// Whatever comes of it: it has to end.
	_ = exec.CommandContext(ctx, "sh", "-c", fmt.Sprintf("echo %d 0 %x >%s/%s/trigger_merge 2>/dev/null",
		pid, uint64(everything), ksm.Root, f.name)).Run()
	return nil
}

func unmergeProcess(f *family, r *rand.Rand, pid int) error {
	return ksm.Write(f.name+"/trigger_unmerge", "%d", pid)
}

func unmergeMapping(f *family, r *rand.Rand, pid int, start, end uint64) error {
	return ksm.Write(f.name+"/trigger_unmerge", "%d %x %x", pid, start, end)
}

func addProcess(f *family, r *rand.Rand, pid int) error {
	return ksm.Write(f.name+"/add_process", "%d", pid)
}

func removeProcess(f *family, r *rand.Rand, pid int) error {
	return ksm.Write(f.name+"/remove_process", "%d", pid)
}

func killProcess(f *family, r *rand.Rand, pid int) error {
	kill(pid, unix.SIGKILL)
	return nil
}

// reclaim has the kernel take some of the family's memory, to swap.
func reclaim(f *family, r *rand.Rand) error {
	return ksm.WriteFile(filepath.Join(f.cgroup, "memory.reclaim"), fmt.Append(nil, (1+r.IntN(8))<<20))
}

// migrate moves the memory of a process to another node.
func migrate(f *family, r *rand.Rand, pid int) error {
	return migratePages(pid, r.IntN(2))
}

func readCounters(f *family, r *rand.Rand) error {
	dirs := []string{"", f.name}
	_, err := ksm.Counter(filepath.Join(dirs[r.IntN(2)], []string{
		"pages_shared", "pages_sharing", "pages_unshared", "pages_scanned",
	}[r.IntN(4)]))
	return err
}

func turnKnobs(f *family, r *rand.Rand) error {
	return errors.Join(
		ksm.Write(f.name+"/pages_to_scan", "%d", 1<<(4+r.IntN(8))),
		ksm.Write(f.name+"/sleep_millisecs", "%d", max(0, r.IntN(8)-6)),
		ksm.Write("max_page_sharing", "%d", []int{2, 16, 256}[r.IntN(3)]))
}

func addPartition(f *family, r *rand.Rand) error {
	return ksm.Write("control/add_partition", "%s", f.name)
}

func removePartition(f *family, r *rand.Rand) error {
	return ksm.Write("control/remove_partition", "%s", f.name)
}

func openPartition(f *family, r *rand.Rand) error {
	const most = 4
	f.mu.Lock()
	full := len(f.fds) == most
	f.mu.Unlock()
	if full {
		return errNothing
	}
	fd, err := ksm.Open(f.name, unix.O_CLOEXEC|[]int{0, unix.O_CREAT, unix.O_CREAT, unix.O_CREAT | unix.O_EXCL}[r.IntN(4)])
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fds = append(f.fds, fd)
	return nil
}

func closePartition(f *family, r *rand.Rand) error {
	if !f.closeAny(r.Int()) {
		return errNothing
	}
	return nil
}

// closeAny closes one of the partition's descriptors, if there is one.
func (f *family) closeAny(which int) bool {
	f.mu.Lock()
	if len(f.fds) == 0 {
		f.mu.Unlock()
		return false
	}
	which %= len(f.fds)
	fd := f.fds[which]
	f.fds = slices.Delete(f.fds, which, which+1)
	f.mu.Unlock()
	if err := unix.Close(fd); err != nil {
		f.t.Errorf("%s: close: %v", f.name, err)
	}
	return true
}
