package optin

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/missing"
)

// The test binary is the wrapper when it is called as one.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == Command {
		status, err := Exec(os.Args[2:])
		os.Stderr.WriteString(err.Error() + "\n")
		os.Exit(status)
	}
	os.Exit(m.Run())
}

func script(t *testing.T, dir, name, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestExec(t *testing.T) {
	dir := t.TempDir()
	echo := script(t, dir, "echo-all", "#!/bin/sh\nprintf '%s|' \"$@\"\nexit 3\n", 0o755)
	plain := script(t, dir, "plain", "text", 0o644)
	broken := script(t, dir, "broken", "\x7fELF nothing", 0o755)
	for name, tc := range map[string]struct {
		args           []string
		env            []string
		stdout, stderr string
		status         int
	}{
		"absolute":         {args: []string{"--", echo, "a b", "", "--", "-c"}, stdout: "a b||--|-c|", status: 3},
		"in PATH":          {args: []string{"--", "echo-all", "x"}, env: []string{"PATH=/nowhere:" + dir}, stdout: "x|", status: 3},
		"relative":         {args: []string{"--", "./echo-all", "x"}, stdout: "x|", status: 3},
		"dot in PATH":      {args: []string{"--", "echo-all", "x"}, env: []string{"PATH=."}, stdout: "x|", status: 3},
		"environment":      {args: []string{"--", "/usr/bin/env"}, env: []string{"B=2", "A=1", "B=3"}, stdout: "B=2\nA=1\n"},
		"no PATH":          {args: []string{"--", "env"}, env: []string{"A=1"}, stdout: "A=1\n"},
		"empty PATH":       {args: []string{"--", "env"}, env: []string{"PATH="}, stderr: "env: executable file not found in $PATH\n", status: 127},
		"argv[0]":          {args: []string{"--", "sh", "-c", "tr '\\0' ' ' </proc/$$/cmdline"}, stdout: "sh -c tr '\\0' ' ' </proc/$$/cmdline "},
		"not found":        {args: []string{"--", "/nowhere/x"}, stderr: "/nowhere/x: no such file or directory\n", status: 127},
		"not in PATH":      {args: []string{"--", "no-such"}, env: []string{"PATH=" + dir}, stderr: "no-such: executable file not found in $PATH\n", status: 127},
		"not executable":   {args: []string{"--", plain}, stderr: plain + ": permission denied\n", status: 126},
		"not a program":    {args: []string{"--", broken}, stderr: broken + ": exec format error\n", status: 126},
		"no command":       {args: []string{"--"}, stderr: "optin: no command: write optin -- COMMAND [ARG]\n", status: 127},
		"without --":       {args: []string{"env"}, stderr: "optin: no command: write optin -- COMMAND [ARG]\n", status: 127},
		"nothing":          {stderr: "optin: no command: write optin -- COMMAND [ARG]\n", status: 127},
		"signal as status": {args: []string{"--", "/bin/sh", "-c", "kill -KILL $$"}, status: -1},
	} {
		t.Run(name, func(t *testing.T) {
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			env := tc.env
			if env == nil {
				env = []string{"PATH=/usr/bin:/bin"}
			}
			files := []*os.File{nil, output(t), output(t)}
			// Not by os/exec, which drops variables that are given twice.
			p, err := os.StartProcess(self, append([]string{self, Command}, tc.args...), &os.ProcAttr{Dir: dir, Env: env, Files: files})
			if err != nil {
				t.Fatal(err)
			}
			state, err := p.Wait()
			if err != nil {
				t.Fatal(err)
			}
			if out, errOut := text(t, files[1]), text(t, files[2]); state.ExitCode() != tc.status || out != tc.stdout || errOut != tc.stderr {
				t.Errorf("status %d, stdout %q, stderr %q; want %d, %q, %q", state.ExitCode(), out, errOut, tc.status, tc.stdout, tc.stderr)
			}
		})
	}
}

// Exit statuses and signals are the program's own, and so is the process.
func TestExecEnds(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := func(script string, args ...string) (*exec.Cmd, string) {
		t.Helper()
		cmd := exec.Command(self, append([]string{Command, "--", "/bin/sh", "-c", script, "sh"}, args...)...)
		out, err := cmd.Output()
		if cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return cmd, strings.TrimSpace(string(out))
	}
	for status := range 256 {
		if cmd, _ := run("exit $1", strconv.Itoa(status)); cmd.ProcessState.ExitCode() != status {
			t.Errorf("exit status is %d, want %d", cmd.ProcessState.ExitCode(), status)
		}
	}
	for _, signal := range []syscall.Signal{
		unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGILL, unix.SIGABRT, unix.SIGBUS, unix.SIGFPE, unix.SIGKILL, unix.SIGUSR1,
		unix.SIGSEGV, unix.SIGUSR2, unix.SIGPIPE, unix.SIGALRM, unix.SIGTERM, unix.SIGXCPU, unix.SIGSYS,
	} {
		cmd, _ := run("ulimit -c 0; kill -$1 $$", strconv.Itoa(int(signal)))
		if ended := cmd.ProcessState.Sys().(syscall.WaitStatus); !ended.Signaled() || ended.Signal() != signal {
			t.Errorf("ended as %v, want %v", cmd.ProcessState, signal)
		}
	}
	if cmd, out := run("echo $$"); out != strconv.Itoa(cmd.ProcessState.Pid()) {
		t.Errorf("the program is process %s, the wrapper was %d", out, cmd.ProcessState.Pid())
	}
}

// output is a file for a process to write to.
func output(t *testing.T) *os.File {
	t.Helper()
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return file
}

func text(t *testing.T, file *os.File) string {
	t.Helper()
	data, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// The program that the wrapper becomes is mergeable.
func TestExecOptsIn(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	smaps, err := exec.Command(self, Command, "--", "cat", "/proc/self/smaps").Output()
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Prctl(unix.PR_GET_MEMORY_MERGE, 0, 0, 0, 0); err != nil {
		missing.Skip(t, "this kernel has no PR_SET_MEMORY_MERGE (it came with 6.4, and CONFIG_KSM): %v", err)
	}
	if !strings.Contains(string(smaps), " mg") {
		t.Error("no mapping of the program is mergeable")
	}
}

func TestWrap(t *testing.T) {
	command := []string{"sleep", "1"}
	wrapped := Wrap("/x", command)
	if want := []string{"/x", "optin", "--", "sleep", "1"}; !reflect.DeepEqual(wrapped, want) {
		t.Errorf("got %q", wrapped)
	}
	for _, tc := range []struct {
		command []string
		want    bool
	}{{wrapped, true}, {command, false}, {nil, false}, {Wrap("/y", command), false}, {Wrap("/x", nil), false}} {
		if Wrapped("/x", tc.command) != tc.want {
			t.Errorf("Wrapped(%q) = %v", tc.command, !tc.want)
		}
	}
}

func TestCheckBinary(t *testing.T) {
	dir := t.TempDir()
	var header bytes.Buffer
	if err := binary.Write(&header, binary.LittleEndian, elf.Header64{
		Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
	}); err != nil {
		t.Fatal(err)
	}
	static := script(t, dir, "static", header.String(), 0o755)
	if err := CheckBinary(static); err != nil {
		t.Error(err)
	}
	want := "wrapper /bin/sh: needs a dynamic loader, which a container may lack: build it with CGO_ENABLED=0"
	if err := CheckBinary("/bin/sh"); err == nil || err.Error() != want {
		t.Errorf("dynamic: %v", err)
	}
	if err := os.Chmod(static, 0o744); err != nil {
		t.Fatal(err)
	}
	want = "wrapper " + static + ": not for all users to read and execute: set its mode to 755"
	if err := CheckBinary(static); err == nil || err.Error() != want {
		t.Errorf("of one user: %v", err)
	}
	if err := CheckBinary(filepath.Join(dir, "gone")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}
