package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

type fake struct{ merged []string }

func (f *fake) Merge(partition string) error {
	if partition == "none" {
		return fmt.Errorf("merging partition none: %w", kernel.ErrNoPartition)
	}
	f.merged = append(f.merged, partition)
	return nil
}

var status = []engine.PartitionStatus{{
	Name: "sksm-1", Reason: "kept out",
	Containers: []engine.ContainerStatus{{Container: engine.Container{ID: "a"}, Running: true, Result: engine.Result{Saved: 4096}}},
}}

func (f *fake) Status() []engine.PartitionStatus { return status }

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
	if got, err := Status(ctx, dir); err != nil || !reflect.DeepEqual(got, status) {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := ask(ctx, dir, request{Command: "dance"}); err == nil || err.Error() != `unknown command "dance"` {
		t.Errorf("got %v", err)
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
