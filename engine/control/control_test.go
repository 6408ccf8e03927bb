package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

type fake struct{ merged, unmerged, synced []string }

func (f *fake) Sync(_ context.Context, id string) error {
	switch id {
	case "late":
		return fmt.Errorf("ending: %w", ErrNoEngine)
	case "bad":
		return errors.New("kept out")
	}
	f.synced = append(f.synced, id)
	return nil
}

func (f *fake) Yield() bool { return true }

func (f *fake) Merge(partition string) error {
	if partition == "none" {
		return fmt.Errorf("merging partition none: %w", kernel.ErrNoPartition)
	}
	f.merged = append(f.merged, partition)
	return nil
}

func (f *fake) Unmerge(partition string) error {
	f.unmerged = append(f.unmerged, partition)
	return nil
}

var report = Report{Version: "v1", Interface: "sysfs", Report: engine.Report{
	Partitions: []engine.PartitionStatus{{
		Name: "sksm-1", Reason: "kept out", Counters: &kernel.Counters{Sharing: 1},
		Containers: []engine.ContainerStatus{{Container: engine.Container{ID: "a"}, Running: true, Result: engine.Result{Saved: 4096}}},
	}},
	Outside: []engine.ContainerStatus{{Container: engine.Container{ID: "b"}, Reason: "left out", Cause: engine.CausePolicy}},
	Work:    engine.Work{Errors: map[string]uint64{"EIO": 2}},
}}

func (f *fake) Report() Report { return report }

func TestControl(t *testing.T) {
	dir := t.TempDir()
	if err := Merge(t.Context(), dir, ""); !errors.Is(err, ErrNoEngine) {
		t.Errorf("without an engine: %v", err)
	}
	// One that was killed has left its socket.
	if l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, socket)}); err != nil {
		t.Fatal(err)
	} else {
		l.SetUnlinkOnClose(false)
		l.Close()
	}
	if err := Merge(t.Context(), dir, ""); !errors.Is(err, ErrNoEngine) {
		t.Errorf("after a kill: %v", err)
	}

	s, err := Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(dir, socket)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket is %v, %v", info, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended, e := make(chan error, 1), &fake{}
	go func() { ended <- s.Serve(ctx, e) }()

	for _, partition := range []string{"", "sksm-1"} {
		if err := Merge(ctx, dir, partition); err != nil {
			t.Error(err)
		}
	}
	if !reflect.DeepEqual(e.merged, []string{"", "sksm-1"}) {
		t.Errorf("merged %q", e.merged)
	}
	if err := Merge(ctx, dir, "none"); err == nil || err.Error() != "merging partition none: no such partition" {
		t.Errorf("got %v", err)
	}
	if err := Unmerge(ctx, dir, "sksm-1"); err != nil || !reflect.DeepEqual(e.unmerged, []string{"sksm-1"}) {
		t.Errorf("unmerged %q, %v", e.unmerged, err)
	}
	if got, err := Ask(ctx, dir); err != nil || !reflect.DeepEqual(got, report) {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := ask(ctx, dir, request{Command: "dance"}); err == nil || err.Error() != `unknown command "dance"` {
		t.Errorf("got %v", err)
	}
	if err := Sync(ctx, dir, "a"); err != nil || !reflect.DeepEqual(e.synced, []string{"a"}) {
		t.Errorf("synced %q, %v", e.synced, err)
	}
	if err := Sync(ctx, dir, "bad"); err == nil || err.Error() != "kept out" {
		t.Errorf("got %v", err)
	}
	if err := Sync(ctx, dir, "late"); !errors.Is(err, ErrNoEngine) {
		t.Errorf("of one that is ending: %v", err)
	}
	if yields, err := Yield(ctx, dir); err != nil || !yields {
		t.Errorf("yields %v, %v", yields, err)
	}
	// One that says nothing does not keep the server.
	silent, err := net.Dial("unix", filepath.Join(dir, socket))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// A machine that has no descriptor left for a while is served afterwards.
func TestShortOfDescriptors(t *testing.T) {
	broken := errors.New("broken")
	answers := []error{unix.EMFILE, unix.ENFILE, broken}
	accept := func() (*net.UnixConn, error) {
		err := answers[0]
		answers = answers[1:]
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", err)}
	}
	if err := serve(t.Context(), accept, &fake{}); !errors.Is(err, broken) || len(answers) != 0 {
		t.Errorf("ended with %v, %d answers were not asked for", err, len(answers))
	}
}

// Nobody but root is answered, whatever the mode of the socket.
func TestNotRoot(t *testing.T) {
	if path := os.Getenv(asker); path != "" {
		fmt.Println(Merge(t.Context(), path, ""))
		return
	}
	if os.Getuid() != 0 {
		missing.Skip(t, "not root")
	}
	dir := t.TempDir()
	s, err := Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended, e := make(chan error, 1), &fake{}
	go func() { ended <- s.Serve(ctx, e) }()
	// Its way is open to all.
	program := filepath.Join(dir, "test")
	content, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = os.WriteFile(program, content, 0o755)
	}
	for path := dir; err == nil && path != os.TempDir() && path != "/"; path = filepath.Dir(path) {
		err = os.Chmod(path, 0o755)
	}
	if err == nil {
		err = os.Chmod(filepath.Join(dir, socket), 0o666)
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-test.run", "^TestNotRoot$")
	cmd.Dir, cmd.Env = "/", append(os.Environ(), asker+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), errNotRoot.Error()) {
		t.Errorf("answered %q, %v", out, err)
	}
	if len(e.merged) > 0 {
		t.Error("merged")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// asker is an environment variable that names the directory in which the test's program
// asks.
const asker = "SELECTIVE_KSM_TEST_ASK"

// What programs read of a report has names of one kind.
func TestReportNames(t *testing.T) {
	ours := reflect.TypeFor[Report]().PkgPath()
	ours = ours[:strings.LastIndex(ours, "/")]
	name := regexp.MustCompile(`^[a-z]+(_[a-z]+)*(,omit(empty|zero))?$`)
	var check func(of reflect.Type)
	check = func(of reflect.Type) {
		switch of.Kind() {
		case reflect.Pointer, reflect.Slice:
			check(of.Elem())
			return
		case reflect.Struct:
		default:
			return
		}
		if !strings.HasPrefix(of.PkgPath(), ours) {
			return
		}
		for i := range of.NumField() {
			f := of.Field(i)
			if tag := f.Tag.Get("json"); !f.Anonymous && !name.MatchString(tag) {
				t.Errorf("%s.%s is %q", of, f.Name, tag)
			}
			check(f.Type)
		}
	}
	check(reflect.TypeFor[Report]())
}
