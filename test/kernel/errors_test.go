package kernel_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/actor"
	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
)

const (
	kthreadd = 2
	noPid    = 1<<22 - 1 // the greatest that there may be
	tooHigh  = 0xffff800000000000
)

// zombie is the pid of a process that has ended, and that nobody has reaped.
func zombie(t *testing.T) int {
	t.Helper()
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_PID, cmd.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil)
		if err == nil {
			return cmd.Process.Pid
		}
		if err != unix.EINTR {
			t.Fatal(err)
		}
	}
}

func TestProcessErrors(t *testing.T) {
	wantFeature(t, addProcess)
	a, b := partition(t, "a"), partition(t, "b")
	p := startUnmergeable(t)
	dead := startUnmergeable(t)
	dead.kill()
	z := zombie(t)
	for _, c := range []struct {
		file, line string
		want       error
	}{
		{"add_process", "word", unix.EINVAL},
		{"add_process", "\n", unix.EINVAL},
		{"add_process", fmt.Sprintf("%d 1", p.Pid), unix.EINVAL},
		{"add_process", fmt.Sprintf("%dx", p.Pid), unix.EINVAL},
		{"add_process", "99999999999999999999", unix.EINVAL},
		{"add_process", fmt.Sprint(dead.Pid), unix.ESRCH},
		{"add_process", fmt.Sprint(noPid), unix.ESRCH},
		{"add_process", "0", unix.ESRCH},
		{"add_process", "-1", unix.ESRCH},
		{"add_process", fmt.Sprint(kthreadd), unix.EINVAL},
		{"add_process", fmt.Sprint(z), unix.EINVAL},
		{"remove_process", fmt.Sprint(p.Pid), unix.ENOENT},
		{"add_process", fmt.Sprintf("%d\n", p.Pid), nil},
		{"add_process", fmt.Sprint(p.Pid), nil},
		{"remove_process", "word", unix.EINVAL},
		{"remove_process", fmt.Sprintf("%d 1", p.Pid), unix.EINVAL},
		{"remove_process", fmt.Sprint(dead.Pid), unix.ESRCH},
		{"remove_process", "0", unix.ESRCH},
		{"remove_process", "-1", unix.ESRCH},
		{"remove_process", fmt.Sprint(kthreadd), unix.EINVAL},
		{"remove_process", fmt.Sprint(z), unix.EINVAL},
	} {
		wantErr(t, fmt.Sprintf("%s %q", c.file, c.line), ksm.Write(a+"/"+c.file, "%s", c.line), c.want)
	}
	wantErr(t, "add a process of a to b", ksm.Write(b+"/add_process", "%d", p.Pid), unix.EBUSY)
	wantErr(t, "remove a process of a from b", ksm.Write(b+"/remove_process", "%d", p.Pid), unix.ENOENT)
	wantErr(t, "remove a process", ksm.Write(a+"/remove_process", "%d\n", p.Pid), nil)
	wantErr(t, "remove it again", ksm.Write(a+"/remove_process", "%d", p.Pid), unix.ENOENT)
	wantErr(t, "add it to b", ksm.Write(b+"/add_process", "%d", p.Pid), nil)
}

func TestOpenErrors(t *testing.T) {
	wantFeature(t, syscalls)
	here := partition(t, "here")
	long := strings.Repeat("x", 31)
	for _, c := range []struct {
		name  string
		flags int
		want  error
	}{
		{here, 0, nil},
		{here, unix.O_CLOEXEC, nil},
		{here, unix.O_CREAT, nil},
		{here, unix.O_CREAT | unix.O_EXCL, unix.EEXIST},
		{"nobody", 0, unix.ENOENT},
		{"nobody", unix.O_EXCL, unix.EINVAL},
		{here, unix.O_EXCL, unix.EINVAL},
		{here, unix.O_RDWR, unix.EINVAL},
		{here, unix.O_WRONLY | unix.O_CREAT, unix.EINVAL},
		{here, unix.O_TRUNC, unix.EINVAL},
		{here, unix.O_NONBLOCK, unix.EINVAL},
		{here, 1 << 30, unix.EINVAL},
		{here, -1, unix.EINVAL},
		{"", unix.O_CREAT, unix.EINVAL},
		{"\n", unix.O_CREAT, unix.EINVAL},
		{"new\n", unix.O_CREAT, unix.EINVAL},
		{".hidden", unix.O_CREAT, unix.EINVAL},
		{"..", unix.O_CREAT, unix.EINVAL},
		{"a/b", unix.O_CREAT, unix.EINVAL},
		{"a b", unix.O_CREAT, unix.EINVAL},
		{"\xe4", unix.O_CREAT, unix.EINVAL},
		{"control", unix.O_CREAT, unix.EINVAL},
		{"control", 0, unix.EINVAL},
		{"pages_shared", unix.O_CREAT, unix.EINVAL},
		{"max_page_sharing", unix.O_CREAT, unix.EINVAL},
		{long + "x", unix.O_CREAT, unix.ENAMETOOLONG},
		{long + "x", 0, unix.ENAMETOOLONG},
		{strings.Repeat("x", 1<<16), unix.O_CREAT, unix.ENAMETOOLONG},
		{long, unix.O_CREAT | unix.O_EXCL, nil},
		{"A-z_0.9", unix.O_CREAT | unix.O_EXCL | unix.O_CLOEXEC, nil},
	} {
		fd, err := ksm.Open(c.name, c.flags)
		wantErr(t, fmt.Sprintf("ksm_open %.40q %#x", c.name, c.flags), err, c.want)
		if err != nil {
			continue
		}
		got, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if want := c.flags & unix.O_CLOEXEC / unix.O_CLOEXEC * unix.FD_CLOEXEC; err != nil || got != want {
			t.Errorf("ksm_open %q %#x: descriptor flags %#x, %v, want %#x", c.name, c.flags, got, err, want)
		}
		if err := unix.Close(fd); err != nil {
			t.Error(err)
		}
	}
	for _, address := range []uintptr{0, 1, 0x7ffffffff000, tooHigh, ^uintptr(0)} {
		_, _, errno := unix.Syscall(ksm.OpenNumber, address, unix.O_CREAT, 0)
		wantErr(t, fmt.Sprintf("ksm_open of a name at %#x", address), errno, unix.EFAULT)
	}
}

// A partition that there was no descriptor for is not left behind.
func TestOpenWithoutDescriptor(t *testing.T) {
	wantFeature(t, syscalls)
	p := startUnmergeable(t)
	if err := unix.Prlimit(p.Pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: 3}, nil); err != nil {
		t.Fatal(err)
	}
	_, err := p.Ask("open %d %d new", ksm.OpenNumber, unix.O_CREAT)
	wantErr(t, "ksm_open", err, unix.EMFILE)
	wantGone(t, "new")
}

func TestMergeErrors(t *testing.T) {
	wantFeature(t, syscalls)
	a, b := partition(t, "a"), partition(t, "b")
	const n = 16
	p := holding(t, n, 1)
	dead := startUnmergeable(t)
	dead.kill()
	open1, open2 := open(t, a, 0), open(t, b, 0)
	fd, other := int(open1.Fd()), int(open2.Fd())
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	size := uint64(n * actor.PageSize)
	for _, c := range []struct {
		what        string
		fd, pid     int
		start, size uint64
		want        error
	}{
		{"no descriptor", -1, p.Pid, p.start, size, unix.EBADF},
		{"a closed descriptor", 1000, p.Pid, p.start, size, unix.EBADF},
		{"a descriptor of a file", int(null.Fd()), p.Pid, p.start, size, unix.EBADF},
		{"a descriptor of a process", pidfd(t, p.Pid), p.Pid, p.start, size, unix.EBADF},
		{"size 0", fd, p.Pid, p.start, 0, unix.EINVAL},
		{"overflow", fd, p.Pid, p.start, ^uint64(0), unix.EINVAL},
		{"overflow to 0", fd, p.Pid, p.start, -p.start, unix.EINVAL},
		{"outside of the address space", fd, p.Pid, tooHigh, size, unix.EINVAL},
		{"a kernel thread", fd, kthreadd, p.start, size, unix.EINVAL},
		{"a zombie", fd, zombie(t), p.start, size, unix.EINVAL},
		{"a process that is gone", fd, dead.Pid, p.start, size, unix.ESRCH},
		{"pid 0", fd, 0, p.start, size, unix.ESRCH},
		{"pid -1", fd, -1, p.start, size, unix.ESRCH},
		{"a process", fd, p.Pid, p.start, size, nil},
		{"the same again", fd, p.Pid, p.start, size, nil},
		{"another range of it", fd, p.Pid, 1, 1, nil},
		{"a range partly outside", fd, p.Pid, p.start, tooHigh - p.start, nil},
		{"into another partition", other, p.Pid, p.start, size, unix.EBUSY},
	} {
		wantErr(t, "ksm_merge of "+c.what, ksm.Merge(c.fd, c.pid, c.start, c.size), c.want)
	}
	if got := counter(t, a+"/pages_unshared"); got < n {
		t.Errorf("%d candidates, want %d", got, n)
	}
	if err := ksm.Write("control/remove_partition", "%s", a); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "ksm_merge into a partition that is gone", ksm.Merge(fd, p.Pid, p.start, size), unix.ENOENT)
}

func pidfd(t *testing.T, pid int) int {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// open opens a partition for the time of the test, or until it is closed.
func open(t *testing.T, name string, flags int) *os.File {
	t.Helper()
	fd, err := ksm.Open(name, flags|unix.O_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { f.Close() })
	return f
}

// mergeInto merges all that the process holds by ksm_merge.
func (p *process) mergeInto(f *os.File) error {
	return ksm.Merge(int(f.Fd()), p.Pid, p.start, p.end-p.start)
}

// nobody is a user without any right.
var nobody = unix.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}

func TestPermissions(t *testing.T) {
	wantFeature(t, syscalls)
	a := partition(t, "a")
	const n = 16
	passed := open(t, a, 0)
	p, q := startAs(t, nobody, passed), startAs(t, nobody)
	root := holding(t, n, 1)
	for _, user := range []*process{p, q} {
		user.hold(n, n, 1)
		user.optIn(true)
	}

	_, err := p.Ask("open %d %d new", ksm.OpenNumber, unix.O_CREAT)
	wantErr(t, "ksm_open by nobody", err, unix.EPERM)
	_, err = p.Ask("open %d 0 %s", ksm.OpenNumber, a)
	wantErr(t, "ksm_open of a partition by nobody", err, unix.EPERM)
	wantGone(t, "new")
	const passedFD = 3
	size := n * actor.PageSize
	_, err = p.trySyscall(ksm.MergeNumber, passedFD, p.Pid, p.start, size)
	wantErr(t, "ksm_merge of oneself with a passed descriptor", err, nil)
	if got := counter(t, a+"/pages_unshared"); got != n {
		t.Errorf("%d candidates after that, want %d", got, n)
	}
	_, err = p.trySyscall(ksm.MergeNumber, passedFD, q.Pid, q.start, size)
	wantErr(t, "ksm_merge of another process of the same user", err, unix.EPERM)
	if _, err = p.trySyscall(ksm.MergeNumber, passedFD, root.Pid, root.start, size); err == nil {
		t.Error("nobody may ksm_merge a process of root")
	}
	_, err = q.trySyscall(ksm.MergeNumber, passedFD, q.Pid, q.start, size)
	wantErr(t, "ksm_merge of oneself without a descriptor", err, unix.EBADF)
	if got := counter(t, a+"/pages_unshared"); got != n {
		t.Errorf("%d candidates in the end, want %d", got, n)
	}
}

// Files that somebody but root may write would be a way around all borders.
func TestFilesAreOfRoot(t *testing.T) {
	a := partition(t, "a")
	err := filepath.WalkDir(ksm.Root, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		stat := info.Sys().(*syscall.Stat_t)
		if info.Mode().Perm()&0o022 != 0 || stat.Uid != 0 || stat.Gid != 0 {
			t.Errorf("%s: mode %v, of %d:%d", path, info.Mode(), stat.Uid, stat.Gid)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", `for f; do test -w $f && echo $f; done; true`, "sh")
	for _, f := range []string{"control/add_partition", "control/remove_partition", a + "/trigger_merge",
		a + "/trigger_unmerge", a + "/add_process", a + "/remove_process", a + "/pages_to_scan", a + "/sleep_millisecs"} {
		cmd.Args = append(cmd.Args, filepath.Join(ksm.Root, f))
	}
	cmd.SysProcAttr = &nobody
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("nobody may write to: %s %v", out, err)
	}
}

// Root of a container is often the machine's, with fewer capabilities.
func TestCountersAreNotForContainers(t *testing.T) {
	a := partition(t, "a")
	for _, dir := range []string{a, ""} {
		for _, name := range []string{"pages_shared", "pages_sharing", "pages_unshared", "pages_scanned"} {
			file := filepath.Join(ksm.Root, dir, name)
			if out, err := exec.Command("cat", file).CombinedOutput(); err != nil {
				t.Errorf("root cannot read %s: %v, %s", file, err, out)
			}
			out, err := exec.Command("setpriv", "--bounding-set", "-sys_ptrace", "cat", file).CombinedOutput()
			if err == nil || !strings.Contains(string(out), "Operation not permitted") {
				t.Errorf("without CAP_SYS_PTRACE, root can read %s: %v, %s", file, err, out)
			}
		}
	}
}
