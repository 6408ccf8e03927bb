package attack_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/attack/rank"
	"github.com/selective-ksm/selective-ksm/test/e2e/border"
	"github.com/selective-ksm/selective-ksm/test/pages"
)

var out = flag.String("results", "", "`file` to write what came of the attacks to, as JSON")

const (
	// works is the least AUC by which an attack has worked.
	works = 0.9
	// falseAlarm is how likely at most a run on one kernel fails by chance: one on both is
	// twice as likely to.
	falseAlarm = 0.5e-4
	// least is how many of the pages that are to be merged must be, in percent. The kernel
	// leaves out some that it finds busy.
	least = 95
)

// own is how many pages the attacker has merged with each other.
func own(t *testing.T, a *container) int {
	t.Helper()
	held := a.held()
	return len(held) - len(pages.ByFrame(held))
}

// held are the physical pages of what a container holds.
func (c *container) held() []pages.Page {
	c.t.Helper()
	held, err := pages.Range(c.pid, c.pages.Start, c.pages.End)
	if err != nil {
		c.t.Fatal(err)
	}
	if want := int(c.pages.End-c.pages.Start) / pageSize; len(held) != want {
		c.t.Fatalf("%s has %d pages, want %d", c.name, len(held), want)
	}
	return held
}

// enough tells whether as much is merged as must be.
func enough(merged, of int) bool { return merged*100 >= of*least }

// mergeAll merges until the attacker's own pages are merged: an unpatched kernel may need
// another scan for those that it found busy.
func mergeAll(t *testing.T, a *container, merge func()) {
	t.Helper()
	for range 10 {
		if merge(); own(t, a) == calibration {
			return
		}
	}
	if n := own(t, a); !enough(n, calibration) {
		t.Fatalf("%d of the attacker's %d pairs are merged", n, calibration)
	}
}

// expected is what must come of an attack.
type expected struct {
	// shared is that attacker and victim share the guessed pages before, paired that the
	// attacker's own pairs are merged. Otherwise none are.
	shared, paired bool
	// found is that the attacker tells the guessed pages from others.
	found bool
}

// row is what came of an attack.
type row struct {
	arm string
	expected
	shared int // pages with the victim
	times  *times
}

// record is what came of all attacks on a kernel.
type record struct{ rows []row }

// attack has the attacker look for the victim's pages. First it looks itself, by page
// frames, who shares what.
func (r *record) attack(t *testing.T, arm string, want expected, a, v *container) {
	t.Helper()
	if n := own(t, a); want.paired && !enough(n, calibration) || !want.paired && n != 0 {
		t.Errorf("%s: %d of the attacker's %d pairs are merged", arm, n, calibration)
	}
	shared := 0
	for _, common := range pages.Common(pages.ByFrame(a.held()), pages.ByFrame(v.held())) {
		page := int(common.A-a.pages.Start) / pageSize
		if k := a.pages.Kinds[page]; k != guessed {
			t.Errorf("%s: a page of kind %d is in a frame of the victim's", arm, k)
		}
		shared++
	}
	if want.shared {
		if !enough(shared, guesses) {
			t.Errorf("%s: attacker and victim share %d of %d pages", arm, shared, guesses)
		}
	} else {
		crossings, err := border.Crossings(
			border.Process{Tenant: attacker, Name: a.name, PID: a.pid}, border.Process{Tenant: victim, Name: v.name, PID: v.pid})
		if err != nil {
			t.Fatal(err)
		}
		if len(crossings)+shared > 0 {
			t.Errorf("%s: attacker and victim share %d guessed pages, and of all that they have %v", arm, shared, crossings)
		}
	}
	r.rows = append(r.rows, row{arm, want, shared, a.ask(opProbe, 0).Times})
}

// results is what came of all attacks, as it is printed, and written to a file.
type results struct {
	Kernel  string `json:"kernel"`
	Seed    uint64 `json:"seed"`
	Guesses int    `json:"guesses"`
	// Limit is the |z| from which on two kinds of pages are told apart.
	Limit float64 `json:"limit"`
	Lines []line  `json:"lines"`
}

// line is what came of one of the times of an arm.
type line struct {
	Arm   string `json:"arm"`
	Timed string `json:"timed"`
	// Guessed and Control are medians.
	Guessed float64 `json:"guessed_ns"`
	Control float64 `json:"control_ns"`
	AUC     float64 `json:"auc"`
	Z       float64 `json:"z"`
	// Own is the AUC of the attacker's own pages, if they are merged.
	Own *float64 `json:"own_auc,omitempty"`
	// Of writes only: which parts of the guessed and of the control pages are taken for
	// merged, and how many of the former are.
	Hits   *[2]float64 `json:"hits,omitempty"`
	Shared *int        `json:"shared,omitempty"`
}

// sum makes results of the attacks.
func (r *record) sum() results {
	quiet := 0
	for _, row := range r.rows {
		if !row.found {
			quiet += 2 // its writes and its reads
		}
	}
	all := results{Seed: seed, Guesses: guesses, Limit: rank.Threshold(quiet, falseAlarm)}
	threshold := math.NaN()
	for _, row := range r.rows {
		reads, writes := row.times.Reads, row.times.Writes
		if row.paired {
			threshold = (rank.Median(writes[paired]) + rank.Median(writes[single])) / 2
		}
		write, read := line{Arm: row.arm, Timed: "write"}, line{Arm: row.arm, Timed: "read"}
		write.Hits = &[2]float64{rank.Above(writes[guessed], threshold), rank.Above(writes[unguessed], threshold)}
		write.Shared = &row.shared
		for _, of := range []struct {
			line   *line
			sample [kinds][]float64
		}{{&write, writes}, {&read, reads}} {
			guess, other := of.sample[guessed], of.sample[unguessed]
			c := rank.Compare(guess, other)
			of.line.Guessed, of.line.Control, of.line.AUC, of.line.Z = rank.Median(guess), rank.Median(other), c.AUC, c.Z
			if row.paired {
				own := rank.Compare(of.sample[paired], of.sample[single]).AUC
				of.line.Own = &own
			}
		}
		all.Lines = append(all.Lines, write, read)
	}
	return all
}

// judge prints what came of the attacks, and fails the test unless those were found
// that must be, and no others.
func (r *record) judge(t *testing.T) {
	if len(r.rows) == 0 {
		return
	}
	all := r.sum()
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	all.Kernel = unix.ByteSliceToString(uts.Release[:])
	fmt.Printf(`
Linux %s, seed %d.
In each arm one read and one write were timed of each of %d guessed pages and
of %d control pages. AUC is how often one of the former takes longer than one
of the latter: by chance 0.500. Where |z| is above %.2f they are told apart: by
chance in less than %.0e of all runs. OWN is the AUC of pages that the attacker
has merged itself, next to others of its own. HITS are the guessed and the
control pages, in percent, that it takes for merged: those whose writes take
longer than halfway between the medians of its own. SHARED are the guessed
pages that are in a page frame of the victim's.

%s
`, all.Kernel, all.Seed, all.Guesses, all.Guesses, all.Limit, falseAlarm, all.table())
	if *out != "" {
		data, err := json.MarshalIndent(all, "", "\t")
		if err == nil {
			err = os.WriteFile(*out, append(data, '\n'), 0o644)
		}
		if err != nil {
			t.Error(err)
		}
	}
	for i, l := range all.Lines {
		switch row := r.rows[i/2]; {
		case l.Timed == "write" && l.Own != nil && *l.Own < works:
			t.Errorf("%s: the probe does not work: the AUC of the attacker's own pages is %.3f", l.Arm, *l.Own)
		case row.found && l.Timed == "write" && l.AUC < works:
			t.Errorf("%s: an attack that must work has an AUC of %.3f", l.Arm, l.AUC)
		case !row.found && math.Abs(l.Z) > all.Limit:
			t.Errorf("%s: a %s tells the guessed pages: AUC %.3f, z %.2f", l.Arm, l.Timed, l.AUC, l.Z)
		}
	}
}

// table is for people.
func (r results) table() string {
	var b strings.Builder
	row := func(columns ...any) {
		b.WriteString(strings.TrimRight(fmt.Sprintf("%-19s %-5s %8s %8s %6s %7s %6s %7s %6s", columns...), " ") + "\n")
	}
	row("ARM", "TIMED", "GUESSED", "CONTROL", "AUC", "z", "OWN", "HITS", "SHARED")
	row("", "", "ns", "ns", "", "", "", "%", "pages")
	for _, l := range r.Lines {
		arm, own, hits, shared := l.Arm, "-", "", ""
		if l.Own != nil {
			own = fmt.Sprintf("%.3f", *l.Own)
		}
		if l.Timed == "read" {
			arm = "" // that of the writes
		} else {
			hits, shared = fmt.Sprintf("%.0f/%.0f", 100*l.Hits[0], 100*l.Hits[1]), strconv.Itoa(*l.Shared)
		}
		row(arm, l.Timed, fmt.Sprintf("%.0f", l.Guessed), fmt.Sprintf("%.0f", l.Control), fmt.Sprintf("%.3f", l.AUC), fmt.Sprintf("%.2f", l.Z), own, hits, shared)
	}
	return b.String()
}

// The README's tables are those of a run whose results are in testdata.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"selective-ksm.json", "stock.json"} {
		data, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		var r results
		if err := json.Unmarshal(data, &r); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"```\n" + r.table() + "```\n", fmt.Sprintf("%.2f on %s", r.Limit, r.Kernel)} {
			if !strings.Contains(string(readme), want) {
				t.Errorf("the README has not this:\n%s", want)
			}
		}
	}
}
