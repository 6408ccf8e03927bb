package plugin

import (
	"testing"
	"time"
)

func TestMerge(t *testing.T) {
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	line := func(second int, id string, took time.Duration) Line {
		return Line{
			Time: begin.Add(time.Duration(second) * time.Second), Message: "merged",
			ContainerID: id, DurationMS: float64(took.Milliseconds()),
		}
	}
	p := &Process{lines: []Line{
		line(5, "web", time.Second), // before there was a worker
		line(20, "web", time.Second), line(20, "worker", 3*time.Second),
		{Time: begin.Add(21 * time.Second), Message: "container is not merged", ContainerID: "web"},
		line(30, "web", time.Second), line(30, "other", time.Second), line(30, "worker", 2*time.Second),
	}}
	for _, tc := range []struct {
		since, want int // seconds; want 0 is none
	}{
		{since: 0, want: 20},
		{since: 15, want: 20},
		{since: 17, want: 30}, // the merge that ended at 20 began at 16
		{since: 28, want: 0},
	} {
		lines := p.merge(begin.Add(time.Duration(tc.since)*time.Second), []string{"web", "worker"})
		if tc.want == 0 {
			if lines != nil {
				t.Errorf("since %d: found %v", tc.since, lines)
			}
			continue
		}
		if len(lines) != 2 || lines[0].ContainerID != "web" || lines[1].ContainerID != "worker" {
			t.Errorf("since %d: found %v", tc.since, lines)
			continue
		}
		for _, l := range lines {
			if got := int(l.Time.Sub(begin).Seconds()); got != tc.want {
				t.Errorf("since %d: found the merge that ended at %d, want %d", tc.since, got, tc.want)
			}
		}
	}
}
