package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// logged is the part of a configuration that has each merge be a line of the log.
const logged = `logFormat: json
logLevel: debug
`

// unbounded is the part of one that has merging take what it takes.
const unbounded = `budget: 100%
partitionBudget: 100%
`

// agent is the plugin that runs.
type agent struct {
	cmd  *exec.Cmd
	read chan struct{} // closed when the log has ended

	mu    sync.Mutex    // protects what follows
	lines int           // of merges
	text  string        // the last line that is none
	more  chan struct{} // closed, and made anew, when there is more
}

// startAgent starts the plugin with a configuration, beside the runtime's half in a
// directory. At its end it leaves nothing merged.
func startAgent(program, dir, config string) (*agent, error) {
	path := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		return nil, err
	}
	p := &agent{
		cmd:  exec.Command(program, "plugin", "-config", path, "-socket", filepath.Join(dir, "nri.sock"), "-remove-on-exit"),
		read: make(chan struct{}), more: make(chan struct{}),
	}
	log, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go p.follow(log)
	return p, nil
}

func (p *agent) follow(log io.Reader) {
	defer close(p.read)
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		var line struct {
			Message string `json:"msg"`
		}
		err := json.Unmarshal(lines.Bytes(), &line)
		p.mu.Lock()
		if err == nil && (line.Message == "merged" || line.Message == "unchanged") {
			p.lines++
		} else {
			p.text = lines.Text()
		}
		close(p.more)
		p.more = make(chan struct{})
		p.mu.Unlock()
	}
}

// waitMerged waits until the log has so many merges of containers.
func (p *agent) waitMerged(ctx context.Context, want int) error {
	for {
		p.mu.Lock()
		more := p.more
		p.mu.Unlock()
		if p.merged() >= want {
			return nil
		}
		select {
		case <-more:
		case <-p.read:
			return errors.New("the plugin ended: " + p.last())
		case <-ctx.Done():
			return fmt.Errorf("%d merges of %d: %w\n%s", p.merged(), want, ctx.Err(), p.last())
		}
	}
}

func (p *agent) merged() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lines
}

func (p *agent) last() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text
}

// cpu is the CPU time that it has taken, for what the kernel did when asked, too.
func (p *agent) cpu() time.Duration { return clock(clockOf(p.cmd.Process.Pid)) }

// resident is its memory that is present, in bytes.
func (p *agent) resident() (int, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(data))
	if len(f) < 2 {
		return 0, fmt.Errorf("statm of another form: %q", data)
	}
	pages, err := strconv.Atoi(f[1])
	return pages * os.Getpagesize(), err
}

func (p *agent) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	<-p.read
	return p.cmd.Wait()
}
