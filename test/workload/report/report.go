// Package report is what the program in a test's container sees of itself, for the test
// to compare it with what it would be without whatever was put before it.
package report

import (
	"encoding/json"
	"errors"
	"os"
	goruntime "runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Report is a process as it sees itself.
type Report struct {
	Args     []string
	Dir      string
	Exe      string
	Env      []string
	PID      int
	UID, GID int
	Groups   []int
	// Nice is nice(2)'s, and Limits are /proc/self/limits.
	Nice   int
	Limits string
	// Status are the lines of proc_pid_status(5) about what the process may do: its
	// capabilities, seccomp, and the signals that it blocks and ignores.
	Status []string
	// Files are the descriptors that are open, and what of.
	Files []string
	// Mounts are the mount points that it sees, and their options, in order.
	Mounts []string
	// Mergeable is prctl(PR_GET_MEMORY_MERGE), or why it failed.
	Mergeable string
}

var kept = []string{
	"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "SigBlk", "SigIgn", "Cpus_allowed", "Mems_allowed", "THP_enabled", "Umask",
}

// Own is the calling process's.
func Own() (Report, error) {
	var errs []error
	read := func(path string) string {
		data, err := os.ReadFile(path)
		errs = append(errs, err)
		return string(data)
	}
	r := Report{Args: os.Args, Env: os.Environ(), PID: os.Getpid(), UID: os.Getuid(), GID: os.Getgid()}
	var err error
	r.Groups, err = os.Getgroups()
	errs = append(errs, err)
	r.Dir, err = os.Getwd()
	errs = append(errs, err)
	r.Exe, err = os.Readlink("/proc/self/exe")
	errs = append(errs, err)
	r.Nice, err = unix.Getpriority(unix.PRIO_PROCESS, 0)
	errs = append(errs, err)
	files, err := os.ReadDir("/proc/self/fd")
	errs = append(errs, err)
	for _, f := range files {
		// The directory's own is closed by now. Go's runtime keeps the limits of its cgroup
		// open, if it finds them.
		target, err := os.Readlink("/proc/self/fd/" + f.Name())
		if err == nil && !strings.HasPrefix(target, "/sys/fs/cgroup/") {
			kind, _, _ := strings.Cut(target, "[") // pipe:[NUMBER], anon_inode:[eventpoll]
			r.Files = append(r.Files, f.Name()+" "+kind)
		}
	}
	r.Limits = read("/proc/self/limits")
	// Of this thread: Go's runtime lets others block signals for a moment.
	goruntime.LockOSThread()
	defer goruntime.UnlockOSThread()
	for line := range strings.Lines(read("/proc/thread-self/status")) {
		if key, _, _ := strings.Cut(line, ":"); slices.Contains(kept, key) {
			r.Status = append(r.Status, strings.Join(strings.Fields(line), " "))
		}
	}
	for line := range strings.Lines(read("/proc/self/mountinfo")) {
		if f := strings.Fields(line); len(f) > 5 {
			r.Mounts = append(r.Mounts, f[4]+" "+f[5])
		}
	}
	slices.Sort(r.Mounts)
	r.Mergeable = mergeable()
	return r, errors.Join(errs...)
}

func mergeable() string {
	is, err := unix.PrctlRetInt(unix.PR_GET_MEMORY_MERGE, 0, 0, 0, 0)
	switch {
	case err != nil:
		return err.Error()
	case is == 1:
		return "yes"
	}
	return "no"
}

// Print writes a report as one line.
func (r Report) Print(to *os.File) error { return json.NewEncoder(to).Encode(r) }

// Parse finds a report in what a process has written.
func Parse(output string) (r Report, ok bool) {
	for line := range strings.Lines(output) {
		if json.Unmarshal([]byte(line), &r) == nil && len(r.Args) > 0 {
			return r, true
		}
	}
	return Report{}, false
}
