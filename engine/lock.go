package engine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// RunDir is where the engine of the machine keeps its lock and its socket, and its
// plugin what containers get. Like a container it lives until the machine boots again.
const RunDir = "/run/selective-ksm"

// ErrLocked says that another engine runs on this machine.
var ErrLocked = errors.New("another engine runs on this machine: stop it first")

// Lock makes the caller's engine the only one that uses a directory, which is made
// where it is not there. It holds until the file is closed, or the process ends
// however it does. It returns an error that matches [ErrLocked] where another has it.
func Lock(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	file, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrLocked
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("lock %s: %w", file.Name(), err)
	}
	return file, nil
}
