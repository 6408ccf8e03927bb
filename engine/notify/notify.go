// Package notify tells a service manager what becomes of this process, as sd_notify(3)
// says. Where none has asked to be told, nothing is done.
package notify

import (
	"context"
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// Ready says that the process does its work from now on.
func Ready() error { return tell(daemon.SdNotifyReady) }

// Stopping says that it is about to end.
func Stopping() error { return tell(daemon.SdNotifyStopping) }

func tell(state string) error {
	if _, err := daemon.SdNotify(false, state); err != nil {
		return fmt.Errorf("telling the service manager: %w", err)
	}
	return nil
}

// Watchdog says again and again that the process is alive, for as long as it is, and
// returns when ctx ends. Alive is given half of the time that the service manager waits
// (WatchdogSec=) to return nil. Only the first of a row of failures is logged by log.
func Watchdog(ctx context.Context, alive func(context.Context) error, log func(error)) {
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log(fmt.Errorf("telling the service manager: %w", err))
	}
	if err != nil || limit == 0 {
		return
	}
	tick := time.NewTicker(limit / 4)
	defer tick.Stop()
	for failed := false; ; {
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, limit/2)
			defer cancel()
			if err := alive(ctx); err != nil {
				return fmt.Errorf("the process has got stuck, and the service manager will end it: %w", err)
			}
			return tell(daemon.SdNotifyWatchdog)
		}()
		if err != nil && ctx.Err() == nil && !failed {
			log(err)
		}
		failed = err != nil
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
