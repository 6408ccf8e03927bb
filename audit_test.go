package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/audit"
	"github.com/selective-ksm/selective-ksm/hooks/inventory"
)

// What crosses a border always counts, and what is outside of all where it is asked for.
func TestVerdict(t *testing.T) {
	one := []audit.Crossing{{}}
	for _, tc := range []struct {
		report  audit.Report
		strict  bool
		crossed bool
	}{
		{audit.Report{}, true, false},
		{audit.Report{Crossings: one}, false, true},
		{audit.Report{Outside: one}, false, false},
		{audit.Report{Outside: one}, true, true},
	} {
		if err := verdict(tc.report, tc.strict); errors.Is(err, errCrossed) != tc.crossed {
			t.Errorf("%+v, strict %v: %v", tc.report, tc.strict, err)
		}
	}
}

// A configuration that cannot be read is no page across a border.
func TestBlind(t *testing.T) {
	if err := runAudit([]string{"-config", filepath.Join(t.TempDir(), "none")}); !errors.Is(err, errBlind) {
		t.Errorf("got %v, want %v", err, errBlind)
	}
}

// What has changed while it was looked at is no proof of anything.
func TestMovedTo(t *testing.T) {
	now := inventory.Inventory{Containers: []inventory.Container{
		{Container: engine.Container{ID: "stays", Partition: "one"}, PID: os.Getpid()},
		{Container: engine.Container{ID: "went", Partition: "two"}},
	}}
	moved := movedTo(now, func(c inventory.Container) string { return c.Partition })
	for _, tc := range []struct {
		side audit.Side
		want bool
	}{
		{audit.Side{ID: "stays", Partition: "one", PID: os.Getpid()}, false},
		{audit.Side{ID: "went", Partition: "one"}, true},
		{audit.Side{ID: "gone", Partition: "one"}, false},
		{audit.Side{PID: os.Getpid()}, true},
		{audit.Side{PID: os.Getppid()}, false},
	} {
		if got := moved(tc.side); got != tc.want {
			t.Errorf("%+v has moved: %v", tc.side, got)
		}
	}
}
