package vm

import (
	"bytes"
	"io"
	"regexp"
	"strings"
	"sync"

	"github.com/selective-ksm/selective-ksm/test/vm/internal/guest"
)

// complaints match the lines by which the kernel tells of its own mistakes.
var complaints = regexp.MustCompile(strings.Join([]string{
	// Most checks, from lockdep to KASAN, report as one of these.
	`\bBUG: `, `\bWARNING: `, `\bOops: `, `\bkernel BUG at `, `\bKernel panic\b`,
	// The slab allocator names the cache.
	`\bBUG \S+ \(.*\): `, `\bUBSAN: `,
	`\bkmemleak: \d+ new suspected`,
	`\bINFO: (task .* blocked|trying to register non-static key)`,
	`\brcu: INFO: .* stall`,
}, "|"))

// How many lines are kept: of the console, and from the first complaint on.
const (
	tailLines      = 100
	complaintLines = 100
)

// A console keeps the end of a kernel's log, and what it complained of.
type console struct {
	// stream gets all of the log, unless it is nil.
	stream io.Writer
	// begun is closed at the first byte, ended at [guest.EndOfLog].
	begun, ended         chan struct{}
	closeBegun, closeEnd func()

	mu       sync.Mutex // protects what follows
	line     []byte     // one without its end as yet
	tail     []string
	complain []string
}

func newConsole(stream io.Writer) *console {
	c := &console{stream: stream, begun: make(chan struct{}), ended: make(chan struct{})}
	c.closeBegun = sync.OnceFunc(func() { close(c.begun) })
	c.closeEnd = sync.OnceFunc(func() { close(c.ended) })
	return c
}

// Write implements [io.Writer].
func (c *console) Write(p []byte) (int, error) {
	if c.stream != nil {
		// Who cannot watch the log does not stop the VM.
		_, _ = c.stream.Write(p)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closeBegun()
	c.line = append(c.line, p...)
	for {
		line, rest, whole := bytes.Cut(c.line, []byte{'\n'})
		if !whole {
			return len(p), nil
		}
		c.add(string(bytes.TrimRight(line, "\r")))
		c.line = rest
	}
}

func (c *console) add(line string) {
	if strings.HasSuffix(line, guest.EndOfLog) {
		c.closeEnd()
		return
	}
	if len(c.tail) == tailLines {
		c.tail = c.tail[1:]
	}
	c.tail = append(c.tail, line)
	if len(c.complain) > 0 || complaints.MatchString(line) {
		if len(c.complain) < complaintLines {
			c.complain = append(c.complain, line)
		}
	}
}

// end is the last lines, empty if the stream got them.
func (c *console) end() string {
	if c.stream != nil {
		return ""
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	lines := c.tail
	if len(c.line) > 0 {
		lines = append(lines[:len(lines):len(lines)], string(c.line))
	}
	return strings.Join(lines, "\n")
}

// complaint is the lines from the first complaint on, empty if there is none.
func (c *console) complaint() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.complain, "\n")
}
