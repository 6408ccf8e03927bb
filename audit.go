package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/audit"
	"github.com/selective-ksm/selective-ksm/hooks/inventory"
)

// errCrossed says that merged pages are shared that must not be.
var errCrossed = errors.New("merged pages are shared across the border of a partition")

// errBlind says that nothing is known of that.
var errBlind = errors.New("it could not look")

// runAudit looks for merged pages that are shared across partitions. The error is that
// there are some, or that it could not look.
func runAudit(args []string) error {
	var (
		path           string
		by             string
		asJSON, strict bool
	)
	flags := newFlags("audit")
	flags.StringVar(&path, "config", "", "")
	flags.StringVar(&by, "by", "", "")
	flags.BoolVar(&asJSON, "json", false, "")
	flags.BoolVar(&strict, "strict", false, "")
	if err := parse(flags, args); err != nil {
		return err
	}
	scopes := []config.Scope{config.ScopeContainer, config.ScopePod, config.ScopeGroup, config.ScopeNamespace}
	switch {
	case by != "" && !slices.Contains(scopes, config.Scope(by)):
		return fmt.Errorf("audit: -by %s: write container, pod, group or namespace: %w", by, errUsage)
	case os.Geteuid() != 0:
		return fmt.Errorf("audit: %w: %w", errBlind, errNotRoot)
	}
	policy, err := load(path)
	if err != nil {
		return fmt.Errorf("audit: %w: %w", errBlind, err)
	}
	if by != "" {
		policy.PartitionBy = config.Scope(by)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	report, err := auditNow(ctx, policy, by != "")
	if err != nil {
		return fmt.Errorf("audit: %w: %w", errBlind, err)
	}
	if asJSON {
		err = writeJSON(os.Stdout, report)
	} else {
		showAudit(os.Stdout, report)
	}
	if crossed := verdict(report, strict); crossed != nil || err == nil {
		return errors.Join(crossed, err)
	}
	return fmt.Errorf("audit: %w: %w", errBlind, err)
}

// verdict is what the exit status tells of a report.
func verdict(report audit.Report, strict bool) error {
	if len(report.Crossings) > 0 || strict && len(report.Outside) > 0 {
		return fmt.Errorf("audit: %w", errCrossed)
	}
	return nil
}

// looks is how often is looked again if containers changed their partitions meanwhile, or
// were started.
const looks = 5

// auditNow audits what runs, by the partitions of the running engine if there is one and
// no policy is asked for. What is found counts if the partitions are still the same
// afterwards.
func auditNow(ctx context.Context, policy config.Config, byPolicy bool) (audit.Report, error) {
	for range looks {
		all, err := inventory.Find(ctx, engine.RunDir)
		if err != nil {
			return audit.Report{}, err
		}
		if len(all.Missing) > 0 && !byPolicy {
			// What it has merged is not known.
			return audit.Report{}, errors.New(strings.Join(all.Missing, "; ") + ": stop it, or write -by for the partitions of a policy")
		}
		all.Engine = all.Engine && !byPolicy
		partition := partitionBy(all.Engine, policy)
		report, err := audit.Run(ctx, all, partition)
		if err != nil || len(report.Crossings)+len(report.Outside) == 0 {
			return report, err
		}
		again, err := inventory.Find(ctx, engine.RunDir)
		if err != nil {
			return audit.Report{}, err
		}
		moved := movedTo(again, partitionBy(again.Engine && !byPolicy, policy))
		if !slices.ContainsFunc(slices.Concat(report.Crossings, report.Outside), func(c audit.Crossing) bool { return moved(c.A) || moved(c.B) }) {
			return report, nil
		}
	}
	return audit.Report{}, errors.New("containers changed their partitions at each look: nothing is proved")
}

// movedTo says what has changed its partition since it was looked at, or has been seen to be
// of a container that was not known then.
func movedTo(now inventory.Inventory, partition func(inventory.Container) string) func(audit.Side) bool {
	partitions, contained := map[string]string{}, map[int]bool{}
	for _, c := range now.Containers {
		partitions[c.ID] = partition(c)
		// Of one that is gone nothing is known any more.
		pids, _ := c.Pids()
		for _, pid := range pids {
			contained[pid] = true
		}
	}
	return func(s audit.Side) bool {
		if s.ID == "" {
			return contained[s.PID]
		}
		now, there := partitions[s.ID]
		return there && now != s.Partition
	}
}

// partitionBy says how the partition of a container is found.
func partitionBy(engine bool, policy config.Config) func(inventory.Container) string {
	if engine {
		return func(c inventory.Container) string { return c.Partition }
	}
	// One that policy leaves out is merged with nobody.
	return func(c inventory.Container) string {
		return cmp.Or(c.Assign(policy).Partition, "no partition, as policy leaves out "+c.ID)
	}
}

// showAudit shows a report to people.
func showAudit(out io.Writer, r audit.Report) {
	for _, missing := range r.Missing {
		fmt.Fprintf(out, "Not asked: %s\n", missing)
	}
	for _, c := range r.Crossings {
		fmt.Fprintf(out, "Crossed: %s\n", c)
	}
	for _, c := range r.Outside {
		fmt.Fprintf(out, "Outside: %s\n", c)
	}
	if len(r.Unread) > 0 {
		fmt.Fprintf(out, "Not looked at: processes %d outside of containers, which have capabilities that this one has not.\n", r.Unread)
	}
	if r.More {
		fmt.Fprintln(out, "There are more.")
	}
	by := "the running engine"
	if !r.Engine {
		by = "policy, as no engine was asked"
	}
	fmt.Fprintf(out, "%d containers in %d partitions, by %s; %d processes, %d pages that may be merged: %d pairs of containers share some that must not, and %d processes outside do.\n",
		r.Containers, r.Partitions, by, r.Processes, r.Pages, len(r.Crossings), len(r.Outside))
}
