package engine

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

var errNoMemory = errors.New("no memory")

// A partition is merged as often as the most eager of its members asks for.
func TestIntervalOfMembers(t *testing.T) {
	with(t, func(b *bench) {
		b.configure(func(s *Settings) { s.StartDelays = nil })
		b.set(func(m *machine) { m.saved = little })
		slow, plain, fast := b.container("a", "own-1", 11), b.container("c", "own-1", 12), b.container("d", "own-1", 13)
		slow.Interval, fast.Interval = time.Hour, time.Minute
		idle := b.container("e", "own-1", 14)
		idle.Interval, idle.OnDemand = time.Second, true
		for _, tc := range []struct {
			joins Container
			want  time.Duration
		}{{slow, time.Hour}, {plain, 10 * time.Minute}, {fast, time.Minute}, {idle, time.Minute}} {
			b.add(tc.joins)
			b.Start(tc.joins.ID)
			b.pause()
			if got := b.pause(); got != tc.want {
				t.Errorf("with %s: the interval is %v, want %v", tc.joins.ID, got, tc.want)
			}
		}
		b.Stop("d")
		b.pause()
		if got := b.pause(); got != 10*time.Minute {
			t.Errorf("without the eager one: the interval is %v", got)
		}
	})
}

// merged are the containers that were merged since the last look, by their only
// process.
func (b *bench) merged() []string {
	b.Helper()
	synctest.Wait()
	var all []string
	for _, call := range b.took() {
		for pid, id := range map[string]string{"merge own-1 11 1000-5000": "a", "merge own-1 12 1000-5000": "c"} {
			if call == pid {
				all = append(all, id)
			}
		}
	}
	return all
}

func TestOnDemand(t *testing.T) {
	with(t, func(b *bench) {
		a, c := b.container("a", "own-1", 11), b.container("c", "own-1", 12)
		c.OnDemand = true
		b.add(c)
		// Before it runs there is nothing to merge, and later there is.
		if err := b.Engine.Merge("own-1"); err != nil {
			t.Fatal(err)
		}
		b.merged()
		b.Start("c")
		if got := b.merged(); !slices.Equal(got, []string{"c"}) {
			t.Errorf("asked for before its start, merged are %v", got)
		}
		time.Sleep(time.Hour)
		if got := b.merged(); got != nil {
			t.Errorf("merged unasked: %v", got)
		}
		if s := b.Status()[0]; !s.Next.IsZero() {
			t.Errorf("it says that it will be at %v", s.Next)
		}
		if err := b.Engine.Merge("own-1"); err != nil {
			t.Fatal(err)
		}
		if got := b.merged(); !slices.Equal(got, []string{"c"}) {
			t.Errorf("asked for, merged are %v", got)
		}

		b.add(a)
		b.Start("a")
		time.Sleep(time.Second)
		if got := b.merged(); !slices.Equal(got, []string{"a"}) {
			t.Errorf("after the start of another, merged are %v", got)
		}
		time.Sleep(9 * time.Second)
		b.merged()
		// What is asked for is not lost where the partition has to be added again.
		b.set(func(m *machine) { delete(m.partitions, "own-1") })
		if err := b.Engine.Merge(""); err != nil {
			t.Fatal(err)
		}
		b.merged()
		time.Sleep(time.Minute)
		if got := b.merged(); !slices.Equal(got, []string{"c", "a"}) {
			t.Errorf("asked for again, merged are %v", got)
		}
		time.Sleep(10 * time.Minute)
		if got := b.merged(); !slices.Equal(got, []string{"a"}) {
			t.Errorf("by the interval, merged are %v", got)
		}
	})
}

// What is asked for is not lost while the container is still in another partition.
func TestOnDemandAfterAMove(t *testing.T) {
	with(t, func(b *bench) {
		a := b.container("a", "own-old", 11)
		a.OnDemand = true
		b.add(a)
		b.Start("a")
		b.failWith(func(call string) error {
			if call == "remove own-old" {
				return errNoMemory
			}
			return nil
		})
		a.Partition = "own-1"
		if err := b.Reconcile(nil, []Container{a}); err != nil {
			t.Fatal(err)
		}
		if err := b.Engine.Merge("own-1"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if got := b.merged(); got != nil {
			t.Errorf("merged in two partitions: %v", got)
		}
		b.failWith(nil)
		time.Sleep(maxRetry + afterMove)
		if got := b.merged(); !slices.Equal(got, []string{"a"}) {
			t.Errorf("merged are %v", got)
		}
	})
}

func TestSecretsOfMembers(t *testing.T) {
	with(t, func(b *bench) {
		b.configure(func(s *Settings) { s.StartDelays = []time.Duration{time.Second} })
		a, c := b.container("a", "own-1", 11), b.container("c", "own-1", 12)
		c.Secrets = true
		for _, one := range []Container{a, c} {
			b.add(one)
			b.Start(one.ID)
			time.Sleep(time.Second)
			synctest.Wait()
		}
		// a alone, then both.
		var got []bool
		for _, o := range b.options {
			got = append(got, o.Secrets)
		}
		if !slices.Equal(got, []bool{false, false, true}) {
			t.Errorf("secrets were offered: %v", got)
		}
	})
}

// A container that is in no partition is no member. Where all that is mergeable
// merges with each other, it is a stranger all the same.
func TestOutside(t *testing.T) {
	on(t, oneSpace, func(b *bench) {
		out := b.container("c", "", 12)
		b.add(b.container("a", "own-1", 11))
		b.add(out)
		b.Start("c")
		if s := b.Status(); len(s) != 1 || len(s[0].Containers) != 1 {
			t.Errorf("status is %+v", s)
		}
		if !b.Knows("a") || !b.Knows("c") || b.Knows("b") {
			t.Error("it does not know those that it was told of, and no other")
		}
		b.set(func(m *machine) { m.mergeableAll = []int{11, 12} })
		b.Start("a")
		time.Sleep(time.Second)
		b.expect("add own-1")
		b.expectLog("a: container is not merged")

		// It leaves as members do.
		b.Stop("c")
		b.set(func(m *machine) { delete(m.containers, "/c"); m.mergeableAll = []int{11} })
		time.Sleep(10 * time.Second)
		// What an engine before may have merged it with is unmerged.
		b.expect("remove own-1", "add own-1", "merge own-1 11 1000-5000", "settle own-1", "merge own-1 11 1000-5000", "settle own-1")

		// A member that is put out is taken out of its partition.
		a := b.container("a", "", 11)
		b.set(func(m *machine) { m.optedOut[11] = true })
		if err := b.Reconcile(nil, []Container{a}); err != nil {
			t.Fatal(err)
		}
		b.expect("remove own-1")
		if len(b.outside) != 1 || len(b.members) != 0 {
			t.Errorf("outside are %v, members %v", b.outside, b.members)
		}
		b.StopSandbox("sandbox")
		if len(b.outside) != 0 {
			t.Errorf("outside are %v", b.outside)
		}

		// So is one that the kernel has no partition for, until it is gone.
		b.failWith(func(string) error { return errNoMemory })
		if err := b.Add(b.Context(), b.container("d", "own-2", 13)); !errors.Is(err, errNoMemory) || len(b.outside) != 1 {
			t.Errorf("refused with %v, outside are %v", err, b.outside)
		}
		b.failWith(nil)
		if err := b.Reconcile(nil, nil); err != nil || len(b.outside) != 0 {
			t.Errorf("outside are %v, %v", b.outside, err)
		}
	})
}
