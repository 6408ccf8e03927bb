package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/workload/report"
)

// record is what can be seen of calls of the runtime's interface and of what they lead
// to, a line for each, with nothing in it that is another each time.
type record struct {
	t     *testing.T
	node  *node.Node
	pod   *node.Pod
	lines []string
	names []string // pairs of what is another each time, and what stands for it
}

func startRecord(t *testing.T, n *node.Node, pod node.PodConfig) *record {
	t.Helper()
	p, err := n.RunPodWith(deadline(t), pod)
	if err != nil {
		t.Fatal(err)
	}
	removeAfter(t, p)
	return &record{t: t, node: n, pod: p, names: []string{p.ID, "POD", p.Config().Metadata.Uid, "UID"}}
}

// dated is what is another each time, and has no name.
var dated = regexp.MustCompile(`/proc/[0-9]+/|[0-9a-f]{64}|[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+(Z|[+-][0-9:]+)`)

func (r *record) line(format string, args ...any) {
	text := strings.NewReplacer(r.names...).Replace(fmt.Sprintf(format, args...))
	r.lines = append(r.lines, dated.ReplaceAllString(text, "SOME"))
}

// answer records what a call returned.
func (r *record) answer(call string, err error) bool {
	if err != nil {
		r.line("%s: error: %v", call, err)
		return false
	}
	r.line("%s: done", call)
	return true
}

func (r *record) json(what string, v any) {
	r.t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		r.t.Fatal(err)
	}
	r.line("%s: %s", what, data)
}

// create creates a container, and returns its id if it was created.
func (r *record) create(c *runtime.ContainerConfig) (id string, created bool) {
	r.t.Helper()
	c.Image, c.LogPath = &runtime.ImageSpec{Image: node.Image}, r.log(c.Metadata.Name)
	ofPod := r.pod.Config()
	if c.Linux == nil {
		c.Linux = &runtime.LinuxContainerConfig{}
	}
	if c.Linux.SecurityContext == nil {
		c.Linux.SecurityContext = &runtime.LinuxContainerSecurityContext{}
	}
	c.Linux.SecurityContext.NamespaceOptions = ofPod.Linux.SecurityContext.NamespaceOptions
	created_, err := r.node.CRI().CreateContainer(deadline(r.t), &runtime.CreateContainerRequest{
		PodSandboxId: r.pod.ID, SandboxConfig: ofPod, Config: c,
	})
	if !r.answer("create", err) {
		return "", false
	}
	r.names = append(r.names, created_.ContainerId, "CONTAINER")
	return created_.ContainerId, true
}

func (r *record) log(container string) string {
	return r.pod.Config().Metadata.Uid + "-" + container + ".log"
}

// output is what a container has written, without what the runtime puts before each line.
func (r *record) output(container string) string {
	r.t.Helper()
	data, err := os.ReadFile(filepath.Join(r.pod.Config().LogDirectory, r.log(container)))
	if err != nil {
		r.t.Fatal(err)
	}
	var out strings.Builder
	for line := range strings.Lines(string(data)) {
		// Of the form "TIME STREAM F TEXT", or P for a part of a line.
		if f := strings.SplitN(line, " ", 4); len(f) == 4 {
			if f[2] == "P" {
				f[3] = strings.TrimSuffix(f[3], "\n")
			}
			out.WriteString(f[3])
		}
	}
	return out.String()
}

// reported records what a process said of itself, but for what opts it in.
func (r *record) reported(what, output string) (own report.Report) {
	r.t.Helper()
	own, ok := report.Parse(output)
	if !ok {
		r.line("%s: said %q", what, output)
		return own
	}
	shown := own
	shown.Mergeable = ""
	shown.PID = min(shown.PID, 2) // others depend on what else runs there
	shown.Mounts = slices.DeleteFunc(slices.Clone(own.Mounts), func(m string) bool { return strings.HasPrefix(m, wrapperInside+" ") })
	r.json(what, shown)
	return own
}

// wrapperInside is where a container has the wrapper.
const wrapperInside = "/.selective-ksm"

// status records what the runtime says of a container, and returns its specification.
func (r *record) status(what, id string) (spec map[string]any) {
	r.t.Helper()
	got, err := r.node.CRI().ContainerStatus(deadline(r.t), &runtime.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if !r.answer(what+": status", err) {
		return nil
	}
	s := got.Status
	r.json(what, map[string]any{
		"state": s.State.String(), "exit": s.ExitCode, "reason": s.Reason, "message": s.Message, "image": s.Image.GetImage(), "ref": s.ImageRef,
		"metadata": s.Metadata, "labels": s.Labels, "annotations": s.Annotations, "mounts": s.Mounts, "log": filepath.Base(s.LogPath),
		"resources": s.Resources, "user": s.User, "signal": s.StopSignal.String(),
		"created": s.CreatedAt > 0, "started": s.StartedAt > 0, "finished": s.FinishedAt > 0,
	})
	var info struct {
		RuntimeSpec map[string]any `json:"runtimeSpec"`
	}
	if err := json.Unmarshal([]byte(got.Info["info"]), &info); err != nil {
		r.t.Fatal(err)
	}
	r.json(what+": specification", r.plain(info.RuntimeSpec))
	return info.RuntimeSpec
}

// plain is a container's specification without what the plugin is meant to change.
func (r *record) plain(spec map[string]any) map[string]any {
	data, err := json.Marshal(spec)
	if err != nil {
		r.t.Fatal(err)
	}
	var plain map[string]any
	if err := json.Unmarshal(data, &plain); err != nil {
		r.t.Fatal(err)
	}
	if annotations, ok := plain["annotations"].(map[string]any); ok {
		for key := range annotations {
			if strings.HasPrefix(key, "selective-ksm.dev/") {
				delete(annotations, key)
			}
		}
	}
	if process, ok := plain["process"].(map[string]any); ok {
		if args, ok := process["args"].([]any); ok && len(args) > 3 && args[0] == wrapperInside {
			process["args"] = args[3:]
		}
	}
	if mounts, ok := plain["mounts"].([]any); ok {
		destination := func(m any) string {
			mount, _ := m.(map[string]any)
			at, _ := mount["destination"].(string)
			return at
		}
		mounts = slices.DeleteFunc(mounts, func(m any) bool { return destination(m) == wrapperInside })
		// With a mount of a plugin's, containerd puts all of them in another order, parents
		// before what is below them as always.
		slices.SortFunc(mounts, func(a, b any) int { return strings.Compare(destination(a), destination(b)) })
		plain["mounts"] = mounts
	}
	return plain
}

// isWrapped tells whether a specification has the wrapper before the command.
func isWrapped(spec map[string]any) bool {
	process, _ := spec["process"].(map[string]any)
	args, _ := process["args"].([]any)
	return len(args) > 3 && args[0] == wrapperInside
}

// start starts a container.
func (r *record) start(id string) bool {
	_, err := r.node.CRI().StartContainer(deadline(r.t), &runtime.StartContainerRequest{ContainerId: id})
	return r.answer("start", err)
}

// waitReport waits until a container has said what it sees of itself.
func (r *record) waitReport(name string) {
	r.t.Helper()
	poll(r.t, func(context.Context) string {
		if _, ok := report.Parse(r.output(name)); !ok {
			return "no report of " + name
		}
		return ""
	})
}

// waitEnd waits until a container has exited.
func (r *record) waitEnd(id string) {
	r.t.Helper()
	poll(r.t, func(ctx context.Context) string {
		got, err := r.node.CRI().ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: id})
		if err != nil {
			r.t.Fatal(err)
		}
		if got.Status.State != runtime.ContainerState_CONTAINER_EXITED {
			return "container is " + got.Status.State.String()
		}
		return ""
	})
}

// stop has a container asked to end.
func (r *record) stop(id string) {
	_, err := r.node.CRI().StopContainer(deadline(r.t), &runtime.StopContainerRequest{ContainerId: id, Timeout: 60})
	r.answer("stop", err)
}

func (r *record) remove(id string) {
	_, err := r.node.CRI().RemoveContainer(deadline(r.t), &runtime.RemoveContainerRequest{ContainerId: id})
	r.answer("remove", err)
}

// same fails the test unless two records are the same.
func same(t *testing.T, without, with []string) {
	t.Helper()
	if reflect.DeepEqual(without, with) {
		return
	}
	for i := range max(len(without), len(with)) {
		var a, b string
		if i < len(without) {
			a = without[i]
		}
		if i < len(with) {
			b = with[i]
		}
		if a != b {
			at := 0
			for at < min(len(a), len(b)) && a[at] == b[at] {
				at++
			}
			from := max(0, at-60)
			t.Errorf("line %d is another from character %d on: without\n\t%s\nwith\n\t%s", i, at, a[min(from, len(a)):min(len(a), at+200)], b[min(from, len(b)):min(len(b), at+200)])
		}
	}
}
