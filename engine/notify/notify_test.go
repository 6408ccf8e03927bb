package notify

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// manager is a service manager that reads what it is told.
func manager(t *testing.T) *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return conn
}

// told returns what the manager is told next.
func told(t *testing.T, conn *net.UnixConn, within time.Duration) (string, error) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(within)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	n, err := conn.Read(buf)
	return string(buf[:n]), err
}

const soon = 30 * time.Second

func TestNotify(t *testing.T) {
	conn := manager(t)
	for want, tell := range map[string]func() error{"READY=1": Ready, "STOPPING=1": Stopping} {
		if err := tell(); err != nil {
			t.Error(err)
		}
		if got, err := told(t, conn, soon); got != want || err != nil {
			t.Errorf("told %q, %v, want %q", got, err, want)
		}
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "gone"))
	if err := Ready(); err == nil || !strings.HasPrefix(err.Error(), "telling the service manager: ") {
		t.Errorf("nobody reads: %v", err)
	}
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Ready(); err != nil {
		t.Errorf("nobody asked: %v", err)
	}
}

// The manager hears of the process as long as that is alive, and no longer.
func TestWatchdog(t *testing.T) {
	conn := manager(t)
	const limit = 200 * time.Millisecond
	t.Setenv("WATCHDOG_USEC", "200000")
	ctx, cancel := context.WithCancel(t.Context())
	stuck, logged, ended := make(chan struct{}), make(chan error, 10), make(chan struct{})
	go func() {
		defer close(ended)
		Watchdog(ctx, func(ctx context.Context) error {
			select {
			case <-stuck:
				<-ctx.Done()
				return ctx.Err()
			default:
				return nil
			}
		}, func(err error) { logged <- err })
	}()
	for range 3 {
		if got, err := told(t, conn, soon); got != "WATCHDOG=1" || err != nil {
			t.Fatalf("told %q, %v", got, err)
		}
	}
	close(stuck)
	if err := <-logged; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("logged %v", err)
	}
	// Those that it was told before are read, and then there are none.
	for {
		if _, err := told(t, conn, 3*limit); err != nil {
			break
		}
	}
	cancel()
	<-ended
	if len(logged) > 0 {
		t.Errorf("logged again: %v", <-logged)
	}
}

// Nobody waits for a process that nobody has asked.
func TestNoWatchdog(t *testing.T) {
	t.Setenv("WATCHDOG_USEC", "")
	Watchdog(t.Context(), func(context.Context) error { return errors.New("asked") }, func(err error) { t.Error(err) })
	t.Setenv("WATCHDOG_USEC", "x")
	failed := false
	Watchdog(t.Context(), nil, func(err error) { failed = true })
	if !failed {
		t.Error("a number that is none was not logged")
	}
}
