package plugin

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/nri/pkg/api"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/optin"
)

// kept is a copy of the wrapper that is not in its place yet. The zero value is none.
type kept struct{ part, path string }

// place puts the copy where containers get it from. Those that run keep the one they have.
func (k kept) place() error {
	if k.part == "" {
		return nil
	}
	return os.Rename(k.part, k.path)
}

// drop removes a copy that is not to be placed.
func (k kept) drop() error {
	if k.part == "" {
		return nil
	}
	return os.Remove(k.part)
}

// keepWrapper copies the wrapper to a directory of our own. The runtime mounts the
// copy when a container starts, long after we named it, and a mount of what is not
// there fails the container: so it may not depend on a file that an upgrade or a
// removal of the package takes away.
func keepWrapper(dir, wrapper string) (_ kept, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("copy of the wrapper for containers: %w", err)
		}
	}()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return kept{}, err
	}
	// One that was killed at this has left its part: nobody else does it at a time.
	const part = ".optin-*"
	left, err := filepath.Glob(filepath.Join(dir, part))
	for _, path := range left {
		err = errors.Join(err, os.Remove(path))
	}
	if err != nil {
		return kept{}, err
	}
	from, err := os.Open(wrapper)
	if err != nil {
		return kept{}, err
	}
	defer from.Close()
	to, err := os.CreateTemp(dir, part)
	if err != nil {
		return kept{}, err
	}
	_, err = io.Copy(to, from)
	k := kept{part: to.Name(), path: filepath.Join(dir, "optin")}
	if err := errors.Join(err, to.Chmod(0o755), to.Close()); err != nil {
		return kept{}, errors.Join(err, k.drop())
	}
	return k, nil
}

// wrapperRuns tells why the wrapper might not run in a container where the
// container's own command would. A Go program asks for more than the smallest
// programs do, and whoever made the container cannot have known of it.
func wrapperRuns(wrapper string, ctr *api.Container) error {
	if err := optin.CheckBinary(wrapper); err != nil {
		return err
	}
	linux := ctr.GetLinux()
	if slices.ContainsFunc(linux.GetNamespaces(), func(n *api.LinuxNamespace) bool { return n.GetType() == "user" }) {
		// The flag of a mount that comes from outside is locked there.
		var fs unix.Statfs_t
		if err := unix.Statfs(wrapper, &fs); err != nil {
			return fmt.Errorf("wrapper %s: %w", wrapper, err)
		}
		if fs.Flags&unix.ST_NOEXEC != 0 {
			return fmt.Errorf("it has a user namespace, in which nothing from %s, which is mounted noexec, can be executed", filepath.Dir(wrapper))
		}
	}
	if err := checkLimits(ctr); err != nil {
		return err
	}
	return checkSeccomp(linux.GetSeccompPolicy())
}

// What the wrapper needs of each resource, with much to spare. Without these, Go's
// runtime cannot start its threads, or reserve the addresses for its heap.
const (
	minProcesses = 32
	minMemory    = 16 << 20
)

var minRlimits = map[string]uint64{
	"RLIMIT_AS":     4 << 30,
	"RLIMIT_DATA":   1 << 30,
	"RLIMIT_NOFILE": 32,
	"RLIMIT_NPROC":  minProcesses,
}

// checkLimits tells which of a container's limits the wrapper might not keep to.
func checkLimits(ctr *api.Container) error {
	tooLow := func(what string, limit, least uint64) error {
		return fmt.Errorf("its %s of %d is too low for the wrapper, which may need %d", what, limit, least)
	}
	resources := ctr.GetLinux().GetResources()
	if n := resources.GetPids().GetLimit(); n > 0 && n < minProcesses {
		return tooLow("limit of processes", uint64(n), minProcesses)
	}
	if n := resources.GetMemory().GetLimit().GetValue(); n > 0 && n < minMemory {
		return tooLow("limit of memory", uint64(n), minMemory)
	}
	for _, limit := range ctr.GetRlimits() {
		if least := minRlimits[limit.GetType()]; limit.GetSoft() < least {
			return tooLow(limit.GetType(), limit.GetSoft(), least)
		}
	}
	return nil
}

// wrapperCalls are the system calls that the wrapper makes before it executes
// the container's command, beyond those of any program; the last few only on a
// busy machine.
var wrapperCalls = []string{
	"clone", "close", "fcntl", "futex", "gettid", "madvise", "mmap", "nanosleep", "openat", "prctl", "read", "rt_sigaction",
	"rt_sigprocmask", "sched_getaffinity", "sigaltstack",
	"getpid", "munmap", "rt_sigreturn", "sched_yield", "tgkill",
}

// checkSeccomp tells which of the wrapper's system calls a policy might refuse. It
// need not know all of what a policy says: a rule that depends on arguments counts
// as one that may hold and may not.
func checkSeccomp(policy *api.LinuxSeccomp) error {
	if policy == nil {
		return nil
	}
	for _, call := range wrapperCalls {
		byDefault := true
		var actions []string
		for _, rule := range policy.GetSyscalls() {
			if slices.Contains(rule.GetNames(), call) {
				actions = append(actions, rule.GetAction())
				byDefault = byDefault && len(rule.GetArgs()) > 0
			}
		}
		if byDefault {
			actions = append(actions, policy.GetDefaultAction())
		}
		// A prctl that just fails is why a container is not merged, and no harm.
		allowed := call == "prctl"
		for _, action := range actions {
			switch action {
			case "SCMP_ACT_ALLOW", "SCMP_ACT_LOG":
				allowed = true
			case "SCMP_ACT_ERRNO":
			default:
				return fmt.Errorf("its seccomp policy may answer the wrapper's %s with %s", call, action)
			}
		}
		if !allowed {
			return fmt.Errorf("its seccomp policy refuses the wrapper's %s", call)
		}
	}
	return nil
}
