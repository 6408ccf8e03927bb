package attack_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/budget"
	"github.com/selective-ksm/selective-ksm/engine/kernel"
	"github.com/selective-ksm/selective-ksm/engine/kernel/detect"
	"github.com/selective-ksm/selective-ksm/engine/kernel/kerneltest"
	"github.com/selective-ksm/selective-ksm/engine/kernel/mainline"
)

const (
	// reuses is how many numbers of the attacker's processes a process of the victim gets,
	// atOnce of them in one merge.
	reuses = 30
	atOnce = 10
)

// late is a kernel that is asked to merge some processes when their numbers are others'
// already: as late as it can be.
type late struct {
	kernel.Kernel

	mu sync.Mutex
	// reuse makes the number of a process another's, once.
	reuse map[int]func() error
	// answers are what came of these merges.
	answers []error
}

func (l *late) Merge(ctx context.Context, partition string, pid int, r kernel.Range) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	reuse := l.reuse[pid]
	if reuse == nil || r.Start > place || r.End <= place {
		return l.Kernel.Merge(ctx, partition, pid, r)
	}
	delete(l.reuse, pid)
	err := reuse()
	if err == nil {
		err = l.Kernel.Merge(ctx, partition, pid, r)
	}
	l.answers = append(l.answers, err)
	return err
}

// during has the numbers of processes used again while a function runs, and returns what
// came of their merges.
func (l *late) during(reuse map[int]func() error, do func()) []error {
	l.mu.Lock()
	l.reuse, l.answers = reuse, nil
	l.mu.Unlock()
	do()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.answers
}

// errTaken says that a number has become that of somebody else, such as the kernel.
var errTaken = errors.New("the number is somebody else's")

// merges is a hook that passes on the ids of containers that were merged.
type merges chan string

func (merges) Levels() []logrus.Level { return []logrus.Level{logrus.InfoLevel} }

func (m merges) Fire(e *logrus.Entry) error {
	if e.Message == "merged" {
		m <- e.Data["container_id"].(string)
	}
	return nil
}

// wait waits until these containers were merged once more.
func (m merges) wait(t *testing.T, containers ...*container) {
	t.Helper()
	left := map[string]bool{}
	for _, c := range containers {
		left[c.id] = true
	}
	ctx := deadline(t)
	for len(left) > 0 {
		select {
		case id := <-m:
			delete(left, id)
		case <-ctx.Done():
			t.Fatalf("%v: merge of %d containers", context.Cause(ctx), len(left))
		}
	}
}

// numbersUsedAgain has processes of the victim get the numbers of processes of the
// attacker that the engine is about to merge. Such a moment comes about by chance only:
// so this arm has an engine of its own instead of the daemon's, and makes it come.
func (r *record) numbersUsedAgain(t *testing.T) {
	running, _, err := detect.Open(detect.Options{Interface: detect.Auto, Mainline: mainline.Options{First: true, Dir: t.TempDir()}})
	if err != nil {
		t.Fatal(err)
	}
	k := &late{Kernel: running}
	log, merged := logrus.New(), make(merges, 1000)
	log.SetOutput(io.Discard)
	log.AddHook(merged)
	e := engine.New(engine.Options{
		Kernel: k, Owned: func(name string) bool { return strings.HasPrefix(name, "sksm-test-") }, Log: log,
		Settings: engine.Settings{Interval: time.Hour, Budget: budget.Limits{Workers: 2}},
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		e.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		if err := e.RemoveAll(context.Background()); err != nil {
			t.Error(err)
		}
	})

	run := func(pod, name string, mergeable bool) *container {
		c := launch(t, pod, name, mergeable, 0)
		c.start()
		err := e.Add(t.Context(), engine.Container{ID: c.id, Name: name, Pod: pod, CgroupsPath: "/" + c.id, Partition: "sksm-test-" + pod})
		if keptOut := !mergeable && oneMergeSpace(); errors.Is(err, kernel.ErrKeptOut) != keptOut || err != nil && !keptOut {
			t.Fatalf("%s: %v, is to be kept out: %v", name, err, keptOut)
		}
		e.Start(c.id)
		return c
	}
	a, d, v := run("bank", attacker, oneMergeSpace()), run("bank", decoy, oneMergeSpace()), run("shop", victim, false)
	all := []*container{a, d, v}
	if oneMergeSpace() {
		all = all[:2] // the victim is kept out
	}
	merge := func() {
		if err := e.Merge(""); err != nil {
			t.Fatal(err)
		}
		merged.wait(t, all...)
	}
	merge()
	kerneltest.FewNumbers(t)
	kill := func(pid int) {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Errorf("kill %d: %v", pid, err)
		}
	}
	for done := 0; done < reuses; {
		var strangers []int
		reuse := map[int]func() error{}
		for len(reuse) < atOnce {
			pid := d.ask(opFork, 0).Number
			if pid < kerneltest.Reserved {
				kill(pid)
				continue
			}
			reuse[pid] = func() error {
				kill(pid)
				forks, err := v.try(opForkAs, pid)
				if err == nil && forks.Number < 0 {
					return errTaken
				}
				strangers = append(strangers, pid)
				return err
			}
		}
		answers := k.during(reuse, merge)
		if len(answers) != atOnce {
			t.Fatalf("the engine had %d of %d processes merged", len(answers), atOnce)
		}
		for _, err := range answers {
			// An unpatched kernel merges what is mergeable, whoever is named.
			if errors.Is(err, kernel.ErrBusy) || err == nil && oneMergeSpace() {
				done++
			} else if !errors.Is(err, errTaken) {
				t.Fatalf("the kernel said %v to a merge of a stranger, want %v", err, kernel.ErrBusy)
			}
		}
		for _, pid := range strangers {
			kill(pid)
		}
	}
	t.Logf("%d numbers were used again", reuses)
	r.attack(t, "... pids used again", calibrated, a, v)
}
