package vm

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/vm/internal/guest"
)

const qemu = "qemu-system-x86_64"

// An accelerator is how QEMU runs the guest's code.
type accelerator []string

var (
	tcg = accelerator{"-accel", "tcg,thread=multi", "-cpu", "max"}
	kvm = accelerator{"-accel", "kvm", "-cpu", "host"}
)

// The files that QEMU inherits, by number.
const (
	consoleFD = 3 + iota
	controlFD
	initramfsFD
)

// A machine is a VM that runs.
type machine struct {
	cfg     Config
	console *console
	// messages are those of the guest's init. It is closed when QEMU ended.
	messages chan guest.Message
	requests *gob.Encoder
	process  *os.Process
	stderr   bytes.Buffer // QEMU's own; to be read after done

	quit     chan struct{} // closed by stop: nobody reads messages any more
	stopOnce sync.Once
	wg       sync.WaitGroup // what stop waits for
}

// start starts QEMU. The caller has to call stop.
func start(ctx context.Context, cfg Config, accel accelerator, task guest.Task) (_ *machine, err error) {
	if _, err := exec.LookPath(qemu); err != nil {
		return nil, fmt.Errorf("%w; apt-get install qemu-system-x86 brings it", err)
	}
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	initramfs, err := memoryFile("initramfs")
	if err != nil {
		return nil, err
	}
	defer initramfs.Close()
	if err := writeInitramfs(initramfs, cfg.Init, task); err != nil {
		return nil, fmt.Errorf("make the initramfs: %w", err)
	}
	consoleHost, consoleGuest, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer consoleGuest.Close()
	controlHost, controlGuest, err := socketPair()
	if err != nil {
		consoleHost.Close()
		return nil, err
	}
	defer controlGuest.Close()

	m := &machine{
		cfg:      cfg,
		console:  newConsole(cfg.Console),
		messages: make(chan guest.Message),
		requests: gob.NewEncoder(controlHost),
		quit:     make(chan struct{}),
	}
	cmd := exec.Command(qemu, qemuArgs(cfg, accel, task)...)
	cmd.ExtraFiles = []*os.File{consoleGuest, controlGuest, initramfs}
	cmd.Stderr = &m.stderr
	// The signals of a terminal are for this process, which ends QEMU.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}

	started := make(chan error)
	ended := make(chan struct{})
	m.wg.Go(func() {
		defer close(ended)
		// The death signal comes when the thread that forked ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		// How QEMU ends says nothing: a guest's panic is a success to it.
		_ = cmd.Wait()
	})
	if err := <-started; err != nil {
		consoleHost.Close()
		controlHost.Close()
		return nil, err
	}
	m.process = cmd.Process
	m.wg.Go(func() {
		defer consoleHost.Close()
		// It ends with QEMU, which has the other end.
		_, _ = io.Copy(m.console, consoleHost)
	})
	m.wg.Go(func() {
		defer controlHost.Close()
		m.receive(gob.NewDecoder(controlHost))
		// Whoever sees the end of the messages may look at QEMU's errors.
		<-ended
		close(m.messages)
	})
	return m, nil
}

// receive passes the guest's messages on until there are no more.
func (m *machine) receive(dec *gob.Decoder) {
	for {
		var msg guest.Message
		if dec.Decode(&msg) != nil {
			return
		}
		select {
		case m.messages <- msg:
		case <-m.quit:
			return
		}
	}
}

// stop kills QEMU, if it still runs, and waits until it has ended and all of
// the console is read.
func (m *machine) stop() {
	m.stopOnce.Do(func() {
		close(m.quit)
		// It fails only if QEMU has ended.
		_ = m.process.Kill()
	})
	m.wg.Wait()
}

// wait follows the guest to the end of the command, whose status it returns.
func (m *machine) wait(ctx context.Context) (int, error) {
	stage := StartingQEMU
	timer := time.NewTimer(stage.bound(m.cfg))
	defer timer.Stop()
	enter := func(s Stage) {
		stage = s
		timer.Reset(s.bound(m.cfg))
	}
	begun := m.console.begun
	var code int
	var ended chan struct{} // nil until the command's status is known
	for {
		select {
		case <-begun:
			begun = nil
			if stage == StartingQEMU {
				enter(Booting)
			}
		case msg, ok := <-m.messages:
			if !ok {
				return 0, m.ended(stage)
			}
			switch msg.Kind {
			case guest.Hello:
				enter(SettingUp)
			case guest.Starting:
				enter(Running)
			case guest.Stdout:
				if _, err := m.cfg.Stdout.Write(msg.Data); err != nil {
					return 0, fmt.Errorf("write the command's output: %w", err)
				}
			case guest.Stderr:
				if _, err := m.cfg.Stderr.Write(msg.Data); err != nil {
					return 0, fmt.Errorf("write the command's errors: %w", err)
				}
			case guest.Ended:
				enter(Finishing)
			case guest.Exited:
				code, ended = msg.Code, m.console.ended
			case guest.Failed:
				return 0, &GuestError{Stage: stage, Err: errors.New(msg.Error)}
			}
		case <-ended:
			return code, nil
		case <-timer.C:
			return 0, m.hangs(stage, fmt.Errorf("not done within %s", stage.bound(m.cfg)))
		case <-ctx.Done():
			err := context.Cause(ctx)
			if errors.Is(err, context.DeadlineExceeded) {
				return 0, m.hangs(stage, err)
			}
			return 0, &GuestError{Stage: stage, Err: err}
		}
	}
}

// ended is the error after QEMU ended by itself.
func (m *machine) ended(stage Stage) error {
	m.stop()
	err := errors.New("the guest died")
	if text := strings.TrimSpace(m.stderr.String()); text != "" {
		err = fmt.Errorf("%w: %s", err, text)
	}
	return &GuestError{Stage: stage, Err: err, Console: m.console.end()}
}

// reportTime is how long a guest that hangs may take to say in what. A guest
// whose kernel hangs says nothing.
const reportTime = 5 * time.Second

// hangs is the error after a stage that took too long.
func (m *machine) hangs(stage Stage, cause error) error {
	e := &GuestError{Stage: stage, Err: cause}
	if stage >= SettingUp {
		e.Processes = m.report()
	}
	e.Console = m.console.end()
	return e
}

// report asks the guest for its processes.
func (m *machine) report() string {
	// A request is far smaller than the socket's buffer, this cannot block.
	if m.requests.Encode(guest.Request{}) != nil {
		return ""
	}
	timeout := time.After(reportTime)
	for {
		select {
		case msg, ok := <-m.messages:
			if !ok {
				return ""
			}
			if msg.Kind == guest.Report {
				return string(msg.Data)
			}
		case <-timeout:
			return ""
		}
	}
}

// kernelArgs are for every kernel. A panic ends the VM, and so does what would
// kill one process only. An emulated timer may be late without being broken: a
// kernel that checks it panics on a busy machine.
const kernelArgs = "console=ttyS0 panic=-1 oops=panic no_timer_check tsc=reliable "

// qemuArgs are the arguments for QEMU. The microvm machine boots a second
// faster than pc, but with no clock besides the PIT: on a busy machine an
// emulated CPU fails to calibrate its TSC by that, and the kernel then waits for
// a timer interrupt for ever. On pc it falls back to the HPET.
func qemuArgs(cfg Config, accel accelerator, task guest.Task) []string {
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none",
		// The kernel reboots when it panics, which then ends QEMU.
		"-no-reboot",
		// Without mem-merge=off, a merge by the host's ksmd would take the guest's
		// memory in, and last for all of it.
		"-M", "pc,usb=off,vmport=off,mem-merge=off",
		"-smp", strconv.Itoa(cfg.CPUs), "-m", cfg.Memory,
		"-kernel", cfg.Kernel,
		"-initrd", fmt.Sprintf("/proc/self/fd/%d", initramfsFD),
		"-append", kernelArgs + cfg.KernelArgs,
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d", consoleFD),
		"-serial", "chardev:console",
		"-device", "virtio-serial-pci",
		"-chardev", fmt.Sprintf("socket,id=control,fd=%d", controlFD),
		"-device", "virtserialport,chardev=control,name=" + guest.PortName,
		"-device", "virtio-rng-pci",
	}
	args = append(args, accel...)
	args = append(args, shareArgs(guest.RootTag, "/", ",readonly=on")...)
	for _, s := range task.ReadWrite {
		args = append(args, shareArgs(s.Tag, s.Path, "")...)
	}
	return args
}

// shareArgs share a directory, and the file systems mounted below it, through 9p.
func shareArgs(tag, path, options string) []string {
	// A comma ends a value for QEMU unless it is doubled.
	path = strings.ReplaceAll(path, ",", ",,")
	return []string{
		"-fsdev", fmt.Sprintf("local,id=%s,path=%s,security_model=none,multidevs=remap%s", tag, path, options),
		"-device", fmt.Sprintf("virtio-9p-pci,fsdev=%s,mount_tag=%s", tag, tag),
	}
}

// memoryFile makes a file that has no name and is gone when it is closed.
func memoryFile(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// socketPair makes two sockets connected to each other, the first of them for
// this process.
func socketPair() (*os.File, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), "host"), os.NewFile(uintptr(fds[1]), "guest"), nil
}
