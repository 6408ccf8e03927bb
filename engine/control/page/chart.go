package page

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/selective-ksm/selective-ksm/engine/estimate"
)

// bar is a row of a chart of bars. Its lengths are in percent of the longest.
type bar struct {
	Label string
	// Title is what it says when pointed at.
	Title string
	// Length is that of the bar, and More of the part that is behind it.
	Length, More float64
	// Value and Note are told beside it.
	Value, Note string
}

// most is how many bars a chart has: the longest.
const most = 25

// scale makes lengths out of sizes.
func scale(bars []bar) []bar {
	longest := 0.0
	for _, b := range bars {
		longest = max(longest, b.Length+b.More)
	}
	for i := range bars {
		if longest > 0 {
			bars[i].Length *= 100 / longest
			bars[i].More *= 100 / longest
		}
	}
	return bars
}

// byPartition is what each partition saves, and what that took.
func byPartition(s Status) []bar {
	sorted := slices.SortedStableFunc(slices.Values(s.Partitions), func(a, b Partition) int {
		return cmp.Or(cmp.Compare(b.Saved, a.Saved), cmp.Compare(a.Name, b.Name))
	})
	var bars []bar
	for i, p := range sorted {
		if i == most {
			rest := Partition{Name: fmt.Sprintf("%d more", len(sorted)-most)}
			for _, q := range sorted[most:] {
				rest.Saved += q.Saved
				rest.Spent += q.Spent
			}
			bars = append(bars, partitionBar(rest))
			break
		}
		bars = append(bars, partitionBar(p))
	}
	return scale(bars)
}

func partitionBar(p Partition) bar {
	b := bar{Label: p.Name, Length: float64(p.Saved), Value: Size(p.Saved), Title: p.Name}
	if len(p.Containers) > 0 {
		b.Label = together(p.Containers)
		b.Title = fmt.Sprintf("%s: %s offered, %s merged", p.Name, Size(p.Offered), Size(p.Merged))
	}
	b.Note = "in " + seconds(p.Spent)
	if mib := float64(p.Saved) / (1 << 20); mib >= 1 && p.Spent > 0 {
		b.Note += fmt.Sprintf(", %.3g ms for a MiB", p.Spent.Seconds()*1000/mib)
	}
	return b
}

// together names containers, those of one pod behind the pod's name, and not all of many.
func together(names []string) string {
	const shown = 6
	var parts []string
	pod := ""
	for i, name := range names {
		if i == shown {
			parts = append(parts, fmt.Sprintf("and %d more", len(names)-shown))
			break
		}
		at := strings.LastIndex(name, "/") + 1
		if name[:at] == pod {
			name = name[at:]
		}
		pod = names[i][:at]
		parts = append(parts, name)
	}
	return strings.Join(parts, ", ")
}

// byPolicy is what each policy would save.
func byPolicy(r *estimate.Report) []bar {
	var bars []bar
	for _, p := range r.Policies {
		b := bar{Label: p.Policy, Length: float64(p.Saved), More: float64(p.Volatile), Value: Size(p.Saved)}
		b.Title = fmt.Sprintf("%d partitions; %s more if nothing changed", p.Partitions, Size(p.Volatile))
		switch {
		case p.Partitions == 0 && p.Unknown != "":
			b.Value, b.Note = "not known", p.Unknown
		case p.IsolationCosts > 0:
			b.Note = Size(p.IsolationCosts) + " less than the whole node"
		}
		if p.Error > 0 {
			b.Value += " ± " + Size(p.Error)
		}
		bars = append(bars, b)
	}
	return scale(bars)
}

// line is a chart of a size over time, of 600 by 200.
type line struct {
	// Points are those of an SVG polyline.
	Points string
	Dots   []dot
	// Top is what the upper border stands for; the lower one is 0.
	Top          uint64
	Begin, Until time.Time
}

type dot struct {
	X, Y  float64
	Title string
}

const lineWidth, lineHeight = 600, 200

// overTime is what was saved at each time.
func overTime(all []Status) *line {
	l := &line{Begin: all[0].At, Until: all[len(all)-1].At}
	for _, s := range all {
		l.Top = max(l.Top, s.Saved())
	}
	whole := l.Until.Sub(l.Begin)
	var points []string
	for i, s := range all {
		d := dot{X: lineWidth * float64(i) / float64(len(all)-1), Y: lineHeight, Title: when(s.At) + ": " + Size(s.Saved())}
		if whole > 0 {
			d.X = lineWidth * float64(s.At.Sub(l.Begin)) / float64(whole)
		}
		if l.Top > 0 {
			d.Y = lineHeight * (1 - float64(s.Saved())/float64(l.Top))
		}
		l.Dots = append(l.Dots, d)
		points = append(points, fmt.Sprintf("%.1f,%.1f", d.X, d.Y))
	}
	l.Points = strings.Join(points, " ")
	return l
}
