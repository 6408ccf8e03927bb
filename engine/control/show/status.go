// Package show has for people what the engine tells of itself.
package show

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/control"
)

// width is how long a line may be, if its words allow that.
const width = 80

// Status writes a table of what there is. Text that others choose, such as names, is
// shown without what a terminal would take for commands.
func Status(w io.Writer, r control.Report) error {
	t := &table{w: w, now: r.At}
	t.wrapped("selective-ksm ", "    ", fmt.Sprintf("%s on Linux %s, interface %s", r.Version, r.Kernel, r.Interface))
	containers, left := 0, reasons(r)
	for _, p := range r.Partitions {
		containers += len(p.Containers)
	}
	saved := ""
	if pages, known := savedPages(r); known {
		saved = fmt.Sprintf("%s MiB saved, ", mib(pages*pageSize))
	}
	t.line("%s in %s, %d not merged; %s%s s of CPU spent", count(containers+len(r.Outside), "container"),
		count(len(r.Partitions), "partition"), len(left), saved, seconds(r.Work.CPU))
	if len(r.Partitions) > 0 {
		t.line("")
		t.line("%-32s%4s %4s%s", "PARTITION", "PODS", "CTRS", columns("OFFERED", "SHARED", "SAVED", "UNMERGED"))
	}
	for _, p := range r.Partitions {
		t.partition(p)
	}
	if len(left) > 0 {
		t.line("")
		t.line("NOT MERGED")
	}
	for _, l := range left {
		t.wrapped("  "+l.name+": ", "      ", l.why)
	}
	return t.err
}

// table writes lines until one fails.
type table struct {
	w   io.Writer
	now time.Time
	err error
}

func (t *table) line(format string, args ...any) {
	if t.err != nil {
		return
	}
	_, t.err = io.WriteString(t.w, printable(strings.TrimRight(fmt.Sprintf(format, args...), " "))+"\n")
}

// wrapped writes words in lines of which the first begins with one text and the others
// with another.
func (t *table) wrapped(first, others, words string) {
	line := first
	bare := true
	for _, word := range strings.Fields(words) {
		if !bare && len(line)+1+len(word) > width {
			t.line("%s", line)
			line, bare = others, true
		}
		if !bare {
			line += " "
		}
		line, bare = line+word, false
	}
	t.line("%s", line)
}

var pageSize = uint64(os.Getpagesize())

// partition is three lines: pages, MiB, and times.
func (t *table) partition(p engine.PartitionStatus) {
	var offered uint64
	for _, c := range p.Containers {
		offered += c.Result.Offered
	}
	pods := podsOf(p)
	pages, bytes := []string{fmt.Sprint(offered / pageSize)}, []string{mib(offered)}
	for _, n := range counted(p) {
		if n == nil {
			pages, bytes = append(pages, "-"), append(bytes, "-")
			continue
		}
		pages, bytes = append(pages, fmt.Sprint(*n)), append(bytes, mib(*n*pageSize))
	}
	t.line("%-32s%4d %4d%s pages", p.Name, len(pods), len(p.Containers), columns(pages...))
	names := strings.Join(pods, ", ")
	if most := 39; len(names) > most {
		names = names[:most-3] + "..."
	}
	t.line("  %-39s%s MiB", names, columns(bytes...))
	t.wrapped("  ", "  ", fmt.Sprintf("%s s of CPU; %s; %s", seconds(p.Work.CPU), t.last(p), t.next(p)))
}

// counted are the pages that are shared, saved and unmerged; nil where that is not known.
func counted(p engine.PartitionStatus) []*uint64 {
	if c := p.Counters; c != nil {
		return []*uint64{&c.Shared, &c.Sharing, &c.Unshared}
	}
	return []*uint64{nil, nil, nil}
}

// savedPages are those of all partitions, if the kernel tells.
func savedPages(r control.Report) (pages uint64, known bool) {
	if r.Machine != nil {
		return r.Machine.Sharing, true
	}
	for _, p := range r.Partitions {
		if p.Counters != nil {
			pages, known = pages+p.Counters.Sharing, true
		}
	}
	return pages, known
}

// last says when it was merged.
func (t *table) last(p engine.PartitionStatus) string {
	if p.Last.IsZero() {
		return "not merged yet"
	}
	return "merged " + t.since(p.Last) + " ago"
}

// next says when it is merged again, or why not.
func (t *table) next(p engine.PartitionStatus) string {
	switch {
	case p.Hold == engine.HoldUnmerging:
		return "is being unmerged"
	case p.Hold == engine.HoldUnmerged:
		return "unmerged until selective-ksm merge"
	case len(p.Containers) == 0:
		return "is being removed"
	case p.Retry > 0:
		return fmt.Sprintf("failed, and is tried again within %v", p.Retry)
	case p.Waiting:
		return "waits for its turn"
	}
	next := p.Next
	if len(p.Due) > 0 && (next.IsZero() || p.Due[0].Before(next)) {
		next = p.Due[0]
	}
	switch {
	case next.IsZero():
		return "no merge is planned"
	case !next.After(t.now):
		return "merges now"
	}
	return "next in " + next.Sub(t.now).Round(time.Second).String()
}

func (t *table) since(at time.Time) string {
	return max(t.now.Sub(at), 0).Round(time.Second).String()
}

// left is a container that is not merged.
type left struct{ name, why string }

// reasons are the containers that are not merged, or not all of them, with the reason.
func reasons(r control.Report) []left {
	var all []left
	for _, p := range r.Partitions {
		for _, c := range p.Containers {
			if why := whyNot(c); why != "" {
				all = append(all, left{nameOf(c), why})
			}
		}
	}
	for _, c := range r.Outside {
		all = append(all, left{nameOf(c), whyNot(c)})
	}
	slices.SortStableFunc(all, func(a, b left) int { return strings.Compare(a.name, b.name) })
	return all
}

// whyNot is why a container is not merged. It is empty if it is.
func whyNot(c engine.ContainerStatus) string {
	switch {
	case c.Reason != "":
		return c.Reason
	case !c.Running:
		return "it has not been started"
	case !c.Result.At.IsZero():
		return ""
	case c.OnDemand:
		return "it is merged on demand only, by selective-ksm merge"
	}
	return "its first merge is still to come"
}

// nameOf is how people call a container.
func nameOf(c engine.ContainerStatus) string {
	return cmp.Or(c.Path(), short(c.ID))
}

// podsOf are the pods of a partition, each once. A container without a pod is one.
func podsOf(p engine.PartitionStatus) []string {
	seen := map[string]bool{}
	var pods []string
	for _, c := range p.Containers {
		if seen[c.SandboxID] {
			continue
		}
		seen[c.SandboxID] = true
		name := c.Namespace + "/" + c.Pod
		if c.Pod == "" {
			name = nameOf(c)
		}
		pods = append(pods, name)
	}
	slices.Sort(pods)
	return pods
}

// short is enough of a runtime's id to tell it from others, as crictl shows it.
func short(id string) string { return id[:min(len(id), 13)] }

// columns are four numbers of up to seven digits, or the words above them.
func columns(texts ...string) string {
	return fmt.Sprintf(" %7s %7s %7s %8s", texts[0], texts[1], texts[2], texts[3])
}

func mib(bytes uint64) string { return fmt.Sprintf("%.1f", float64(bytes)/(1<<20)) }

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f", d.Seconds()) }

func count(n int, what string) string {
	switch {
	case n == 1:
	case strings.HasSuffix(what, "s"):
		what += "es"
	default:
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// printable has every rune that is not to be shown replaced.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}
