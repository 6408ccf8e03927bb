package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Where the new root is put together, in the initramfs.
const (
	lowerDir = "/lower" // the host's root directory, read-only
	writeDir = "/write" // the overlay's upper and work directories, on a tmpfs
	rootDir  = "/newroot"
)

// shareOptions are the options of all 9p mounts. The message size is near the
// largest that virtio takes, reading a large program is many times faster so.
const shareOptions = "trans=virtio,version=9p2000.L,msize=512000,"

type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

// mount mounts m below root, and makes the directory if it is not there.
func (m mount) mount(root string) error {
	target := filepath.Join(root, m.target)
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(m.source, target, m.fstype, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
	}
	return nil
}

// TempDir is a directory on a tmpfs, that may hold the upper directory of an
// overlay. The root may not: it is an overlay itself.
const TempDir = "/run/tmp"

// mounts are what a system has below its root. Container engines keep their
// overlays in /var/lib, so the root file system does not do for them.
var mounts = []mount{
	{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"cgroup2", cgroupDir, "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "nsdelegate,memory_recursiveprot"},
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,ptmxmode=0666,gid=5"},
	{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	{"mqueue", "/dev/mqueue", "mqueue", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
	{"tmpfs", "/var/lib/containerd", "tmpfs", 0, "mode=0711"},
	{"tmpfs", "/var/lib/containers", "tmpfs", 0, "mode=0711"},
}

// setUp makes a system out of the kernel and the host's files.
func setUp(task Task) error {
	if err := switchRoot(task.ReadWrite); err != nil {
		return err
	}
	for _, m := range mounts {
		if err := m.mount("/"); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(TempDir, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(TempDir, 0o777|fs.ModeSticky); err != nil {
		return err
	}
	for name, target := range map[string]string{
		"/dev/fd":     "/proc/self/fd",
		"/dev/stdin":  "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1",
		"/dev/stderr": "/proc/self/fd/2",
		"/dev/ptmx":   "pts/ptmx",
	} {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.Symlink(target, name); err != nil {
			return err
		}
	}
	if err := unix.Sethostname([]byte("selective-ksm")); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	limit := unix.Rlimit{Cur: 1 << 16, Max: 1 << 20}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("raise the limit of open files: %w", err)
	}
	return delegateCgroups()
}

// switchRoot makes the host's root directory, with writes kept in memory, the
// root of this process. The initramfs cannot stay: pivot_root, and so every
// container runtime, refuses to move away from it.
func switchRoot(shares []Share) error {
	for _, m := range []mount{
		{RootTag, lowerDir, "9p", unix.MS_RDONLY, shareOptions + "cache=loose"},
		{"tmpfs", writeDir, "tmpfs", 0, "mode=0755"},
	} {
		if err := m.mount("/"); err != nil {
			return err
		}
	}
	upper, work := filepath.Join(writeDir, "upper"), filepath.Join(writeDir, "work")
	for _, dir := range []string{upper, work} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	overlay := mount{"overlay", rootDir, "overlay", 0,
		fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lowerDir, upper, work)}
	if err := overlay.mount("/"); err != nil {
		return err
	}
	for _, s := range shares {
		// Mappings that are shared and written need a page cache.
		m := mount{s.Tag, s.Path, "9p", 0, shareOptions + "cache=mmap"}
		if err := m.mount(rootDir); err != nil {
			return err
		}
	}
	if err := os.Chdir(rootDir); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the new root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	return os.Chdir("/")
}

func loopbackUp() error {
	sock, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(sock)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(sock, unix.SIOCSIFFLAGS, req)
}

const cgroupDir = "/sys/fs/cgroup"

// delegateCgroups enables all controllers for the root's children. Init moves
// to a child, as it does on other systems, and the command with it.
func delegateCgroups() error {
	leaf := filepath.Join(cgroupDir, "init")
	if err := os.Mkdir(leaf, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte("0"), 0); err != nil {
		return err
	}
	controllers, err := os.ReadFile(filepath.Join(cgroupDir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, c := range strings.Fields(string(controllers)) {
		if err := os.WriteFile(filepath.Join(cgroupDir, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil {
			return fmt.Errorf("delegate controller %s: %w", c, err)
		}
	}
	return nil
}
