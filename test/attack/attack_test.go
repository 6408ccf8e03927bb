// Package attack_test attacks the borders that partitions are: a program tries to learn,
// by how long its writes and reads take, whether a page that it guesses is in the memory
// of a victim.
//
// It does what has been published of KSM (Suzaki et al., Memory Deduplication as a Threat
// to the Guest OS, EuroSec 2011): it fills memory with its guesses, waits until they are
// merged if there is anything to merge them with, and writes to each: a page that is
// merged is copied then, which takes longer. It learns how much longer from pages of its
// own that are equal to each other, which are merged wherever anything is.
//
// Beside its guesses it has as many pages that are in nobody's memory. Which is which
// was drawn by lot, so if the victim's memory has no influence, whatever else has some,
// the times of the two are one sample that was divided by lot: a rank test tells them
// apart as often as chance does. As these others are never merged, in whatever arm of the
// test, that compares each arm with pages that are never merged, at the same time.
//
//	make attack
package attack_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/missing"
)

// seed is what all that is drawn by lot depends on, but for the times.
const seed = 1

func TestMain(m *testing.M) {
	if name := os.Getenv(role); name != "" {
		if err := serve(name, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// The attack works inside of a partition, and across the border of two it does not, on
// the kernel that runs.
func TestAttack(t *testing.T) {
	if os.Getuid() != 0 {
		missing.Skip(t, "not root")
	}
	if os.Getenv("SELECTIVE_KSM_VM") == "" {
		t.Skip("not in the VM: it has the machine's one engine, and times what others would disturb")
	}
	if _, err := os.Stat(program); err != nil {
		missing.Skip(t, "not built: %v", err)
	}
	r := &record{}
	if partition.Supported() {
		t.Run("same partition", r.samePartition)
		t.Run("two partitions", r.twoPartitions)
		t.Run("numbers used again", r.numbersUsedAgain)
	} else {
		t.Run("same partition", r.samePartition)
		t.Run("victim kept out", r.victimKeptOut)
		t.Run("attacker kept out", r.attackerKeptOut)
		t.Run("numbers used again", r.numbersUsedAgain)
	}
	r.judge(t)
}

var (
	// apart is what must come of an attack where nothing is merged, and calibrated where
	// the attacker's own pages are, so that it knows what to look for.
	apart      = expected{}
	calibrated = expected{paired: true}
)

// samePartition has attacker and victim in one pod.
func (r *record) samePartition(t *testing.T) {
	n := startNode(t, configuration())
	a, v := n.run("shop", attacker, oneMergeSpace()), n.run("shop", victim, oneMergeSpace())
	merge := func() { mergeAll(t, a, func() { n.merge(a, v) }) }

	merge()
	r.attack(t, "same partition", expected{shared: true, paired: true, found: true}, a, v)
	merge()
	n.unmerge()
	// The first write to a page that was unmerged still takes a fault, though no copy.
	r.attack(t, "... unmerged", expected{found: true}, a, v)
}

// twoPartitions has each in a pod of its own.
func (r *record) twoPartitions(t *testing.T) {
	n := startNode(t, configuration())
	a, v := n.run("bank", attacker, false), n.run("shop", victim, false)
	merge := func() { mergeAll(t, a, func() { n.merge(a, v) }) }

	r.attack(t, "never merged", apart, a, v)
	merge()
	r.attack(t, "two partitions", calibrated, a, v)
	merge()
	n.unmerge()
	r.attack(t, "... unmerged", apart, a, v)
	n.restart()
	merge()
	r.attack(t, "... after a restart", calibrated, a, v)
	merge()
	n.remove(v)
	n.remove(a)
	if err := partition.WaitFor(deadline(t)); err != nil {
		t.Fatal(err)
	}
	r.attack(t, "... removed", apart, a, v)
}

// victimKeptOut has them in two pods, of which the attacker's has the merge space of an
// unpatched kernel.
func (r *record) victimKeptOut(t *testing.T) {
	n := startNode(t, configuration())
	a, v := n.run("bank", attacker, true), n.run("shop", victim, false)
	n.wantKeptOut(v)
	merge := func() { mergeAll(t, a, func() { n.merge(a) }) }

	r.attack(t, "never merged", apart, a, v)
	merge()
	r.attack(t, "victim kept out", calibrated, a, v)
	merge()
	n.unmerge()
	r.attack(t, "... unmerged", apart, a, v)
	n.restart()
	n.wantKeptOut(v)
	merge()
	r.attack(t, "... after a restart", calibrated, a, v)
	merge()
	n.remove(v)
	n.remove(a)
	n.forgotten(v, a)
	// The partition ends with the last process of its own, and what is merged until then is
	// that one's.
	r.attack(t, "... removed", calibrated, a, v)
}

// attackerKeptOut has them in two pods, of which the victim's has the merge space, and
// the attacker makes itself mergeable, as any program can.
func (r *record) attackerKeptOut(t *testing.T) {
	n := startNode(t, configuration())
	v, a := n.run("shop", victim, true), n.run("bank", attacker, true)
	n.wantKeptOut(a)
	n.command(nil, "merge")
	poll(t, func() error {
		c, _, err := n.status(v)
		if err == nil && !strings.Contains(c.Reason, "made themselves mergeable") {
			err = fmt.Errorf("%s is not known to have company: %q", v.name, c.Reason)
		}
		return err
	})
	r.attack(t, "attacker kept out", apart, a, v)
}

// configuration is the daemon's, for the kernel that runs.
func configuration() string {
	if oneMergeSpace() {
		return onDemand + oneSpace
	}
	return onDemand
}

// oneMergeSpace tells whether the kernel that runs is an unpatched one. There a
// container makes itself mergeable, which else the engine does.
func oneMergeSpace() bool { return !partition.Supported() }
