package hooks

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/engine/cgroup"
)

// BenchmarkHook tells how long a runtime waits for each hook, next to one that does
// nothing, with the daemon and without. Each run has its own container.
func BenchmarkHook(b *testing.B) {
	for _, engines := range []string{"daemon", "worker"} {
		b.Run(engines, func(b *testing.B) {
			n := newNode(b)
			if engines == "daemon" {
				n.daemon(b)
			}
			bundle := write(b, (&bundles{hooks: n.hooks}).config(b, "/", "", nil))
			took := map[string][]time.Duration{}
			for i := 0; b.Loop(); i++ {
				b.StopTimer()
				id := fmt.Sprint("hooks-bench", i)
				pid, end := waiting(b, id)
				b.StartTimer()
				for _, stage := range []string{"true", "createRuntime", "poststart", "poststop"} {
					cmd := exec.Command(product, "hook", stage, "-config", n.config, "-strict")
					if stage == "true" {
						cmd = exec.Command("/bin/true")
					}
					if stage == "poststop" {
						end()
					}
					cmd.Stdin = strings.NewReader(fmt.Sprintf(`{"ociVersion":"1.0.2","id":%q,"status":"created","pid":%d,"bundle":%q}`, id, pid, bundle))
					begin := time.Now()
					// One merge space is not for all.
					if out, err := cmd.CombinedOutput(); err != nil && !strings.Contains(string(out), "partition is kept out") {
						b.Fatalf("%s: %v: %s", stage, err, out)
					}
					took[stage] = append(took[stage], time.Since(begin))
				}
			}
			for stage, all := range took {
				slices.Sort(all)
				b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, stage+"-ms")
			}
			n.clean(b)
			if engines == "worker" {
				ended(b) // or the next run finds it
			}
		})
	}
}

// waiting starts a process in a pid namespace, and in a cgroup that is named after a
// container. The function ends it.
func waiting(b testing.TB, id string) (pid int, end func()) {
	b.Helper()
	var dirs []string
	for _, h := range []string{"", "memory", "pids"} {
		root := filepath.Join(cgroup.DefaultRoot, h)
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err == nil {
			dirs = append(dirs, filepath.Join(root, id))
		}
	}
	cmd := exec.Command("/bin/sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	for _, dir := range dirs {
		err := os.Mkdir(dir, 0o755)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Appendln(nil, cmd.Process.Pid), 0)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	return cmd.Process.Pid, func() {
		// It has been killed.
		_, _ = cmd.Process.Kill(), cmd.Wait()
		for _, dir := range dirs {
			if err := os.Remove(dir); err != nil {
				b.Fatal(err)
			}
		}
	}
}
