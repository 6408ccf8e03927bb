package inventory

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/hooks"
)

// describe tells of a container what its runtime has written down of it in the
// annotations of its bundle, where the process that watches over it leads to that. What
// cannot be told stays as it is.
func (c *Container) describe(pids []int) {
	for _, pid := range pids {
		c.HostPID = c.HostPID || seesMachine(pid)
	}
	bundle := bundleOf(c.ID, pids)
	if bundle == "" {
		return
	}
	d, err := hooks.Describe(c.ID, bundle)
	if err != nil {
		return
	}
	c.Pause, c.Annotations = d.Pause, d.Annotations
	if c.Pause {
		c.Name = "pause"
	}
	if d.Name != "" {
		c.Name = d.Name
	}
	if d.Namespace != "" || d.Pause {
		c.Pod, c.Namespace, c.SandboxID = d.Pod, d.Namespace, d.SandboxID
		c.Sandbox = config.Sandbox{ID: d.SandboxID, Namespace: d.Namespace}
	}
}

// bundleOf finds the bundle of a container by the parent of its first process, which is
// not in the container: containerd's shim, which runs in one of the bundles of its pod,
// or conmon, which is told the bundle by -b.
func bundleOf(id string, pids []int) string {
	for _, pid := range pids {
		parent := parentOf(pid)
		if parent <= 1 || slices.Contains(pids, parent) {
			continue
		}
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", parent))
		if err != nil {
			continue
		}
		args := strings.Split(string(bytes.TrimRight(line, "\x00")), "\x00")
		switch program := filepath.Base(args[0]); {
		case strings.HasPrefix(program, "containerd-shim"):
			if dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", parent)); err == nil {
				return filepath.Join(filepath.Dir(dir), id)
			}
		case program == monitor:
			for i, arg := range args[:len(args)-1] {
				if arg == "-b" || arg == "--bundle" {
					return args[i+1]
				}
			}
		}
	}
	return ""
}

// parentOf is the number of a process's parent, or zero.
func parentOf(pid int) int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "PPid:"); ok {
			parent, _ := strconv.Atoi(strings.TrimSpace(value))
			return parent
		}
	}
	return 0
}

// seesMachine reports whether a process sees the machine's processes. So does this one,
// which names processes by their numbers.
func seesMachine(pid int) bool {
	machine, err1 := os.Readlink("/proc/self/ns/pid")
	own, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
	return err1 == nil && err2 == nil && machine == own
}
