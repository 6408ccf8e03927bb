package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/control/page"
	"github.com/selective-ksm/selective-ksm/engine/estimate"
	"github.com/selective-ksm/selective-ksm/engine/memory"
	"github.com/selective-ksm/selective-ksm/hooks/inventory"
)

// runEstimate says what merging would save.
func runEstimate(args []string) error {
	var (
		path   string
		asJSON bool
		pids   []int
		o      estimate.Options
	)
	flags := newFlags("estimate")
	flags.StringVar(&path, "config", "", "")
	flags.BoolVar(&asJSON, "json", false, "")
	flags.DurationVar(&o.Interval, "interval", 5*time.Second, "")
	flags.Float64Var(&o.Rate, "sample", 1, "")
	flags.Func("pid", "", func(text string) error {
		pid, err := strconv.Atoi(text)
		if err != nil || pid <= 0 {
			return fmt.Errorf("%q is not the number of a process", text)
		}
		pids = append(pids, pid)
		return nil
	})
	if err := parse(flags, args); err != nil {
		return err
	}
	switch {
	case !(o.Rate >= estimate.MinRate && o.Rate <= 1):
		return fmt.Errorf("estimate: -sample %v: write a part from %v to 1, such as 0.0625: %w", o.Rate, estimate.MinRate, errUsage)
	case o.Interval < 0:
		return fmt.Errorf("estimate: -interval %s: write a duration, such as 5s, or 0 for one look: %w", o.Interval, errUsage)
	case os.Geteuid() != 0:
		return errNotRoot
	}
	var err error
	if o.Config, err = load(path); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	var all inventory.Inventory
	if len(pids) > 0 {
		all, err = inventory.Processes(pids...)
	} else {
		all, err = inventory.Find(ctx, engine.RunDir)
	}
	if err != nil {
		return err
	}
	done := func() {}
	if isTerminal(os.Stderr) {
		o.Progress, done = progress(os.Stderr, resident(all))
	}
	report, err := estimate.Run(ctx, all, o)
	done()
	if err != nil {
		return err
	}
	if asJSON {
		return writeJSON(os.Stdout, report)
	}
	return showEstimate(os.Stdout, report)
}

// progress shows how much has been read, until it is done. How much there is, the first look
// takes from what the processes have, and the second from the first.
func progress(out io.Writer, resident uint64) (read func(look int, pages uint64), done func()) {
	const width = 30
	var shown time.Time
	total := [3]uint64{resident}
	read = func(look int, pages uint64) {
		total[look] += pages
		if time.Since(shown) < 100*time.Millisecond {
			return
		}
		shown = time.Now()
		part := min(total[look]*width/max(total[look-1], 1), width)
		fmt.Fprintf(out, "\rlook %d [%-*s] %s \x1b[K", look, width, strings.Repeat("#", int(part)), page.Size(total[look]*uint64(os.Getpagesize())))
	}
	return read, func() { fmt.Fprint(out, "\r\x1b[K") }
}

// resident is how many pages the processes of containers have. What they share counts for
// each of them.
func resident(all inventory.Inventory) (pages uint64) {
	for _, c := range all.Containers {
		pids, err := c.Pids()
		if err != nil {
			continue // It is gone.
		}
		for _, pid := range pids {
			if now, err := memory.ActivityOf(pid); err == nil {
				pages += now.Resident
			}
		}
	}
	return pages
}

// showEstimate shows a report to people.
func showEstimate(out io.Writer, r estimate.Report) error {
	containers, left := 0, map[string]int{}
	for _, c := range r.Containers {
		if c.LeftOut == "" {
			containers++
		} else {
			left[c.LeftOut]++
		}
	}
	for _, missing := range r.Missing {
		fmt.Fprintf(out, "Not asked: %s\n", missing)
	}
	fmt.Fprintf(out, "%s of %d containers would be offered.", page.Size(r.Offered), containers)
	if r.IntervalSeconds > 0 {
		fmt.Fprintf(out, " Of that, %s changed within %gs.", page.Size(r.Volatile), r.IntervalSeconds)
	}
	fmt.Fprintln(out)
	for _, reason := range slices.Sorted(maps.Keys(left)) {
		fmt.Fprintf(out, "%d more are not merged: %s.\n", left[reason], reason)
	}
	fmt.Fprintln(out)

	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(table, "merged by\tpartitions\tsaves\tof offered\tif nothing changed\tisolation costs\t\n")
	unknown := map[string][]string{}
	for _, p := range r.Policies {
		if p.Unknown != "" {
			unknown[p.Unknown] = append(unknown[p.Unknown], p.Policy)
			if p.Partitions == 0 {
				fmt.Fprintf(table, "%s\t-\t-\t-\t-\t-\t\n", p.Policy)
				continue
			}
		}
		saves := page.Size(p.Saved)
		if r.Rate < 1 {
			saves += " ± " + page.Size(p.Error)
		}
		fmt.Fprintf(table, "%s\t%d\t%s\t%s\t%s\t%s\t\n", p.Policy, p.Partitions, saves, share(p.Saved, r.Offered),
			page.Size(p.Saved+p.Volatile), page.Size(p.IsolationCosts))
	}
	if err := table.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(out)
	for _, reason := range slices.Sorted(maps.Keys(unknown)) {
		fmt.Fprintf(out, "By %s not all are merged: %s.\n", strings.Join(unknown[reason], ", "), reason)
	}
	if r.Rate < 1 {
		fmt.Fprintf(out, "Counted: one in %.0f of all contents; ± is what that is off by at most, at 95 %%.\n", 1/r.Rate)
	}
	fmt.Fprintf(out, "Zero pages: %s were never written and are in none of this; %s were, and are.\n", page.Size(r.Zero), page.Size(r.WrittenZero))
	fmt.Fprintf(out, "Huge pages: %s, which a merge splits.\n", page.Size(r.Huge))
	fmt.Fprintf(out, "Merged already: %s, which saves %s.\n", page.Size(r.Merged), page.Size(r.SavedNow))
	fmt.Fprintf(out, "The first merge takes up to %s s of CPU time, and %s s within the budget.\n", twoDigits(r.FirstMerge.CPUSeconds), twoDigits(r.FirstMerge.Seconds))
	fmt.Fprintf(out, "This took %s s of CPU time and %s of memory.\n", twoDigits(r.Own.CPUSeconds), page.Size(r.Own.MemoryBytes))
	return nil
}

// twoDigits is a number for people, without an exponent.
func twoDigits(v float64) string {
	if v >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.2g", v)
}

// share is a part of a whole, for people.
func share(part, whole uint64) string {
	if whole == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f %%", float64(part)*100/float64(whole))
}
