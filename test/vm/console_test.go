package vm

import (
	"fmt"
	"strings"
	"testing"
)

func TestConsoleComplaints(t *testing.T) {
	for line, want := range map[string]bool{
		"[    1.0] BUG: KASAN: slab-use-after-free in ksm_scan":               true,
		"[    1.0] BUG: unable to handle page fault for address: ffff":        true,
		"[    1.0] BUG ksm_rmap_item (Not tainted): Poison overwritten":       true,
		"[    1.0] kernel BUG at mm/ksm.c:1234!":                              true,
		"[    1.0] WARNING: CPU: 0 PID: 61 at mm/ksm.c:1 ksm_do_scan+0x1":     true,
		"[    1.0] WARNING: possible recursive locking detected":              true,
		"[    1.0] WARNING: suspicious RCU usage":                             true,
		"[    1.0] Oops: general protection fault, probably for non-canon":    true,
		"[    1.0] INFO: task ksmd:33 blocked for more than 122 seconds.":     true,
		"[    1.0] rcu: INFO: rcu_preempt self-detected stall on CPU":         true,
		"[    1.0] rcu: INFO: rcu_sched detected stalls on CPUs/tasks:":       true,
		"[    1.0] kmemleak: 2 new suspected memory leaks":                    true,
		"[    1.0] kmemleak: Kernel memory leak detector initialized":         false,
		"[    1.0] traps: sh[61] general protection fault ip:400 sp:7f":       false,
		"[    1.0] Memory cgroup out of memory: Killed process 61 (workload)": false,
		"[    1.0] Run /init as init process":                                 false,
	} {
		c := newConsole(nil)
		fmt.Fprintf(c, "before\r\n%s\r\nafter\r\n", line)
		if got := c.complaint(); (got != "") != want {
			t.Errorf("%s: complaint is %q, want one: %t", line, got, want)
		} else if want && got != line+"\nafter" {
			t.Errorf("complaint is %q, want the line and what follows", got)
		}
	}
}

func TestConsoleEnd(t *testing.T) {
	c := newConsole(nil)
	for i := range 3 * tailLines {
		fmt.Fprintf(c, "line %d\n", i)
	}
	fmt.Fprint(c, "no end")
	lines := strings.Split(c.end(), "\n")
	if want := tailLines + 1; len(lines) != want {
		t.Fatalf("%d lines are kept, want %d", len(lines), want)
	}
	if got, want := lines[0], fmt.Sprintf("line %d", 2*tailLines); got != want {
		t.Errorf("first line is %q, want %q", got, want)
	}
	if got := lines[tailLines]; got != "no end" {
		t.Errorf("last line is %q", got)
	}
}
