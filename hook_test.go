package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/selective-ksm/selective-ksm/config"
)

func TestWithoutPanic(t *testing.T) {
	if err := withoutPanic(func() error { panic("at something") }); err == nil || err.Error() != "panic: at something" {
		t.Errorf("got %v", err)
	}
	if err := withoutPanic(func() error { return nil }); err != nil {
		t.Error(err)
	}
}

// A hook that hangs ends before the runtime ends it.
func TestInstallDeadline(t *testing.T) {
	dir := t.TempDir()
	for deadline, refused := range map[string]bool{"0s": true, "59s": false, "1m": true} {
		if err := runInstall([]string{"-dir", dir, "-deadline", deadline}); errors.Is(err, errUsage) != refused || err != nil && !refused {
			t.Errorf("%s: %v", deadline, err)
		}
	}
}

// What a worker says is in the file that is named for it, or else in the system's log: also
// that the file cannot be had.
func TestWorkerLog(t *testing.T) {
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		file   string
		failed bool
	}{"none": {}, "a file": {file: filepath.Join(dir, "log")}, "not to be had": {file: filepath.Join(dir, "none", "log"), failed: true}} {
		t.Run(name, func(t *testing.T) {
			var system bytes.Buffer
			c := config.Default()
			c.LogFile = tc.file
			log := logrus.New()
			if err := workerLog(log, &system, c); (err != nil) != tc.failed {
				t.Error(err)
			}
			log.Error("said")
			written, _ := os.ReadFile(tc.file)
			inFile := tc.file != "" && !tc.failed
			if strings.Contains(string(written), "said") != inFile || strings.Contains(system.String(), "said") == inFile {
				t.Errorf("the file has %q, the system's log %q", written, system.String())
			}
		})
	}
}
