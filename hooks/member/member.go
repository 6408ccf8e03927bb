// Package member keeps what OCI hooks were told of containers, in a file for each
// that lives as long as the container does. Hooks run at the same time, are killed, or
// never come: so each change is made at once and under a lock, and what is out of date
// is found by the cgroup, which the kernel keeps, and by the boot.
package member

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine"
)

// Program is the file that a process executes.
type Program struct {
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
}

// Facts are what policy has to know of a container.
type Facts struct {
	// HostPID is that it sees the processes of the machine, Privileged that it has the
	// devices of the machine, or may have.
	HostPID    bool `json:"host_pid"`
	Privileged bool `json:"privileged"`
	// Labels are those of its pod that were asked for when it was created. One that the
	// pod has not is nil.
	Labels map[string]*string `json:"labels,omitempty"`
	// Annotations are those of the configuration.
	Annotations map[string]string `json:"annotations,omitempty"`
}

// Member is a container that hooks have told of.
type Member struct {
	// Container has the partition that policy gave it when it was created.
	engine.Container
	Facts *Facts `json:"facts"`
	// PID is that of its first process. It means nothing once that has exited.
	PID int `json:"pid"`
	// Init is what that process executed when it was created: the runtime's program,
	// which executes the container's own when it is started.
	Init Program `json:"init"`
	// Created is when it was written down. It tells one life of a container from the
	// next.
	Created time.Time `json:"created"`
	// Started is that the runtime has started it, or is about to.
	Started bool `json:"started"`
	// Done is that the merges after its start are done.
	Done bool `json:"done"`
}

// Dir is a directory of members. Its methods may be called concurrently, by several
// processes too.
type Dir struct {
	path string
	boot string
	gone func(cgroupsPath string) bool
}

// form is that of a file.
type form struct {
	Boot   string `json:"boot"`
	Member Member `json:"member"`
}

const (
	bootID    = "/proc/sys/kernel/random/boot_id"
	suffix    = ".json"
	temporary = ".new-"
	lockName  = "lock"
	// again is the pause before a lock is tried again.
	again = 2 * time.Millisecond
)

// Open opens a directory of members, which is made where it is not there. A member
// whose cgroup is gone is none any more.
func Open(path string, gone func(cgroupsPath string) bool) (*Dir, error) {
	boot, err := os.ReadFile(bootID)
	if err == nil {
		err = os.MkdirAll(path, 0o700)
	}
	if err != nil {
		return nil, fmt.Errorf("members: %w", err)
	}
	return &Dir{path: path, boot: strings.TrimSpace(string(boot)), gone: gone}, nil
}

// Put writes a member down, in the place of one with the same id.
func (d *Dir) Put(ctx context.Context, m Member) error {
	return d.locked(ctx, func() error { return d.write(m) })
}

// Change changes a member, and reports whether there is one.
func (d *Dir) Change(ctx context.Context, id string, change func(*Member)) (found bool, err error) {
	err = d.locked(ctx, func() error {
		m, err := d.read(d.file(id))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		found = true
		change(&m)
		return d.write(m)
	})
	return found, err
}

// Remove forgets a member, and reports whether there was one.
func (d *Dir) Remove(ctx context.Context, id string) (found bool, err error) {
	err = d.locked(ctx, func() error {
		err := os.Remove(d.file(id))
		found = err == nil
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	return found, err
}

// Get reads a member, and reports whether there is one.
func (d *Dir) Get(ctx context.Context, id string) (m Member, found bool, err error) {
	err = d.locked(ctx, func() error {
		m, err = d.read(d.file(id))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		found = err == nil
		return err
	})
	return m, found, err
}

// All reads all members, and removes the files of those that are none any more, and of
// those that make no sense: nobody but this package writes there. What is wrong with these
// is the error, beside the others; so it is if some, or all, cannot be read just now.
func (d *Dir) All(ctx context.Context) (all []Member, err error) {
	err = d.locked(ctx, func() error {
		entries, err := os.ReadDir(d.path)
		if err != nil {
			return err
		}
		var errs []error
		for _, e := range entries {
			path := filepath.Join(d.path, e.Name())
			switch {
			case strings.HasPrefix(e.Name(), temporary):
				// Its writer was killed.
				errs = append(errs, os.Remove(path))
				continue
			case !strings.HasSuffix(e.Name(), suffix):
				continue
			}
			m, err := d.read(path)
			switch {
			case err == nil && !d.gone(m.CgroupsPath):
				all = append(all, m)
				continue
			case errors.Is(err, fs.ErrNotExist):
				err = nil // of another boot
			case errors.As(err, new(*fs.PathError)):
				// It makes sense to who has a descriptor left.
				errs = append(errs, err)
				continue
			}
			errs = append(errs, err, os.Remove(path))
		}
		return errors.Join(errs...)
	})
	return all, err
}

// List reads the members of a directory, which need not be there, and changes nothing.
// What makes no sense, or is of another boot, is left out.
func List(path string) []Member {
	boot, err := os.ReadFile(bootID)
	if err != nil {
		return nil
	}
	d := &Dir{path: path, boot: strings.TrimSpace(string(boot))}
	files, err := filepath.Glob(filepath.Join(path, "*"+suffix))
	if err != nil {
		return nil
	}
	var all []Member
	for _, file := range files {
		if m, err := d.read(file); err == nil {
			all = append(all, m)
		}
	}
	return all
}

// file is where a member is written down. An id may not be the name of a file.
func (d *Dir) file(id string) string {
	sum := sha256.Sum256([]byte(id))
	return filepath.Join(d.path, hex.EncodeToString(sum[:16])+suffix)
}

// read reads a file. One of an earlier boot is as good as none.
func (d *Dir) read(path string) (Member, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Member{}, err
	}
	var f form
	if err := json.Unmarshal(data, &f); err != nil {
		return Member{}, fmt.Errorf("%s: %w", path, err)
	}
	if f.Boot != d.boot {
		return Member{}, fmt.Errorf("%s is of another boot: %w", path, fs.ErrNotExist)
	}
	if d.file(f.Member.ID) != path {
		return Member{}, fmt.Errorf("%s: is not the file of container %q", path, f.Member.ID)
	}
	if f.Member.CgroupsPath == "" || f.Member.Facts == nil {
		return Member{}, fmt.Errorf("%s: it is of another version", path)
	}
	return f.Member, nil
}

// write puts a file in its place, whole or not at all.
func (d *Dir) write(m Member) (err error) {
	data, err := json.Marshal(form{Boot: d.boot, Member: m})
	if err != nil {
		return err
	}
	file, err := os.CreateTemp(d.path, temporary)
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	err = errors.Join(err, file.Close())
	if err == nil {
		err = os.Rename(file.Name(), d.file(m.ID))
	}
	if err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	return nil
}

// locked does something that others must not see half done. The lock ends with the
// process that has it, however that ends.
func (d *Dir) locked(ctx context.Context, do func() error) error {
	file, err := os.OpenFile(filepath.Join(d.path, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("members: %w", err)
	}
	defer file.Close()
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		} else if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("members: lock: %w", err)
		}
		select {
		case <-time.After(again):
		case <-ctx.Done():
			return fmt.Errorf("members: lock: %w", ctx.Err())
		}
	}
	if err := do(); err != nil {
		return fmt.Errorf("members: %w", err)
	}
	return nil
}
