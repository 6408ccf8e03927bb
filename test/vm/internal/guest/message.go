// Package guest is the inside of the test VM: the program that the kernel
// starts as its init, and the messages it exchanges with the host.
package guest

// PortName is the name of the virtio-serial port that carries the messages: a
// gob stream of [Message] to the host, and a gob stream of [Request] from it.
const PortName = "control"

// RootTag is the mount tag of the 9p share with the host's root directory.
const RootTag = "root"

// TaskFile is where the initramfs holds the [Task], as JSON.
const TaskFile = "/task.json"

// EndOfLog is a line of the kernel's log, the last that the host has to read.
// Without it the VM might end before a complaint of the kernel is printed.
const EndOfLog = "vm: end of log"

// A Task is what init has to do.
type Task struct {
	// Argv is the command. Without one, init says hello and does no more.
	Argv []string
	// Dir is the command's working directory.
	Dir string
	// Env is the command's environment.
	Env []string
	// ReadWrite are the directories whose changes reach the host.
	ReadWrite []Share
}

// A Share is a directory of the host under a 9p mount tag of its own.
type Share struct {
	Tag  string
	Path string
}

// A Message goes from init to the host. They come one after the other on one
// port, so that all of a command's output is there when its end is told.
type Message struct {
	// Kind says which of the other fields mean something.
	Kind Kind
	// Data is output of the command, or a report.
	Data []byte
	// Code is the command's exit status, 128+n if signal n killed it.
	Code int
	// Error is what init could not do.
	Error string
}

// Kind is the kind of a [Message].
type Kind int

// The kinds of message, in the order in which they come.
const (
	// Hello: init runs.
	Hello Kind = iota + 1
	// Starting: the guest is set up and the command starts.
	Starting
	// Stdout: Data is from the command's standard output.
	Stdout
	// Stderr: Data is from the command's standard error.
	Stderr
	// Ended: the command ended, and all of its output was sent.
	Ended
	// Exited: the last message after a command that ran; Code is set.
	Exited
	// Failed: the last message when init could not go on; Error is set.
	Failed
	// Report answers a request with the list of processes in Data.
	Report
)

// A Request asks init for a [Report].
type Request struct{}
