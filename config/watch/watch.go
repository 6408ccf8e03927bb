// Package watch tells when the configuration may have changed, and has it taken anew.
package watch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/sirupsen/logrus"
)

// quiet is how long a file must have been left alone: an editor writes it in more
// than one go.
const quiet = 250 * time.Millisecond

// File sends to changed whenever a file has other content than before, or is not there
// any more, until ctx ends. An empty file is taken for one that is being written. It
// returns an error if the file cannot be watched.
//
// It watches the file's directory: editors put a new file in the place of the old one,
// and Kubernetes has the files of a ConfigMap behind a symbolic link in that directory,
// which it replaces. What a symbolic link leads to elsewhere is not watched.
func File(ctx context.Context, path string, changed chan<- struct{}) (err error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if err := w.Add(filepath.Dir(path)); err != nil {
		return fmt.Errorf("watch %s: %w", path, err)
	}
	// What cannot be read is like nothing: whoever loads it will say why.
	before, _ := os.ReadFile(path)
	settled := time.NewTimer(quiet)
	defer settled.Stop()
	for {
		select {
		case <-w.Events:
			settled.Reset(quiet)
		case <-w.Errors:
			// Such as that there were too many events: there was one.
			settled.Reset(quiet)
		case <-settled.C:
			now, err := os.ReadFile(path)
			if bytes.Equal(before, now) || err == nil && len(now) == 0 {
				continue
			}
			before = now
			select {
			case changed <- struct{}{}:
			case <-ctx.Done():
				return nil
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// Reload takes the configuration anew, each time that it may have changed, until ctx
// ends, and logs what came of it. An error of the function must have changed nothing.
func Reload(ctx context.Context, changed <-chan struct{}, log logrus.FieldLogger, reload func() error) {
	for {
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
		if err := reload(); err != nil {
			log.WithError(err).Error("configuration is not reloaded, and stays as it was")
		} else {
			log.Info("configuration is reloaded")
		}
	}
}

// Signal sends to changed for each signal, or for several that came while nobody took
// it, until ctx ends.
func Signal(ctx context.Context, s os.Signal, changed chan<- struct{}) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, s)
	defer signal.Stop(signals)
	for {
		select {
		case <-signals:
		case <-ctx.Done():
			return
		}
		select {
		case changed <- struct{}{}:
		case <-ctx.Done():
			return
		}
	}
}
