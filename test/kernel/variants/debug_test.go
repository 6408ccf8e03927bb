package variants_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/test/vm"
)

// A debug kernel is worth what its checks are: a mistake of each kind, which the
// kernel's LKDTM makes on demand, has to fail the VM.
func TestDebugKernelReports(t *testing.T) {
	for mistake, want := range map[string]string{
		"READ_AFTER_FREE": "BUG: KASAN: slab-use-after-free",
		// Found when it returns to user space with the lock, or sleeps before.
		"SPINLOCKUP": "(lock_me_up)",
	} {
		t.Run(mistake, func(t *testing.T) {
			err := vm.Run(t.Context(), variant(t, "debug"), "sh", "-ec", `
				mount -t debugfs debugfs /sys/kernel/debug
				echo `+mistake+` >/sys/kernel/debug/provoke-crash/DIRECT`)
			var kernel *vm.KernelError
			if !errors.As(err, &kernel) || !strings.Contains(kernel.Log, want) {
				t.Errorf("%v, want the kernel to say %q", err, want)
			}
		})
	}
}

// Without a mistake it reports nothing, and has what a stress needs.
func TestDebugKernel(t *testing.T) {
	cfg := variant(t, "debug")
	cfg.KernelArgs = "numa=fake=2"
	var output bytes.Buffer
	cfg.Stdout, cfg.Stderr = &output, &output
	begin := time.Now()
	err := vm.Run(t.Context(), cfg, "sh", "-exc", `
		mount -t debugfs debugfs /sys/kernel/debug
		echo scan >/sys/kernel/debug/kmemleak
		sleep 6
		echo scan >/sys/kernel/debug/kmemleak
		test -z "$(cat /sys/kernel/debug/kmemleak)"
		test -d /sys/kernel/debug/failslab -a -d /sys/kernel/debug/fail_page_alloc
		test -f /sys/kernel/debug/hwpoison/corrupt-pfn
		test -d /sys/devices/system/node/node1
		ls /sys/devices/system/memory/memory*/online >/dev/null
		echo 256M >/sys/block/zram0/disksize
		mkswap /dev/zram0
		swapon /dev/zram0
		test -d /sys/kernel/mm/ksm/control
	`)
	if err != nil {
		t.Fatalf("%v\n%s", err, output.String())
	}
	t.Logf("from start to end: %v", time.Since(begin).Round(time.Second))
}
