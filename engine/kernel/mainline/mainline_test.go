package mainline

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// before is what ksmd is set to by nobody that we know.
var before = map[string]string{
	"run": "0", "pages_to_scan": "250", "sleep_millisecs": "50", "smart_scan": "1", "advisor_mode": "none [scan-time]",
	"full_scans": "7", "pages_scanned": "100", "pages_shared": "1", "pages_sharing": "2", "pages_unshared": "3",
}

// ksmd is a directory with files, and a goroutine that counts in them. It stands for
// settings only: what ksmd does is tested on a kernel.
type ksmd struct {
	t    *testing.T
	dir  string
	stop func()

	mu   sync.Mutex
	seen map[string]string // the settings while it last ran; protected by mu
}

func startKsmd(t *testing.T, files map[string]string) *ksmd {
	t.Helper()
	k := &ksmd{t: t, dir: t.TempDir()}
	for name, text := range files {
		k.set(name, text)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			if k.get("run") == "1" {
				n, _ := strconv.Atoi(k.get("full_scans"))
				// Before the scan is seen to be done, as all may be restored then.
				k.mu.Lock()
				k.seen = k.files()
				k.mu.Unlock()
				k.set("full_scans", strconv.Itoa(n+1))
			}
		}
	})
	k.stop = func() {
		cancel()
		wg.Wait()
	}
	return k
}

func (k *ksmd) get(name string) string {
	data, _ := os.ReadFile(filepath.Join(k.dir, name))
	line, _, _ := strings.Cut(string(data), "\n") // more is of a longer one before
	return line
}

// set changes a file at once, as the kernel does.
func (k *ksmd) set(name, value string) {
	fresh := filepath.Join(k.dir, "."+name)
	err := os.WriteFile(fresh, []byte(value+"\n"), 0o644)
	if err := errors.Join(err, os.Rename(fresh, filepath.Join(k.dir, name))); err != nil {
		k.t.Error(err)
	}
}

// files are the settings, without what ksmd counts.
func (k *ksmd) files() map[string]string {
	found := map[string]string{}
	for name := range before {
		if name != "full_scans" && name != "pages_scanned" {
			found[name] = k.get(name)
		}
	}
	return found
}

func (k *ksmd) open(o Options) *Kernel {
	k.t.Helper()
	opened, err := open(k.dir, k.dir, o)
	if err != nil {
		k.t.Fatal(err)
	}
	return opened
}

// changed is what files must be that begin as from and are changed.
func changed(from map[string]string, change ...string) map[string]string {
	files := maps.Clone(from)
	for i := 0; i < len(change); i += 2 {
		files[change[i]] = change[i+1]
	}
	delete(files, "full_scans")
	delete(files, "pages_scanned")
	return files
}

func TestSettingsAreRestored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := startKsmd(t, before)
		defer d.stop()
		k := d.open(Options{First: true})
		if err := k.AddPartition("p"); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Settle(t.Context(), "p"); err != nil {
			t.Fatal(err)
		}
		ran := changed(before, "run", "1", "pages_to_scan", ours, "sleep_millisecs", "0", "smart_scan", "0", "advisor_mode", "none")
		d.mu.Lock()
		if !maps.Equal(d.seen, ran) {
			t.Errorf("ran with %v, want %v", d.seen, ran)
		}
		d.mu.Unlock()
		after := changed(before, "advisor_mode", "scan-time")
		if got := d.files(); !maps.Equal(got, after) {
			t.Errorf("restored are %v, want %v", got, after)
		}
		if got := d.get("full_scans"); got != "10" {
			t.Errorf("stopped at scan %s, want 10", got)
		}

		// Also when it is ended, and when it fails in between.
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
		defer cancel()
		if _, err := k.Settle(ctx, "p"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("ended: %v", err)
		}
		if got := d.files(); !maps.Equal(got, after) {
			t.Errorf("restored are %v, want %v", got, after)
		}
		d.set("full_scans", "many")
		want := `merging partition p: reading ` + d.dir + `/full_scans: strconv.ParseUint: parsing "many": invalid syntax`
		if _, err := k.Settle(t.Context(), "p"); err == nil || err.Error() != want {
			t.Errorf("failed: %v", err)
		}
		if got := d.files(); !maps.Equal(got, after) {
			t.Errorf("restored are %v, want %v", got, after)
		}
		if err := k.RemovePartition("p"); err != nil || d.get("run") != "0" {
			t.Errorf("removed: %v, run is %s", err, d.get("run"))
		}
	})
}

// What somebody else has run stays as it is, and is waited for.
func TestDrivenBySomebodyElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := changed(before, "run", "1")
		files["full_scans"], files["pages_scanned"] = "7", "100"
		d := startKsmd(t, files)
		defer d.stop()
		k := d.open(Options{Partition: "p"})
		if !k.Driven() {
			t.Error("it is not seen that somebody has ksmd run")
		}
		if err := k.AddPartition("p"); err != nil {
			t.Fatal(err)
		}
		if cpu, err := k.Settle(t.Context(), "p"); err != nil || cpu != 0 {
			t.Errorf("settled: %v, %v", cpu, err)
		}
		if n, _ := strconv.Atoi(d.get("full_scans")); n < 10 {
			t.Errorf("settled after scan %d, want 10 or later", n)
		}
		// This process stands for one that is merged.
		k.proc = "/proc"
		if err := k.Unmerge(t.Context(), "p", os.Getpid()); !errors.Is(err, ErrDriven) {
			t.Errorf("unmerged: %v", err)
		}
		if err := k.RemovePartition("p"); !errors.Is(err, ErrDriven) {
			t.Errorf("removed: %v", err)
		}
		d.set("pages_shared", "0")
		if err := k.RemovePartition("p"); err != nil {
			t.Errorf("removed: %v", err)
		}
		d.set("pages_shared", files["pages_shared"])
		if got := d.files(); !maps.Equal(got, changed(files)) {
			t.Errorf("settings are %v, were %v", got, changed(files))
		}
	})
}

// An engine that was killed has left ksmd running: it is not taken for somebody
// else's, and what it was set to before is set again.
func TestAfterAKill(t *testing.T) {
	running := []string{"run", "1", "pages_to_scan", ours, "sleep_millisecs", "0", "smart_scan", "0", "advisor_mode", "none"}
	byDefault := []string{"pages_to_scan", "100", "sleep_millisecs", "20", "advisor_mode", "none"}
	// What is kept while ksmd runs with these.
	const kept = "advisor_mode scan-time none\npages_to_scan 250 " + ours + "\nsleep_millisecs 50 0\nsmart_scan 1 0\nrun 0 1\n"
	for name, tc := range map[string]struct {
		found    []string // what differs from before
		record   string
		restored []string // what differs then
	}{
		"no record":        {running, "", byDefault},
		"record":           {running, kept, []string{"advisor_mode", "scan-time"}},
		"cut short":        {running, kept[:len(kept)/2], byDefault},
		"two of a setting": {running, kept + "run 1 0\n", byDefault},
		"another file":     {running, kept + "../../../vm/swappiness 1 0\n", byDefault},
		"another value":    {running, strings.Replace(kept, "250", "250;", 1), byDefault},
		"killed before it ran": {
			[]string{"advisor_mode", "none"}, "advisor_mode scan-time none\npages_to_scan 250 " + ours + "\n",
			[]string{"advisor_mode", "scan-time"},
		},
		"killed while it unmerged": {[]string{"run", "2"}, "run 0 2\n", nil},
		"set by somebody since":    {[]string{"sleep_millisecs", "7"}, kept, []string{"sleep_millisecs", "7"}},
		"run by somebody since":    {[]string{"run", "1", "smart_scan", "0"}, kept, []string{"run", "1", "smart_scan", "0"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				files := changed(before, tc.found...)
				files["full_scans"], files["pages_scanned"] = "7", "100"
				d := startKsmd(t, files)
				defer d.stop()
				o := Options{First: true, Dir: t.TempDir()}
				record := filepath.Join(o.Dir, recordName)
				if tc.record != "" {
					if err := os.WriteFile(record, []byte(tc.record), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				k := d.open(o)
				if got := d.files(); !maps.Equal(got, changed(files)) {
					t.Errorf("opening changed the settings to %v", got)
				}
				want := changed(before, tc.restored...)
				driven := k.Driven()
				if driven != (want["run"] == scan) {
					t.Errorf("driven: %v", driven)
				}
				if err := k.Recover(t.Context()); err != nil {
					t.Error(err)
				}
				if got := d.files(); !maps.Equal(got, want) {
					t.Errorf("settings are %v, want %v", got, want)
				}
				if driven {
					return
				}
				// A whole merge later there is no record.
				if err := k.AddPartition("p"); err != nil {
					t.Fatal(err)
				}
				if _, err := k.Settle(t.Context(), "p"); err != nil {
					t.Fatal(err)
				}
				if _, err := os.Stat(record); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("record: %v", err)
				}
			})
		})
	}
}

// What ksmd was set to is kept in a file while it is set to anything else, and where
// that cannot be, it is left as it is.
func TestRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := startKsmd(t, before)
		defer d.stop()
		o := Options{First: true, Dir: t.TempDir()}
		k := d.open(o)
		k.AddPartition("p")
		ctx, cancel := context.WithCancel(t.Context())
		var ended sync.WaitGroup
		ended.Go(func() { k.Settle(ctx, "p") })
		time.Sleep(25 * time.Millisecond) // of the test's own clock: it runs by now
		got, err := os.ReadFile(filepath.Join(o.Dir, recordName))
		want := "advisor_mode scan-time none\npages_to_scan 250 " + ours + "\nsleep_millisecs 50 0\nsmart_scan 1 0\nrun 0 1\n"
		if err != nil || string(got) != want {
			t.Errorf("record is %q, %v; want %q", got, err, want)
		}
		cancel()
		ended.Wait()
		if left, err := os.ReadDir(o.Dir); err != nil || len(left) > 0 {
			t.Errorf("left are %v, %v", left, err)
		}

		if err := os.Remove(o.Dir); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Settle(t.Context(), "p"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("settled: %v", err)
		}
		if got, want := d.files(), changed(before, "advisor_mode", "scan-time"); !maps.Equal(got, want) {
			t.Errorf("settings are %v, want %v", got, want)
		}
	})
}

// Where nothing is mergeable ksmd never comes to the end of a scan.
func TestNothingToMerge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := startKsmd(t, before)
		d.stop()
		k := d.open(Options{First: true})
		if err := k.AddPartition("p"); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if _, err := k.Settle(t.Context(), "p"); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took < patience || took > 2*patience {
			t.Errorf("gave up after %v", took)
		}
	})
}

// What could not be restored is restored before anything else is done.
func TestRestoreIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := startKsmd(t, before)
		defer d.stop()
		k := d.open(Options{First: true})
		k.AddPartition("p")
		ctx, cancel := context.WithCancel(t.Context())
		var ended sync.WaitGroup
		ended.Go(func() { k.Settle(ctx, "p") })
		time.Sleep(25 * time.Millisecond) // of the test's own clock: it runs by now
		if err := os.Rename(d.dir+"/pages_to_scan", d.dir+"/hidden"); err != nil {
			t.Fatal(err)
		}
		cancel()
		ended.Wait()
		if run := d.get("run"); run != "0" {
			t.Errorf("run is %s", run)
		}
		if _, err := k.Settle(t.Context(), "p"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("settled: %v", err)
		}
		if err := os.Rename(d.dir+"/hidden", d.dir+"/pages_to_scan"); err != nil {
			t.Fatal(err)
		}
		if err := k.Recover(t.Context()); err != nil {
			t.Error(err)
		}
		if got, want := d.files(), changed(before, "advisor_mode", "scan-time"); !maps.Equal(got, want) {
			t.Errorf("settings are %v, want %v", got, want)
		}
	})
}

func TestWhoMayMerge(t *testing.T) {
	d := startKsmd(t, before)
	defer d.stop()
	for name, tc := range map[string]struct {
		o         Options
		add, want string // what is said of it, "" if it may
	}{
		"named":   {Options{Partition: "p"}, "p", ""},
		"another": {Options{Partition: "p"}, "q", "adding partition q: partition is kept out: an unpatched kernel has one merge space, which the configuration gives to partition p"},
		"none":    {Options{}, "q", "adding partition q: partition is kept out: an unpatched kernel has one merge space, which the configuration gives to none"},
		"first":   {Options{First: true}, "q", ""},
	} {
		t.Run(name, func(t *testing.T) {
			k := d.open(tc.o)
			err := k.AddPartition(tc.add)
			if tc.want == "" && err != nil || tc.want != "" && (!errors.Is(err, kernel.ErrKeptOut) || err.Error() != tc.want) {
				t.Errorf("got %v", err)
			}
			if tc.want != "" {
				return
			}
			want := "adding partition r: partition is kept out: an unpatched kernel has one merge space, which partition " + tc.add + " has"
			if err := k.AddPartition("r"); err == nil || err.Error() != want {
				t.Errorf("second: %v", err)
			}
		})
	}
}

func TestOpen(t *testing.T) {
	older := maps.Clone(before)
	delete(older, "smart_scan")
	ours := t.TempDir() // of a kernel with Selective KSM, which has no ksmd
	file := filepath.Join(ours, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	old := startKsmd(t, older)
	old.stop()
	for dir, want := range map[string]string{
		ours:    "KSM is not supported by this kernel: no ksmd in " + ours + "/run: boot a kernel built with CONFIG_KSM=y",
		old.dir: "KSM of containers is not supported by this kernel: no sign of Linux 6.7 in " + old.dir + "/smart_scan: boot Linux 6.7 or later, where a program stays mergeable over exec",
	} {
		if _, err := open(dir, dir, Options{}); !errors.Is(err, kernel.ErrNotSupported) || err.Error() != want {
			t.Errorf("error is\n\t%v\nwant\n\t%s", err, want)
		}
	}
	if _, err := open(file, file, Options{}); err == nil || errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("could not tell: %v", err)
	}
}
