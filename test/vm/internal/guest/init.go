package guest

import (
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Init is the guest's init. It does not return: when it has told the host how
// things went, it waits for the host to end the VM.
func Init() {
	port, err := openPort()
	if err != nil {
		// There is no way to tell the host but the console, and the panic that
		// an ending init causes.
		fmt.Fprintf(os.Stderr, "init: %v\n", err)
		os.Exit(1)
	}
	host := &host{enc: gob.NewEncoder(port)}
	host.send(Message{Kind: Hello})
	// It lives as long as the VM: it must be able to answer when all else hangs.
	go host.answer(gob.NewDecoder(port))

	if code, err := run(host); err != nil {
		host.send(Message{Kind: Failed, Error: err.Error()})
	} else {
		host.send(Message{Kind: Exited, Code: code})
	}
	select {}
}

// host sends messages to the host, for several goroutines at a time.
type host struct {
	mu  sync.Mutex
	enc *gob.Encoder
}

func (h *host) send(m Message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	// Without the port there is nobody to tell about the error.
	_ = h.enc.Encode(m)
}

func (h *host) answer(requests *gob.Decoder) {
	for {
		var r Request
		if requests.Decode(&r) != nil {
			return
		}
		h.send(Message{Kind: Report, Data: processes()})
	}
}

// output is a writer of messages of one kind.
type output struct {
	*host
	kind Kind
}

func (o output) Write(p []byte) (int, error) {
	o.send(Message{Kind: o.kind, Data: p})
	return len(p), nil
}

// openPort mounts what it takes to find the port, and opens it.
func openPort() (*os.File, error) {
	for _, m := range []mount{
		{"sysfs", "/sys", "sysfs", 0, ""},
		{"devtmpfs", "/dev", "devtmpfs", 0, ""},
	} {
		if err := m.mount(""); err != nil {
			return nil, err
		}
	}
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		content, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		if strings.TrimSpace(string(content)) == PortName {
			return os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(name))), os.O_RDWR, 0)
		}
	}
	return nil, fmt.Errorf("no virtio port is named %q", PortName)
}

// run does the task and returns the command's exit status.
func run(host *host) (int, error) {
	content, err := os.ReadFile(TaskFile)
	if err != nil {
		return 0, fmt.Errorf("read task: %w", err)
	}
	var task Task
	if err := json.Unmarshal(content, &task); err != nil {
		return 0, fmt.Errorf("read task: %w", err)
	}
	if len(task.Argv) == 0 {
		return 0, nil
	}
	if err := setUp(task); err != nil {
		return 0, fmt.Errorf("set up the guest: %w", err)
	}
	code, err := runCommand(host, task)
	if err != nil {
		return 0, fmt.Errorf("run the command: %w", err)
	}
	host.send(Message{Kind: Ended})
	for _, share := range task.ReadWrite {
		if err := syncShare(share.Path); err != nil {
			return 0, fmt.Errorf("write %s back to the host: %w", share.Path, err)
		}
	}
	// The highest priority, which no log level keeps from the console. A line
	// without its end would wait there for the next one.
	if err := os.WriteFile("/dev/kmsg", []byte("<0>"+EndOfLog+"\n"), 0); err != nil {
		return 0, fmt.Errorf("end the kernel's log: %w", err)
	}
	return code, nil
}

// outputDelay is for what a command that ended left in its pipes. Daemons it
// started may keep them open for ever.
const outputDelay = time.Second

// runCommand runs the command and returns its exit status. As pid 1 it reaps
// the orphans meanwhile.
func runCommand(host *host, task Task) (int, error) {
	// The command is looked up in the PATH that it is going to have.
	os.Clearenv()
	for _, kv := range task.Env {
		k, v, _ := strings.Cut(kv, "=")
		if err := os.Setenv(k, v); err != nil {
			return 0, err
		}
	}
	if err := os.Chdir(task.Dir); err != nil {
		return 0, err
	}
	cmd := exec.Command(task.Argv[0], task.Argv[1:]...)
	cmd.Dir = task.Dir
	cmd.Stdout = output{host, Stdout}
	cmd.Stderr = output{host, Stderr}
	cmd.WaitDelay = outputDelay
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// Said before it is so: the command may well stop the kernel.
	host.send(Message{Kind: Starting})
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	if err := reapUntil(cmd.Process.Pid); err != nil {
		return 0, err
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		return 0, err
	}
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	return status.ExitStatus(), nil
}

// reapUntil reaps the processes that ended until the process pid did, which it
// leaves for its owner to wait for.
func reapUntil(pid int) error {
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("wait for any process: %w", err)
		}
		ended := childPid(&info)
		if ended == pid {
			return nil
		}
		if _, err := unix.Wait4(ended, nil, 0, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("reap process %d: %w", ended, err)
		}
	}
}

// childPid is the pid that waitid stored. It is the first field of siginfo_t's
// union, which x/sys keeps to itself; the union is aligned as a pointer is.
func childPid(info *unix.Siginfo) int {
	const preamble = 3 * unsafe.Sizeof(int32(0))
	const align = unsafe.Sizeof(uintptr(0))
	return int(*(*int32)(unsafe.Add(unsafe.Pointer(info), (preamble+align-1)/align*align)))
}

func syncShare(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.Syncfs(int(dir.Fd()))
}
