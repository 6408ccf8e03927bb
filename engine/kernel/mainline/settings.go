package mainline

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// ours is a number that nobody else would set pages_to_scan to: by it, settings are
// known that an engine left when it was killed.
const ours = "1009"

// defaults are the kernel's own settings, which are put in the place of those where it
// is not known what they were, in the order in which they would have been changed.
var defaults = []change{
	{"smart_scan", "1", "0"}, {"sleep_millisecs", "20", "0"}, {"pages_to_scan", "100", ours}, {"run", stop, scan},
}

// What ksmd is set to while it runs for us, in the order in which it is written.
// Two containers of 64 MiB each merge in 0.16 s of a CPU with it.
var settings = []setting{
	{"advisor_mode", "none"}, // which would set pages_to_scan itself; since 6.8
	{"pages_to_scan", ours},
	{"sleep_millisecs", "0"},
	{"smart_scan", "0"}, // which passes over pages that found no equal so far; since 6.7
}

type setting struct{ file, value string }

// change is a setting that we have changed, and have to restore.
type change struct{ file, was, is string }

// Values of run.
const (
	stop    = "0"
	scan    = "1"
	unmerge = "2"
)

// set changes a setting, and keeps what it was.
func (k *Kernel) set(file, value string) error {
	old, err := k.read(file)
	if err != nil {
		return err
	}
	if old == value {
		return nil
	}
	was := old
	if file == "run" && old == unmerge {
		was = stop // to write it again would unmerge all
	}
	k.saved = append(k.saved, change{file, was, value})
	if err := k.record(); err != nil {
		k.saved = k.saved[:len(k.saved)-1]
		return err
	}
	return k.write(file, value)
}

// restore puts settings back as they were, the last one first: ksmd is stopped
// before it is set to anything.
func (k *Kernel) restore() error {
	if len(k.saved) == 0 {
		return nil
	}
	for len(k.saved) > 0 {
		c := k.saved[len(k.saved)-1]
		if err := k.write(c.file, c.was); err != nil {
			return fmt.Errorf("restoring what ksmd was set to: %w", err)
		}
		k.saved = k.saved[:len(k.saved)-1]
	}
	return k.record()
}

// recordName is the file with what an engine has to restore, should it be killed. It
// has a line for each setting: its name, what it was, and what it is.
const recordName = "ksmd"

// record writes it.
func (k *Kernel) record() error {
	if k.options.Dir == "" {
		return nil
	}
	path := filepath.Join(k.options.Dir, recordName)
	if len(k.saved) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forgetting what ksmd was set to: %w", err)
		}
		return nil
	}
	var text strings.Builder
	for _, c := range k.saved {
		fmt.Fprintln(&text, c.file, c.was, c.is)
	}
	fresh := path + ".new"
	err := os.WriteFile(fresh, []byte(text.String()), 0o600)
	if err == nil {
		err = os.Rename(fresh, path)
	}
	if err != nil {
		return fmt.Errorf("keeping what ksmd is set to: %w", err)
	}
	return nil
}

// left is what an engine that was killed has to restore.
func (k *Kernel) left() ([]change, error) {
	number, err := k.read("pages_to_scan")
	if err != nil {
		return nil, err
	}
	run, err := k.read("run")
	if err != nil {
		return nil, err
	}
	recorded := k.recorded()
	tells := slices.ContainsFunc(recorded, func(c change) bool { return c.file == "pages_to_scan" && c.is == ours })
	switch {
	case number == ours && !tells:
		return slices.Clone(defaults), nil
	case number != ours && run == scan:
		// Somebody has it run since.
		return nil, nil
	}
	// What somebody has changed since stays.
	return slices.DeleteFunc(recorded, func(c change) bool {
		now, err := k.read(c.file)
		return err != nil || now != c.is
	}), nil
}

// word is what a setting may be.
var word = regexp.MustCompile(`^[a-z0-9-]{1,20}$`)

// recorded reads the file. Of one that is not there, or not as it is written here, it is
// nil.
func (k *Kernel) recorded() []change {
	if k.options.Dir == "" {
		return nil
	}
	text, err := os.ReadFile(filepath.Join(k.options.Dir, recordName))
	if err != nil {
		return nil
	}
	var changes []change
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) != 3 || !word.MatchString(f[1]) || !word.MatchString(f[2]) {
			return nil
		}
		c := change{f[0], f[1], f[2]}
		known := c.file == "run" || slices.ContainsFunc(settings, func(s setting) bool { return s.file == c.file })
		if !known || slices.ContainsFunc(changes, func(other change) bool { return other.file == c.file }) {
			return nil
		}
		changes = append(changes, c)
	}
	return changes
}
