// Command vm runs a command in a virtual machine, on the files of the host; see
// package vm. As pid 1 it is the init of that machine.
//
//	vm [flags] [--] COMMAND ARG...
//
// It ends as the command did: with its exit status, or 128+n if signal n killed
// it. The status is 125 if the VM failed or its kernel complained, and 2 if the
// flags are wrong. So it does for go test:
//
//	go test -exec "build/bin/vm -kernel build/kernel/selective-ksm/bzImage --" ./engine
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/selective-ksm/selective-ksm/test/vm"
	"github.com/selective-ksm/selective-ksm/test/vm/internal/guest"
)

// failed is the exit status when it is not the command's.
const failed = 125

func main() {
	if os.Getpid() == 1 {
		guest.Init()
	}
	os.Exit(run())
}

func run() int {
	cfg := vm.Config{Stdout: os.Stdout, Stderr: os.Stderr}
	flag.StringVar(&cfg.Kernel, "kernel", "build/kernel/selective-ksm/bzImage", "boot `FILE`")
	flag.StringVar(&cfg.Memory, "memory", "2G", "`SIZE` of the guest's memory")
	flag.IntVar(&cfg.CPUs, "cpus", 2, "`number` of the guest's CPUs")
	flag.DurationVar(&cfg.Timeout, "timeout", 0, "how long the command may run (default 10m)")
	flag.StringVar(&cfg.KernelArgs, "append", "", "`arguments` to add to the kernel's command line")
	flag.Func("env", "`KEY=VALUE` for the command's environment; may be repeated", func(s string) error {
		cfg.Env = append(cfg.Env, s)
		return nil
	})
	flag.Func("rw", "keep what the command changes in `DIR`; may be repeated", func(s string) error {
		cfg.ReadWrite = append(cfg.ReadWrite, s)
		return nil
	})
	verbose := flag.Bool("v", false, "show the kernel's log on standard error")
	flag.Parse()
	if flag.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "vm: no command")
		return 2
	}
	if *verbose {
		cfg.Console = os.Stderr
	}
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintf(os.Stderr, "vm: %v\n", err)
		return failed
	}
	cfg.Init = self

	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	err = vm.Run(ctx, cfg, flag.Args()...)
	var exit *vm.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.Code
	default:
		fmt.Fprintf(os.Stderr, "vm: %v\n", err)
		return failed
	}
}
