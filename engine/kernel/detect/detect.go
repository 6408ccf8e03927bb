// Package detect finds out by which interface the running kernel merges memory by
// partition.
package detect

import (
	"errors"
	"fmt"
	"strings"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/kernel/mainline"
	"github.com/selective-ksm/selective-ksm/engine/kernel/syscall"
	"github.com/selective-ksm/selective-ksm/engine/kernel/sysfs"
)

// Interface is a way to ask a kernel.
type Interface string

const (
	// Auto is sysfs where the kernel has Selective KSM, and otherwise mainline if
	// that may merge any partition.
	Auto Interface = "auto"
	// Sysfs is that of package sysfs.
	Sysfs Interface = "sysfs"
	// Syscall is that of package syscall.
	Syscall Interface = "syscall"
	// Mainline is that of package mainline.
	Mainline Interface = "mainline"
)

// Options say what to look for.
type Options struct {
	// Interface is the one to use.
	Interface Interface
	// Syscalls are the numbers of the system calls, where they are not those that the
	// kernel names.
	Syscalls *syscall.Numbers
	// Mainline are the options of package mainline.
	Mainline mainline.Options
}

// Finding is what came of looking for an interface.
type Finding struct {
	Interface Interface
	// Err is nil where the interface is there, matches [kernel.ErrNotSupported] where
	// it is not, and is another where that could not be told.
	Err error
	// Detail says what an interface that is there can do.
	Detail string
}

// String is one line for people.
func (f Finding) String() string {
	switch {
	case f.Err == nil:
		return fmt.Sprintf("%s: there: %s", f.Interface, f.Detail)
	case errors.Is(f.Err, kernel.ErrNotSupported):
		return fmt.Sprintf("%s: not there: %v", f.Interface, f.Err)
	default:
		return fmt.Sprintf("%s: could not tell: %v", f.Interface, f.Err)
	}
}

// Probe looks for every interface. It changes nothing.
func Probe(o Options) []Finding {
	var found []Finding
	for _, name := range []Interface{Sysfs, Syscall, Mainline} {
		o.Interface = name
		k, detail, err := open(o)
		if k != nil {
			err = errors.Join(err, k.Close())
		}
		found = append(found, Finding{Interface: name, Err: err, Detail: detail})
	}
	return found
}

// Open opens the interface that is asked for, and says in one line what it is and
// what of it is used. The error matches [kernel.ErrNotSupported] where the kernel does
// not have it, and is another where that could not be told.
func Open(o Options) (k kernel.Kernel, detail string, err error) {
	if o.Interface != Auto {
		return open(o)
	}
	o.Interface = Sysfs
	k, detail, err = open(o)
	if !errors.Is(err, kernel.ErrNotSupported) {
		return k, detail, err
	}
	if o.Mainline.Partition == "" && !o.Mainline.First {
		return nil, "", fmt.Errorf("%w, or name the one partition that an unpatched kernel may merge with mainlinePartition", err)
	}
	o.Interface = Mainline
	return open(o)
}

func open(o Options) (kernel.Kernel, string, error) {
	if o.Interface == Mainline {
		k, err := mainline.Open(o.Mainline)
		if err != nil {
			return nil, "", err
		}
		detail := "ksmd, with one merge space for the machine: one partition at a time is merged"
		if k.Driven() {
			detail += "; somebody else has ksmd run, and its settings are left alone"
		}
		return k, detail, nil
	}
	fs, err := sysfs.Open()
	if err != nil {
		return nil, "", err
	}
	if o.Interface == Sysfs {
		return fs, describe(fs), nil
	}
	k, err := syscall.Open(fs, o.Syscalls)
	if err != nil {
		return nil, "", err
	}
	return k, describe(fs), nil
}

// describe says what a kernel with Selective KSM can do, or what we do without.
func describe(fs *sysfs.FS) string {
	if words := fs.Words(); len(words) > 0 {
		return fs.Root() + " with " + strings.Join(words, " ")
	}
	return fs.Root() + " as in the RFC and no more: merging goes page by page, savings are not known by partition, " +
		"nothing ties a process to its partition, and a partition is removed only when no other is in use"
}
