package engine

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// Cause is a kind of reason for which a container is not merged, or not all of it.
// There are few of them, so that they can be counted.
type Cause string

const (
	// CausePolicy is that the configuration or an annotation leaves it out.
	CausePolicy Cause = "policy"
	// CauseOptIn is that it could not be made mergeable without harm.
	CauseOptIn Cause = "opt_in"
	// CauseNotMergeable is that nobody has made its processes mergeable.
	CauseNotMergeable Cause = "not_mergeable"
	// CauseKeptOut is that the kernel has no room for its partition.
	CauseKeptOut Cause = "kept_out"
	// CauseShared is that others are in the kernel's one merge space.
	CauseShared Cause = "shared_space"
	// CauseHeld is that somebody has had its partition unmerged.
	CauseHeld Cause = "held"
	// CauseError is that the kernel or the system refused it.
	CauseError Cause = "error"
)

// Causes are all of them.
var Causes = []Cause{CausePolicy, CauseOptIn, CauseNotMergeable, CauseKeptOut, CauseShared, CauseHeld, CauseError}

// errShared is matched by errors of a merge space that others are in.
var errShared = errors.New("this kernel has one merge space")

// causeOf is the kind of an error.
func causeOf(err error) Cause {
	switch {
	case errors.Is(err, errNotOptedIn):
		return CauseNotMergeable
	case errors.Is(err, kernel.ErrKeptOut):
		return CauseKeptOut
	case errors.Is(err, errShared):
		return CauseShared
	}
	return CauseError
}

// reason is why a container is not merged; the zero value is that it is.
type reason struct {
	cause Cause
	text  string
}

func reasonOf(err error) reason { return reason{causeOf(err), err.Error()} }

// lost are the names of errors of the kernel that have lost their number.
var lost = []struct {
	err  error
	name string
}{
	{kernel.ErrNoPartition, "ENOENT"},
	{kernel.ErrNoProcess, "ESRCH"},
	{kernel.ErrBusy, "EBUSY"},
	{kernel.ErrGoing, "EBUSY"},
	{kernel.ErrNotMember, "ENODEV"},
	{kernel.ErrNotSupported, "EOPNOTSUPP"},
}

// errnoOf is the name of an error's number (errno(3)), or "other".
func errnoOf(err error) string {
	var errno unix.Errno
	if errors.As(err, &errno) {
		if name := unix.ErrnoName(errno); name != "" {
			return name
		}
	}
	for _, known := range lost {
		if errors.Is(err, known.err) {
			return known.name
		}
	}
	return "other"
}

// repeated is how long a failure that goes on is not logged again.
const repeated = time.Hour

// told is when each message was logged last.
type told map[string]time.Time

// again reports whether a message is to be logged, and takes it for logged then.
func (t told) again(msg string) bool {
	now := time.Now()
	if last, before := t[msg]; before && now.Sub(last) < repeated {
		return false
	}
	t[msg] = now
	return true
}
