package show

import (
	"fmt"
	"io"
	"strings"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/control"
)

// Explain writes what becomes of the containers that a name means, and why: the name of
// a container or a pod, either with what it is in before it as in namespace/pod/container,
// or the beginning of a container's or a sandbox's id. It returns an error if there is
// none.
func Explain(w io.Writer, r control.Report, name string) error {
	t := &table{w: w, now: r.At}
	found := 0
	explain := func(c engine.ContainerStatus, p *engine.PartitionStatus) {
		if !means(name, c) {
			return
		}
		if found++; found > 1 {
			t.line("")
		}
		t.container(r, c, p)
	}
	for i := range r.Partitions {
		for _, c := range r.Partitions[i].Containers {
			explain(c, &r.Partitions[i])
		}
	}
	for _, c := range r.Outside {
		explain(c, nil)
	}
	if found == 0 {
		return fmt.Errorf("no container or pod %q is known to the engine: write a name as in selective-ksm status, or the beginning of an id", name)
	}
	return t.err
}

// leastID is how much of an id is taken for one.
const leastID = 6

// means reports whether a name is a container's.
func means(name string, c engine.ContainerStatus) bool {
	if len(name) >= leastID && (strings.HasPrefix(c.ID, name) || strings.HasPrefix(c.SandboxID, name)) {
		return true
	}
	for _, one := range []string{
		c.Name, c.Pod, c.Pod + "/" + c.Name, c.Namespace + "/" + c.Pod, c.Namespace + "/" + c.Pod + "/" + c.Name,
	} {
		if name == one {
			return name != ""
		}
	}
	return name == c.ID
}

// container explains one; its partition is nil if it is in none.
func (t *table) container(r control.Report, c engine.ContainerStatus, p *engine.PartitionStatus) {
	const indent = "               "
	say := func(what, format string, args ...any) {
		t.wrapped(fmt.Sprintf("  %-13s", what), indent, fmt.Sprintf(format, args...))
	}
	t.line("%s", nameOf(c))
	say("container", "%s", c.ID)
	if p == nil {
		say("partition", "none")
		say("not merged", "%s (%s)", whyNot(c), c.Cause)
		return
	}
	because := ""
	if c.Because != "" {
		because = ", because " + c.Because
	}
	say("partition", "%s%s", p.Name, because)
	var others []string
	for _, other := range p.Containers {
		if other.ID != c.ID {
			others = append(others, nameOf(other))
		}
	}
	if len(others) == 0 {
		others = []string{"itself alone"}
	}
	say("merged with", "%s", strings.Join(others, ", "))
	say("interface", "%s: %s", r.Interface, r.Detail)
	if r.OptsIn {
		say("opted in", "from outside, by the kernel")
	} else {
		say("opted in", "by itself, before its command: by the wrapper, or its runtime")
	}
	secrets := "left out"
	if c.Secrets {
		secrets = "merged, too"
	}
	say("secrets", "%s", secrets)
	switch every := c.Interval; {
	case c.OnDemand:
		say("schedule", "on demand only, by selective-ksm merge")
	default:
		if every == 0 {
			every = r.Settings.Interval
		}
		say("schedule", "each %v, and up to %v while little is saved; %s", every, max(every, r.Settings.MaxInterval), t.next(*p))
	}
	if res := c.Result; !res.At.IsZero() {
		saved := ""
		if p.Counters != nil {
			saved = fmt.Sprintf(", which saves %s MiB", mib(res.Saved))
		}
		say("last merge", "%s ago, in %s s: %s offered %s MiB; %s MiB of the container are merged%s",
			t.since(res.At), seconds(res.Took), count(res.Processes, "process"), mib(res.Offered), mib(res.Merged), saved)
	}
	if why := whyNot(c); why != "" {
		cause := ""
		if c.Cause != "" {
			cause = fmt.Sprintf(" (%s)", c.Cause)
		}
		say("not merged", "%s%s", why, cause)
	}
}
