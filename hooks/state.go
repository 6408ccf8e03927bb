// Package hooks is for nodes whose runtime speaks no NRI: OCI hooks tell of the
// containers (runtime-spec, config.md#posix-platform-hooks).
//
// A hook writes down what it was told (package member), and has the engine that runs
// on the machine look at it. Where none runs, it starts one in the background, which
// ends when the merges after the containers' starts are done ([Worker]). Whatever is
// killed in between, the next hook finds what it needs in the files.
//
// No container fails or waits because of a hook: see [Run].
package hooks

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Stage is when a runtime calls a hook.
type Stage string

const (
	// CreateRuntime comes when the container's cgroup and its first process are there,
	// which is still the runtime's own program.
	CreateRuntime Stage = "createRuntime"
	// Poststart comes after that: with runc before the container's program runs, with
	// crun when it does.
	Poststart Stage = "poststart"
	// Poststop comes when the container is deleted, and its processes are gone.
	Poststop Stage = "poststop"
)

// Stages are all of them, in the order in which they come.
var Stages = []Stage{CreateRuntime, Poststart, Poststop}

// Deadline is how long a hook takes at most, if it is not told otherwise.
const Deadline = time.Second

// maxState is how many bytes of a state are read.
const maxState = 1 << 20

// ErrState is matched by errors of what a runtime says to a hook.
var ErrState = errors.New("state of the container")

// maxID is how many bytes an id has at most: it is the name of a directory for runtimes.
const maxID = 255

// isID reports whether text may be the id of a container or a pod, as runc takes it,
// which is the strictest of the runtimes. It is no name of a directory above.
func isID(text string) bool {
	other := func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("_+,.-", r)
	}
	return text != "" && len(text) <= maxID && text != "." && text != ".." && !strings.ContainsFunc(text, other)
}

// ReadState reads the state of a container, to the end of the input, and checks the
// parts that are used. Errors match [ErrState], or are those of reading.
func ReadState(in io.Reader, stage Stage) (specs.State, error) {
	data, err := io.ReadAll(io.LimitReader(in, maxState+1))
	if err != nil {
		return specs.State{}, fmt.Errorf("%w: %w", ErrState, err)
	}
	s, err := parseState(data, stage)
	if err != nil {
		return specs.State{}, fmt.Errorf("%w: %w", ErrState, err)
	}
	return s, nil
}

func parseState(data []byte, stage Stage) (specs.State, error) {
	if len(data) > maxState {
		return specs.State{}, fmt.Errorf("larger than %d bytes", maxState)
	}
	var s specs.State
	if err := json.Unmarshal(data, &s); err != nil {
		return specs.State{}, fmt.Errorf("not JSON as the runtime specification has it: %w", err)
	}
	switch {
	case !isID(s.ID):
		return specs.State{}, fmt.Errorf("id %q is not that of a container", shown(s.ID))
	case stage != Poststop && s.Pid <= 1:
		return specs.State{}, fmt.Errorf("container %s: pid %d is not that of a container", s.ID, s.Pid)
	}
	return s, nil
}

// shown is text of others as an error has it, quoted by the verb.
func shown(text string) string {
	const most = 80
	if len(text) > most {
		return text[:most] + "..."
	}
	return text
}
