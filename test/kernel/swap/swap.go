// Package swap gives a VM a swap, in compressed memory.
package swap

import (
	"fmt"
	"os/exec"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
)

const device = "/dev/zram0"

// Make makes the swap, and turns it on, the first time that it is called.
var Make = sync.OnceValue(func() error {
	if err := ksm.WriteFile("/sys/block/zram0/disksize", []byte("256M")); err != nil {
		return err
	}
	if out, err := exec.Command("/sbin/mkswap", device).CombinedOutput(); err != nil {
		return fmt.Errorf("mkswap: %w: %s", err, out)
	}
	return On()
})

// On turns the swap on.
func On() error { return toggle("swapon", unix.SYS_SWAPON) }

// Off turns the swap off: all that is in it comes back.
func Off() error { return toggle("swapoff", unix.SYS_SWAPOFF) }

func toggle(name string, number uintptr) error {
	path, err := unix.BytePtrFromString(device)
	if err != nil {
		return err
	}
	for {
		_, _, errno := unix.Syscall(number, uintptr(unsafe.Pointer(path)), 0, 0)
		switch errno {
		case 0:
			return nil
		case unix.EINTR: // by the end of a child, say
		default:
			return fmt.Errorf("%s: %w", name, errno)
		}
	}
}
