// Package plugin runs the plugin by itself against a containerd's NRI socket,
// and follows its log.
package plugin

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Index and Name are what the plugin registers as.
const (
	Index = "10"
	Name  = "selective-ksm"
)

// Line is a line of the plugin's log.
type Line struct {
	Time      time.Time `json:"time"`
	Level     string    `json:"level"`
	Message   string    `json:"msg"`
	Error     string    `json:"error"`
	Pod       string    `json:"pod"`
	Container string    `json:"container"`
	// ContainerID is the whole id.
	ContainerID string `json:"container_id"`
	Partition   string `json:"partition"`

	Offered    int64   `json:"offered_bytes"`
	Merged     int64   `json:"merged_bytes"`
	Saved      int64   `json:"saved_bytes"`
	DurationMS float64 `json:"duration_ms"`
	Processes  int     `json:"processes"`

	// Event is what the plugin answered to, within DurationMS.
	Event string `json:"event"`

	// Text is the line as it was written.
	Text string `json:"-"`
}

// Took is how long a merge took.
func (l Line) Took() time.Duration { return time.Duration(l.DurationMS * float64(time.Millisecond)) }

// Process is a plugin that runs.
type Process struct {
	cmd  *exec.Cmd
	read chan struct{} // closed when the log has ended
	over bool          // stopped or killed

	mu    sync.Mutex // protects what follows
	lines []Line
	more  chan struct{} // closed, and made anew, when there are more lines
	ended bool
}

// Ready is what the plugin logs when the runtime has told it of all containers,
// and will tell it of new ones.
const Ready = "synchronized with the runtime"

// Start starts the plugin program with a configuration file, which must ask for
// a log in JSON, and waits until the runtime knows the plugin.
func Start(ctx context.Context, program, config, socket string) (*Process, error) {
	return StartArgs(ctx, program, Args(config, socket)...)
}

// StartArgs starts the program with any arguments. Of a log that is not in JSON
// only the text of each line is known.
func StartArgs(ctx context.Context, program string, args ...string) (*Process, error) {
	p, err := Launch(program, args...)
	if err != nil {
		return nil, err
	}
	if err := p.Synchronized(ctx, 1); err != nil {
		return nil, errors.Join(fmt.Errorf("start plugin: %w\n%s", err, p.Log()), p.Stop())
	}
	return p, nil
}

// Launch starts the program with any arguments, and waits for nothing.
func Launch(program string, args ...string) (*Process, error) {
	cmd := exec.Command(program, args...)
	log, err := cmd.StderrPipe()
	if err != nil {
		return nil, fmt.Errorf("start plugin: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start plugin: %w", err)
	}
	p := &Process{cmd: cmd, read: make(chan struct{}), more: make(chan struct{})}
	go p.follow(log)
	return p, nil
}

// Args are the program's to run as a plugin with a configuration file.
func Args(config, socket string) []string {
	return []string{"plugin", "-config", config, "-name", Name, "-idx", Index, "-socket", socket}
}

// Synchronized waits until a runtime has told the plugin of all containers n times.
func (p *Process) Synchronized(ctx context.Context, n int) error {
	_, err := p.Wait(ctx, n, synchronized)
	return err
}

// Synchronizations is how often that was so far.
func (p *Process) Synchronizations() int { return len(p.Lines(synchronized)) }

func synchronized(l Line) bool { return strings.Contains(l.Text, Ready) }

// follow reads the log until the plugin has exited.
func (p *Process) follow(log io.Reader) {
	defer close(p.read)
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		l := Line{Text: lines.Text()}
		// What is not JSON, such as a panic, is kept as text.
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			l = Line{Text: lines.Text()}
		}
		p.add(func() { p.lines = append(p.lines, l) })
	}
	p.add(func() { p.ended = true })
}

func (p *Process) add(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
	close(p.more)
	p.more = make(chan struct{})
}

// Lines returns the lines so far that match.
func (p *Process) Lines(match func(Line) bool) []Line {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(p.lines), func(l Line) bool { return !match(l) })
}

// Wait waits until the log has n lines that match, and returns the last of
// these.
func (p *Process) Wait(ctx context.Context, n int, match func(Line) bool) (Line, error) {
	for {
		p.mu.Lock()
		more, ended := p.more, p.ended
		p.mu.Unlock()
		if found := p.Lines(match); len(found) >= n {
			return found[n-1], nil
		}
		if ended {
			return Line{}, errors.New("the plugin exited")
		}
		select {
		case <-more:
		case <-ctx.Done():
			return Line{}, fmt.Errorf("wait for the plugin's log: %w", context.Cause(ctx))
		}
	}
}

// Merged waits for a merge of these containers, which are of one partition and
// all that it has, that began after since. It returns a line for each.
func (p *Process) Merged(ctx context.Context, since time.Time, containerIDs ...string) ([]Line, error) {
	for n := 1; ; n++ {
		_, err := p.Wait(ctx, n, func(l Line) bool {
			return l.Message == "merged" && slices.Contains(containerIDs, l.ContainerID)
		})
		if err != nil {
			return nil, err
		}
		if lines := p.merge(since, containerIDs); lines != nil {
			return lines, nil
		}
	}
}

// merge looks for a merge among the lines so far. One merge logs its containers
// when it is done with all of them, each with the time that it took.
func (p *Process) merge(since time.Time, containerIDs []string) []Line {
	one := make(map[string]Line)
	for _, l := range p.Lines(func(l Line) bool { return l.Message == "merged" && slices.Contains(containerIDs, l.ContainerID) }) {
		if _, again := one[l.ContainerID]; again {
			clear(one) // the next merge
		}
		if one[l.ContainerID] = l; len(one) < len(containerIDs) {
			continue
		}
		// Rounded down to milliseconds: what began in that of since does not count.
		began := l.Time
		var lines []Line
		for _, id := range containerIDs {
			began = began.Add(-one[id].Took())
			lines = append(lines, one[id])
		}
		if began.After(since) {
			return lines
		}
	}
	return nil
}

// PID is its process's.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Reload asks the plugin to read its configuration anew.
func (p *Process) Reload() error {
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		return fmt.Errorf("reload plugin: %w", err)
	}
	return nil
}

// Log returns the end of the log.
func (p *Process) Log() string {
	const most = 30
	lines := p.Lines(func(Line) bool { return true })
	var b strings.Builder
	b.WriteString("the plugin's log:\n")
	for _, l := range lines[max(0, len(lines)-most):] {
		b.WriteString(l.Text + "\n")
	}
	return b.String()
}

// Kill kills the plugin as the kernel would, and waits until it is gone.
func (p *Process) Kill() error {
	p.over = true
	if err := p.cmd.Process.Kill(); err != nil {
		return fmt.Errorf("kill plugin: %w", err)
	}
	<-p.read
	var exit *exec.ExitError
	if err := p.cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		return fmt.Errorf("killed plugin exited: %v", err)
	}
	return nil
}

// stopGrace is far more than the plugin takes to end, in a slow VM on a busy machine.
const stopGrace = time.Minute

// Stop asks the plugin to end, if it was not stopped or killed before. That it
// does so without complaint is part of what a caller wants to know.
func (p *Process) Stop() error {
	if p.over {
		return nil
	}
	p.over = true
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop plugin: %w", err)
	}
	select {
	case <-p.read:
	case <-time.After(stopGrace):
		return errors.Join(errors.New("the plugin did not stop when asked to, and was killed"), p.Kill())
	}
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("stop plugin: %w", err)
	}
	return nil
}
