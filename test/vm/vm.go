// Package vm runs a command in a virtual machine with a kernel of our own, on
// the files of the host.
//
// The guest's root is the host's root directory, shared through 9p, under an
// overlay whose upper layer is a tmpfs: the command sees every file of the host
// in its place and may write anywhere, and what it wrote is gone with the VM.
// Only directories named in [Config.ReadWrite] keep their changes. The command
// runs as root, with all cgroup v2 controllers, on a system that container
// runtimes work on.
//
// The design follows lmb/vimto; no library that is maintained does this without
// KVM, on a kernel and with a root of one's choice.
package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/selective-ksm/selective-ksm/test/vm/internal/guest"
)

// GuestTempDir is a directory on a tmpfs of the guest. Unlike the guest's /tmp
// it may hold the upper directory of an overlay. Run makes it the command's
// TMPDIR unless [Config.Env] has another.
const GuestTempDir = guest.TempDir

// Config describes the VM and how the command runs in it.
type Config struct {
	// Kernel is the bzImage to boot.
	Kernel string
	// Init is the program of cmd/vm, built with CGO_ENABLED=0: it is the
	// guest's init.
	Init string
	// Memory is the guest's memory as QEMU takes it, "2G" if empty.
	Memory string
	// CPUs is the number of the guest's CPUs, 2 if zero.
	CPUs int
	// KernelArgs go at the end of the kernel's command line.
	KernelArgs string
	// Dir is the command's working directory, that of this process if empty.
	Dir string
	// Env is the command's environment, as "key=value". PATH and HOME are those
	// of this process unless they are in it.
	Env []string
	// ReadWrite are directories of the host whose changes last.
	ReadWrite []string
	// Timeout is how long the command may run, ten minutes if zero.
	Timeout time.Duration
	// Stdout and Stderr get the command's output, which is dropped if they are
	// nil. A writer that stops reading stops the VM.
	Stdout, Stderr io.Writer
	// Console gets the kernel's log as it comes, if it is not nil.
	Console io.Writer
}

// An ExitError tells that the command ran, and ended with a status other than 0.
type ExitError struct {
	// Code is the exit status, 128+n if signal n killed the command.
	Code int
}

func (e *ExitError) Error() string { return "exit status " + strconv.Itoa(e.Code) }

// A KernelError tells that the kernel complained while the command ran,
// whatever became of the command.
type KernelError struct {
	// Log is what the kernel said, from its first complaint on.
	Log string
}

func (e *KernelError) Error() string {
	return "the guest's kernel complained:\n" + e.Log
}

// A GuestError tells that the VM did not get to the end of the command.
type GuestError struct {
	// Stage is how far the VM got.
	Stage Stage
	// Err is what happened then.
	Err error
	// Console is the end of the kernel's log. It is empty if [Config.Console]
	// got the log.
	Console string
	// Processes is a list of the guest's processes with their kernel stacks. It
	// is empty if the guest did not answer.
	Processes string
}

func (e *GuestError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "while %s: %v", e.Stage, e.Err)
	if e.Console != "" {
		fmt.Fprintf(&b, "\nend of the guest's console:\n%s", e.Console)
	}
	if e.Processes != "" {
		fmt.Fprintf(&b, "\nprocesses of the guest:\n%s", e.Processes)
	}
	return b.String()
}

// Unwrap returns Err.
func (e *GuestError) Unwrap() error { return e.Err }

// Run boots a VM, runs the command argv in it and returns when both have ended.
// The VM is killed when ctx ends, and when this process does.
//
// The error is an [*ExitError] if the command ended with a status other than 0,
// a [*KernelError] if the kernel complained, and a [*GuestError] if the VM
// stopped before the command ended.
func Run(ctx context.Context, cfg Config, argv ...string) error {
	if len(argv) == 0 {
		return errors.New("no command")
	}
	if err := cfg.complete(); err != nil {
		return err
	}
	task := guest.Task{Argv: argv, Dir: cfg.Dir, Env: cfg.Env}
	for i, dir := range cfg.ReadWrite {
		task.ReadWrite = append(task.ReadWrite, guest.Share{Tag: "rw" + strconv.Itoa(i), Path: dir})
	}
	accel := tcg
	if kvmWorks(ctx, cfg) {
		accel = kvm
	}
	m, err := start(ctx, cfg, accel, task)
	if err != nil {
		return fmt.Errorf("start the VM: %w", err)
	}
	defer m.stop()
	code, err := m.wait(ctx)
	if err != nil {
		return err
	}
	// Only now the console is complete.
	m.stop()
	if log := m.console.complaint(); log != "" {
		return &KernelError{Log: log}
	}
	if code != 0 {
		return &ExitError{Code: code}
	}
	return nil
}

// complete fills in what is not set, and checks what is.
func (cfg *Config) complete() error {
	if cfg.Memory == "" {
		cfg.Memory = "2G"
	}
	if cfg.CPUs == 0 {
		cfg.CPUs = 2
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 10 * time.Minute
	}
	if cfg.Stdout == nil {
		cfg.Stdout = io.Discard
	}
	if cfg.Stderr == nil {
		cfg.Stderr = io.Discard
	}
	if cfg.Kernel == "" {
		return errors.New("no kernel given; make kernel builds one")
	}
	if _, err := os.Stat(cfg.Kernel); err != nil {
		return fmt.Errorf("no kernel; make kernel builds it: %w", err)
	}
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return err
	}
	cfg.Dir = dir
	cfg.Env = append([]string{
		"PATH=" + os.Getenv("PATH"),
		"HOME=" + os.Getenv("HOME"),
		"TMPDIR=" + GuestTempDir,
	}, cfg.Env...)
	shares := make([]string, len(cfg.ReadWrite))
	for i, dir := range cfg.ReadWrite {
		dir, err := filepath.Abs(dir)
		if err != nil {
			return err
		}
		if info, err := os.Stat(dir); err != nil {
			return fmt.Errorf("read-write directory: %w", err)
		} else if !info.IsDir() {
			return fmt.Errorf("read-write directory: %s is none", dir)
		}
		shares[i] = dir
	}
	cfg.ReadWrite = shares
	return nil
}
