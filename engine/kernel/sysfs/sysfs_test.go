package sysfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// tree makes files under a base directory. It stands for parsing and errors
// only: what the kernel does is tested on a kernel.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

const features = "range_merge unmerge_range partition_counters add_process syscalls=467,468\n"

func TestOpen(t *testing.T) {
	empty := tree(t, nil)
	ours := tree(t, map[string]string{"control/add_partition": "", "control/features": features})
	literal := tree(t, map[string]string{"control/add_partition": ""})
	lesser := tree(t, map[string]string{"control/add_partition": "", "control/features": "range_merge\n"})
	notDir := tree(t, map[string]string{"control": ""})
	unreadable := tree(t, map[string]string{"control/add_partition": "", "control/features/x": ""})

	for name, tc := range map[string]struct {
		roots       []string
		want        string
		features    kernel.Features
		err         string
		unsupported bool
	}{
		"first":  {roots: []string{ours, empty}, want: ours, features: kernel.Features{Bind: true}},
		"second": {roots: []string{empty, ours}, want: ours, features: kernel.Features{Bind: true}},
		"none": {
			roots: []string{empty, literal + "/ksm"}, unsupported: true,
			err: "selective KSM is not supported by this kernel: no interface in " + empty + "/control/add_partition or " +
				literal + "/ksm/control/add_partition: boot a kernel built with CONFIG_SELECTIVE_KSM=y",
		},
		"literal RFC": {
			roots: []string{literal}, want: literal,
			features: kernel.Features{PageByPage: true, SharedCounters: true, WideRemoval: true},
		},
		"features missing": {roots: []string{lesser}, want: lesser, features: kernel.Features{SharedCounters: true}},
		"could not tell": {
			roots: []string{notDir},
			err:   "looking for selective KSM: stat " + notDir + "/control/add_partition: not a directory",
		},
		"could not tell the features": {
			roots: []string{unreadable},
			err:   "looking for features of selective KSM: read " + unreadable + "/control/features: is a directory",
		},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := open(tc.roots)
			if tc.err == "" {
				if err != nil || f.Root() != tc.want || f.Features() != tc.features {
					t.Fatalf("opened %+v, %v; want %s with %+v", f, err, tc.want, tc.features)
				}
				return
			}
			if err == nil || err.Error() != tc.err {
				t.Fatalf("error is\n\t%v\nwant\n\t%s", err, tc.err)
			}
			if errors.Is(err, kernel.ErrNotSupported) != tc.unsupported {
				t.Errorf("matches ErrNotSupported: %v", !tc.unsupported)
			}
		})
	}
}

func TestSyscalls(t *testing.T) {
	for words, want := range map[string][2]uintptr{
		"range_merge syscalls=467,468": {467, 468},
		"range_merge":                  {},
		"syscalls=":                    {},
		"syscalls=467":                 {},
		"syscalls=-1,468":              {},
	} {
		f := &FS{words: strings.Fields(words)}
		o, m, ok := f.Syscalls()
		if ok != (want[0] != 0) || ok && (o != want[0] || m != want[1]) {
			t.Errorf("%q: got %d, %d, %v", words, o, m, ok)
		}
	}
}

func TestPartitions(t *testing.T) {
	f := &FS{root: tree(t, map[string]string{
		"control/add_partition": "", "run": "0", "a/trigger_merge": "", "b/trigger_merge": "", "ksm/other": "",
	})}
	names, err := f.Partitions()
	if err != nil || !slices.Equal(names, []string{"a", "b"}) {
		t.Errorf("got %v, %v", names, err)
	}
}

func TestCounters(t *testing.T) {
	f := &FS{root: tree(t, map[string]string{
		"p/pages_shared": "1\n", "p/pages_sharing": "2\n", "p/pages_unshared": "3\n", "p/pages_scanned": "4\n",
		"bad/pages_shared": "many\n", "bad/pages_sharing": "2\n", "bad/pages_unshared": "3\n", "bad/pages_scanned": "4\n",
	})}
	if c, err := f.Counters("p"); err != nil || c != (kernel.Counters{Shared: 1, Sharing: 2, Unshared: 3, Scanned: 4}) {
		t.Errorf("got %+v, %v", c, err)
	}
	if _, err := f.Counters("gone"); !errors.Is(err, kernel.ErrNoPartition) {
		t.Errorf("no partition: %v", err)
	}
	want := `reading pages_shared of partition bad: strconv.ParseUint: parsing "many": invalid syntax`
	if _, err := f.Counters("bad"); err == nil || err.Error() != want {
		t.Errorf("not a number: %v", err)
	}
}

func TestCommands(t *testing.T) {
	f := &FS{root: tree(t, map[string]string{
		"control/add_partition": "", "control/remove_partition": "", "p/trigger_merge": "", "p/trigger_unmerge": "",
		"p/add_process": "", "p/remove_process": "",
	}), words: strings.Fields(features)}
	for _, tc := range []struct {
		do         func() error
		file, want string
	}{
		{func() error { return f.AddPartition("sksm") }, "control/add_partition", "sksm\n"},
		{func() error { return f.RemovePartition("sksm") }, "control/remove_partition", "sksm\n"},
		{func() error { return f.Bind("p", 42) }, "p/add_process", "42\n"},
		{func() error { return f.Unbind("p", 42) }, "p/remove_process", "42\n"},
		{func() error { return f.Unmerge(t.Context(), "p", 42) }, "p/trigger_unmerge", "42\n"},
		{func() error {
			return f.Merge(t.Context(), "p", 42, kernel.Range{Start: 0x7f0000001000, End: 0x7f0000002000})
		},
			"p/trigger_merge", "42 7f0000001000 7f0000002000\n"},
	} {
		if err := tc.do(); err != nil {
			t.Errorf("%s: %v", tc.file, err)
			continue
		}
		if got, _ := os.ReadFile(filepath.Join(f.root, tc.file)); string(got) != tc.want {
			t.Errorf("%s: wrote %q, want %q", tc.file, got, tc.want)
		}
	}
}

// A pipe in the place of trigger_merge keeps the writes apart.
func TestMergePageByPage(t *testing.T) {
	f := &FS{root: tree(t, map[string]string{"p/pages_shared": ""}), literal: true}
	pipe := filepath.Join(f.root, "p/trigger_merge")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	// Opened for reading and writing, so that no open waits and no write fails.
	reader, err := os.OpenFile(pipe, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()

	const start = 0x10000000
	if err := f.Merge(t.Context(), "p", 7, kernel.Range{Start: start, End: start + 0x2000}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	n, err := reader.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	if want := "7 10000000 10001000\n7 10001000 10002000\n"; string(buf[:n]) != want {
		t.Errorf("wrote\n%swant\n%s", buf[:n], want)
	}
}

// The RFC makes a second partition of the same name.
func TestAddTwiceOnLiteralRFC(t *testing.T) {
	f := &FS{root: tree(t, map[string]string{"control/add_partition": "", "p/trigger_merge": ""}), literal: true}
	if err := f.AddPartition("p"); !errors.Is(err, kernel.ErrPartitionExists) {
		t.Errorf("got %v", err)
	}
	if got, _ := os.ReadFile(filepath.Join(f.root, "control/add_partition")); len(got) != 0 {
		t.Errorf("wrote %q", got)
	}
}

func TestErrors(t *testing.T) {
	f := &FS{root: tree(t, map[string]string{"control/features": ""})}
	if err := f.Merge(t.Context(), "gone", 1, kernel.Range{End: 1}); !errors.Is(err, kernel.ErrNoPartition) {
		t.Errorf("merge without partition: %v", err)
	}
	if err := f.Unmerge(t.Context(), "gone", 1); !errors.Is(err, kernel.ErrNoPartition) {
		t.Errorf("unmerge without partition: %v", err)
	}
	// A command never makes a file.
	if err := f.AddPartition("p"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("add without its file: %v", err)
	}
	// Neither is a partition that lacks a file one that is gone.
	f = &FS{root: tree(t, map[string]string{"p/trigger_merge": ""}), words: []string{addProcess}}
	_, counters := f.Counters("p")
	for what, err := range map[string]error{
		"unmerge": f.Unmerge(t.Context(), "p", 1), "bind": f.Bind("p", 1), "unbind": f.Unbind("p", 1),
		"counters": counters, "remove": f.RemovePartition("p"),
	} {
		if !errors.Is(err, os.ErrNotExist) || errors.Is(err, kernel.ErrNoPartition) {
			t.Errorf("%s without its file: %v", what, err)
		}
	}
}

func TestNames(t *testing.T) {
	f := &FS{root: tree(t, map[string]string{"control/add_partition": "", "control/remove_partition": ""})}
	for _, name := range []string{"", ".", "..", "control", "a/b", "../a", "a b", "a\n", "a\x00", ".a", strings.Repeat("a", 32)} {
		for what, err := range map[string]error{
			"add": f.AddPartition(name), "remove": f.RemovePartition(name),
			"merge":   f.Merge(t.Context(), name, 1, kernel.Range{End: 1}),
			"unmerge": f.Unmerge(t.Context(), name, 1),
		} {
			if want := fmt.Sprintf("partition name %q: not 1 to 31 bytes without space and slash", name); err == nil || err.Error() != want {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
}
