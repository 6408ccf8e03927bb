// Package optin is the program that opts a container's memory in to merging: put
// before the container's own command, it makes the process mergeable and becomes
// that command.
package optin

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Command is the name of the subcommand whose arguments are given to [Exec].
const Command = "optin"

// defaultPath is where a command is sought when the container has no PATH.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Exit statuses of a command that could not be run, as shells have them.
const (
	ExitNotExecutable = 126
	ExitNotFound      = 127
)

// Wrap puts the opt-in before the command of a container, in which the binary is
// at the path self.
func Wrap(self string, command []string) []string {
	return append([]string{self, Command, "--"}, command...)
}

// Wrapped reports whether a command is one that [Wrap] returned.
func Wrapped(self string, command []string) bool {
	return len(command) > 3 && slices.Equal(command[:3], Wrap(self, nil))
}

// Exec makes the calling process mergeable, which its program keeps over exec
// since kernel 6.7, and replaces it by the command in args, of the form
// -- COMMAND ARG... Argument vector and environment are passed on as they are; of a
// variable that is given twice stays the first, the one that getenv(3) sees. It
// returns only if the command cannot be run: the exit status for it and why.
func Exec(args []string) (int, error) {
	if len(args) < 2 || args[0] != "--" {
		return ExitNotFound, fmt.Errorf("%s: no command: write %s -- COMMAND [ARG]", Command, Command)
	}
	command := args[1:]
	// Whether this works shows in the process's mappings, where the engine looks.
	// Here it must not keep the program from running: the kernel may lack it, or a
	// seccomp profile forbid it.
	_ = unix.Prctl(unix.PR_SET_MEMORY_MERGE, 1, 0, 0, 0)

	env := os.Environ()
	path, err := find(command[0])
	if err == nil {
		err = unix.Exec(path, command, env)
	}
	status := ExitNotExecutable
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, exec.ErrNotFound) {
		status = ExitNotFound
	}
	return status, fmt.Errorf("%s: %w", command[0], err)
}

// find looks a command up in PATH, as runc does for the command of a container.
func find(command string) (string, error) {
	if strings.Contains(command, "/") {
		return command, nil
	}
	if _, ok := os.LookupEnv("PATH"); !ok {
		if err := os.Setenv("PATH", defaultPath); err != nil {
			return "", err
		}
	}
	path, err := exec.LookPath(command)
	if errors.Is(err, exec.ErrDot) {
		// PATH names the current directory: that is the container's own choice.
		err = nil
	}
	if e := (*exec.Error)(nil); errors.As(err, &e) {
		err = e.Err
	}
	return path, err
}

// CheckBinary checks that the file at path can run in any container: that it is an
// ELF executable, for all users, and without need of a dynamic loader, which a
// container may not have. It returns what is wrong with it.
func CheckBinary(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("wrapper: %w", err)
	}
	if info.Mode().Perm()&0o005 != 0o005 {
		return fmt.Errorf("wrapper %s: not for all users to read and execute: set its mode to 755", path)
	}
	file, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("wrapper %s: %w", path, err)
	}
	defer file.Close()
	for _, p := range file.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("wrapper %s: needs a dynamic loader, which a container may lack: build it with CGO_ENABLED=0", path)
		}
	}
	return nil
}
