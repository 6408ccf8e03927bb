package guest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// processes lists every process with its state, and what the kernel is doing
// for it if that may be why the guest hangs. It reads only /proc, and leaves
// out what ends meanwhile.
func processes() []byte {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var pids []int
	for _, dir := range dirs {
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)

	var out bytes.Buffer
	fmt.Fprintf(&out, "%5s S %-16s %s\n", "PID", "NAME", "COMMAND")
	for _, pid := range pids {
		dir := filepath.Join("/proc", strconv.Itoa(pid))
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue
		}
		// The name is in parentheses and may hold any character.
		open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
		if open < 0 || end < open || end+2 >= len(stat) {
			continue
		}
		name, state := string(stat[open+1:end]), stat[end+2]
		cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		kernelThread := len(cmdline) == 0 && state != 'Z'
		if kernelThread && (state == 'I' || state == 'S') && name != "ksmd" {
			continue // idle
		}
		command := strings.TrimSpace(string(bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
		fmt.Fprintf(&out, "%5d %c %-16s %s\n", pid, state, name, command)
		if pid == os.Getpid() {
			continue
		}
		stacks, _ := filepath.Glob(filepath.Join(dir, "task", "*", "stack"))
		for _, path := range stacks {
			stack, err := os.ReadFile(path)
			if err != nil {
				continue
			}
			for line := range strings.Lines(string(stack)) {
				out.WriteString("        " + line)
			}
			if len(stacks) > 1 {
				out.WriteString("        --\n")
			}
		}
	}
	return out.Bytes()
}
