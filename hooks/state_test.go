package hooks

import (
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

const stateOf = `{"ociVersion":"1.0.2","id":"a1","status":"creating","pid":4711,"bundle":"/b","annotations":{"k":"v"}}`

func TestReadState(t *testing.T) {
	s, err := ReadState(strings.NewReader(stateOf), CreateRuntime)
	if err != nil || s.ID != "a1" || s.Pid != 4711 || s.Annotations["k"] != "v" {
		t.Errorf("got %+v, %v", s, err)
	}
	// There is no process any more.
	if s, err := ReadState(strings.NewReader(`{"id":"a1","status":"stopped"}`), Poststop); err != nil || s.ID != "a1" {
		t.Errorf("got %+v, %v", s, err)
	}
	if _, err := ReadState(iotest.ErrReader(io.ErrClosedPipe), Poststop); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("got %v", err)
	}
}

func TestReadStateRefuses(t *testing.T) {
	large := `{"id":"a1","pid":4711,"bundle":"` + strings.Repeat("b", maxState) + `"}`
	for name, tc := range map[string]struct{ state, want string }{
		"nothing":         {"", "not JSON as the runtime specification has it: unexpected end of JSON input"},
		"truncated":       {stateOf[:40], "not JSON as the runtime specification has it: unexpected end of JSON input"},
		"more":            {stateOf + stateOf, "not JSON as the runtime specification has it: invalid character '{' after top-level value"},
		"list":            {"[]", "not JSON as the runtime specification has it: json: cannot unmarshal array into Go value of type specs.State"},
		"large":           {large, "larger than 1048576 bytes"},
		"large and valid": {stateOf + strings.Repeat(" ", maxState), "larger than 1048576 bytes"},
		"no id":           {`{"pid":4711}`, `id "" is not that of a container`},
		"path":            {`{"id":"../../etc/passwd","pid":4711}`, `id "../../etc/passwd" is not that of a container`},
		"above":           {`{"id":"..","pid":4711}`, `id ".." is not that of a container`},
		"line":            {`{"id":"a\nb","pid":4711}`, `id "a\nb" is not that of a container`},
		"line at the end": {`{"id":"a\n","pid":4711}`, `id "a\n" is not that of a container`},
		"zero byte":       {`{"id":"a\u0000","pid":4711}`, `id "a\x00" is not that of a container`},
		"long": {
			`{"id":"` + strings.Repeat("a", 256) + `","pid":4711}`,
			`id "` + strings.Repeat("a", 80) + `..." is not that of a container`,
		},
		"no pid":       {`{"id":"a1"}`, "container a1: pid 0 is not that of a container"},
		"init":         {`{"id":"a1","pid":1}`, "container a1: pid 1 is not that of a container"},
		"negative pid": {`{"id":"a1","pid":-1}`, "container a1: pid -1 is not that of a container"},
		"large pid": {
			`{"id":"a1","pid":99999999999999999999}`,
			"not JSON as the runtime specification has it: json: cannot unmarshal number 99999999999999999999 into Go struct field State.pid of type int",
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ReadState(strings.NewReader(tc.state), CreateRuntime)
			if want := "state of the container: " + tc.want; !errors.Is(err, ErrState) || err.Error() != want {
				t.Errorf("error is\n\t%v\nwant\n\t%s", err, want)
			}
		})
	}
}

// Whatever a state holds, one that is taken names a container that is no path and fits
// in a line, and a process that may be a container's.
func FuzzState(f *testing.F) {
	for _, s := range []string{stateOf, "", "{}", "null", `{"id":"../x","pid":2}`, `{"id":"a","pid":1e3}`, `{"ID":"a","Pid":7}`, stateOf + "x"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, stage := range Stages {
			s, err := parseState(data, stage)
			if err != nil {
				if line := err.Error(); strings.Contains(line, "\n") {
					t.Errorf("%q is more than a line", line)
				}
				continue
			}
			if s.ID == "" || strings.ContainsAny(s.ID, "/\n\x00") || s.ID == "." || s.ID == ".." {
				t.Errorf("id %q was taken", s.ID)
			}
			if stage != Poststop && s.Pid <= 1 {
				t.Errorf("pid %d was taken", s.Pid)
			}
			if !json.Valid(data) {
				t.Errorf("%q was taken", data)
			}
		}
	})
}
