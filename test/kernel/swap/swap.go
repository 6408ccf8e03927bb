// Package swap gives a VM a swap, in compressed memory.
package swap

import (
	"fmt"
	"os/exec"

	"github.com/selective-ksm/selective-ksm/test/kernel/ksm"
)

const device = "/dev/zram0"

// Make makes the swap, once in the life of a VM, and turns it on.
func Make() error {
	if err := ksm.WriteFile("/sys/block/zram0/disksize", []byte("256M")); err != nil {
		return err
	}
	if err := run("mkswap"); err != nil {
		return err
	}
	return On()
}

// On turns the swap on.
func On() error { return run("swapon") }

// Off turns the swap off: all that is in it comes back.
func Off() error { return run("swapoff") }

func run(command string) error {
	if out, err := exec.Command("/sbin/"+command, device).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return nil
}
