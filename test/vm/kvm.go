package vm

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/selective-ksm/selective-ksm/test/vm/internal/guest"
)

// kvmTime is how long a boot may take under KVM. Where KVM works it is well
// under a second.
const kvmTime = 5 * time.Second

// kvmWorks tells whether the kernel boots under KVM. Nested in another
// hypervisor, /dev/kvm may well open and QEMU start, and the guest die at an
// instruction that KVM cannot emulate. So it boots the kernel and sees, and
// keeps the answer in the user's cache until the machine boots again.
func kvmWorks(ctx context.Context, cfg Config) bool {
	dev, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	dev.Close()

	answer, err := kvmAnswerFile(cfg.Kernel)
	if err != nil {
		answer = "" // nothing to keep it in
	}
	if content, err := os.ReadFile(answer); err == nil {
		return string(content) == "yes"
	}
	probe := cfg
	probe.Memory, probe.ReadWrite = "256M", nil
	works, err := boots(ctx, probe, kvm)
	if err != nil {
		return false // not KVM's fault: the next run asks again
	}
	content := "no"
	if works {
		content = "yes"
	}
	// A cache that cannot be written costs the next run a few seconds.
	if os.MkdirAll(filepath.Dir(answer), 0o755) == nil {
		_ = os.WriteFile(answer, []byte(content), 0o644)
	}
	return works
}

// boots tells whether init answers from a guest under accel in time. An error
// says that it could not find out.
func boots(parent context.Context, cfg Config, accel accelerator) (bool, error) {
	ctx, cancel := context.WithTimeout(parent, kvmTime)
	defer cancel()
	m, err := start(ctx, cfg, accel, guest.Task{})
	if err != nil {
		return false, err
	}
	defer m.stop()
	select {
	case _, ok := <-m.messages:
		return ok, nil
	case <-ctx.Done():
		return false, parent.Err()
	}
}

// kvmAnswerFile is the name of the file that holds the answer for a kernel, on
// this machine since it booted.
func kvmAnswerFile(kernel string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	path, err := filepath.EvalSymlinks(kernel)
	if err != nil {
		return "", err
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(fmt.Append(nil, strings.TrimSpace(string(bootID)), path, info.Size(), info.ModTime().UnixNano()))
	return filepath.Join(cache, "selective-ksm", "kvm", fmt.Sprintf("%x", sum[:8])), nil
}
