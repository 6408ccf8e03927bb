package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/bench/chart"
	"github.com/selective-ksm/selective-ksm/test/bench/result"
)

// The kernels that are booted: with the series, and without it.
const (
	selective = "selective-ksm"
	stock     = "stock"
)

// bootTimeout is for all that is measured in one boot.
const bootTimeout = 40 * time.Minute

// A boot is one of a VM, and what is measured in it.
type boot struct {
	kernel string
	parts  []string
}

// Boots, of which each kind comes so many times.
var (
	// turn are those in which the kernels are compared, one after the other.
	turn = []boot{
		{selective, []string{"merge", "partitions", "memory", "again", "estimate", "stall", "start"}},
		{stock, []string{"merge", "partitions", "memory", "again", "estimate", "stall", "start"}},
	}
	// watch are side by side, as it takes ten minutes each time: the advisor takes a third of
	// a CPU, and the others next to nothing for most of it.
	watch = []boot{
		{selective, []string{"watch"}},
		{stock, []string{"watch"}},
		{stock, []string{"advisor"}},
	}
	// repeat are those of which each is compared in itself, or does not depend on time.
	repeat = []boot{
		{selective, []string{"programs"}},
		{stock, []string{"programs"}},
		{selective, []string{"node"}},
	}
	once = []boot{{selective, []string{"runtime", "outputs"}}}
)

// native is what runs on the machine itself.
const native = "native"

// runner runs all benchmarks.
type runner struct {
	quick         bool
	vm, out, only string

	began   time.Time
	commit  string
	samples []result.Sample
	outputs []result.Output
}

func (r *runner) run(ctx context.Context) error {
	r.began, r.commit = time.Now(), commit(ctx)
	if err := os.MkdirAll(r.out, 0o755); err != nil {
		return err
	}
	// What fails must not take with it what was measured before.
	var errs []error
	s := sizes(r.quick)
	for i := range s.turns {
		errs = append(errs, r.boots(ctx, i, turn))
	}
	for i := range s.repeats {
		errs = append(errs, r.sideBySide(ctx, i, watch))
	}
	for i := range s.repeats {
		errs = append(errs, r.boots(ctx, i, repeat))
	}
	errs = append(errs, r.boots(ctx, 0, once))
	if r.wants(native) {
		errs = append(errs, r.native(ctx))
	}
	errs = append(errs, r.tell())
	return errors.Join(errs...)
}

// wants reports whether a part is to be measured.
func (r *runner) wants(part string) bool {
	return r.only == "" || slices.Contains(strings.Split(r.only, ","), part)
}

// boots boots one VM after the other.
func (r *runner) boots(ctx context.Context, turn int, all []boot) error {
	var errs []error
	for _, b := range all {
		lines, err := r.boot(ctx, b)
		r.take(turn, lines)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// sideBySide boots all at once.
func (r *runner) sideBySide(ctx context.Context, turn int, all []boot) error {
	lines, errs := make([][]result.Line, len(all)), make([]error, len(all))
	var running sync.WaitGroup
	for i, b := range all {
		running.Go(func() { lines[i], errs[i] = r.boot(ctx, b) })
	}
	running.Wait()
	for _, l := range lines {
		r.take(turn, l)
	}
	return errors.Join(errs...)
}

// take keeps what was measured in a boot.
func (r *runner) take(turn int, lines []result.Line) {
	for _, l := range lines {
		if l.Sample != nil {
			l.Sample.Turn = turn
			r.samples = append(r.samples, *l.Sample)
		}
		if l.Output != nil {
			r.outputs = append(r.outputs, *l.Output)
		}
	}
}

// boot measures what is wanted of one boot. What was measured before an error is returned
// with it.
func (r *runner) boot(ctx context.Context, b boot) (all []result.Line, err error) {
	parts := slices.DeleteFunc(slices.Clone(b.parts), func(p string) bool { return !r.wants(p) })
	if len(parts) == 0 || ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return r.measured(ctx, b.kernel, append(strings.Fields(r.vm),
		"-kernel", filepath.Join("build/kernel", b.kernel, "bzImage"),
		"-memory", sizes(r.quick).guest, "-timeout", bootTimeout.String(), "--"), parts...)
}

// measured has parts measured under a command, if there is one.
func (r *runner) measured(ctx context.Context, where string, under []string, parts ...string) (all []result.Line, err error) {
	fmt.Fprintf(os.Stderr, "%4.0f s  %s: %s\n", time.Since(r.began).Seconds(), where, strings.Join(parts, ", "))
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	args := append(under, self, "measure", fmt.Sprintf("-quick=%t", r.quick))
	args = append(args, parts...)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	err = cmd.Run()
	lines := json.NewDecoder(&out)
	for lines.More() {
		var l result.Line
		if decodeErr := lines.Decode(&l); decodeErr != nil {
			err = errors.Join(err, decodeErr)
			break
		}
		if l.Sample == nil && l.Output == nil {
			err = errors.Join(err, errors.New("a line has neither a sample nor an output"))
			break
		}
		all = append(all, l)
	}
	if err != nil {
		err = fmt.Errorf("%s, %s: %w", where, strings.Join(parts, ", "), err)
	}
	return all, err
}

// goBenchmarks are those of Go's own kind, on this machine: what each of their numbers is.
var goBenchmarks = []struct {
	pkg, bench, time string
	values           map[string]result.Sample // by name and unit
}{
	{"./engine", "Round", "1s", map[string]result.Sample{
		"Round ns/op": {Figure: "round", Case: "1,000 containers", Variant: product, Value: 1e-6},
	}},
	{"./engine", "Idle", "1x", map[string]result.Sample{
		"Idle %-of-a-CPU": {Figure: "idle", Case: "1,000 containers", Variant: product, Value: 1},
	}},
	{"./plugin", "Answers", "20x", map[string]result.Sample{
		"Answers/outside ms/slowest": {Figure: "answer", Case: "20 pods at once", Variant: product, Value: 1},
		"Answers/wrapper ms/slowest": {Figure: "answer", Case: "... with the wrapper", Variant: product, Value: 1},
		"Answers/slow ms/slowest":    {Figure: "answer", Case: "... and a kernel that is slow", Variant: product, Value: 1},
	}},
	{"./engine/estimate", "Read", "1s", map[string]result.Sample{
		"Read cpu-s/GiB": {Figure: "read", Case: "4 processes of 128 MiB", Variant: reading, Value: 1},
		"Read MiB/GiB":   {Figure: "read-memory", Case: "4 processes of 128 MiB", Variant: product, Value: 1},
	}},
	{"./engine/estimate", "Merge", "1x", map[string]result.Sample{
		"Merge cpu-s/GiB": {Figure: "read", Case: "4 processes of 128 MiB", Variant: "a first merge", Value: 1},
	}},
	{"./test/hooks", "Hook", "100x", map[string]result.Sample{
		"Hook/daemon true-ms":          {Figure: "hook", Case: emptyHook, Variant: withDaemon, Value: 1},
		"Hook/daemon createRuntime-ms": {Figure: "hook", Case: "createRuntime", Variant: withDaemon, Value: 1},
		"Hook/daemon poststart-ms":     {Figure: "hook", Case: "poststart", Variant: withDaemon, Value: 1},
		"Hook/daemon poststop-ms":      {Figure: "hook", Case: "poststop", Variant: withDaemon, Value: 1},
		"Hook/worker true-ms":          {Figure: "hook", Case: emptyHook, Variant: withoutDaemon, Value: 1},
		"Hook/worker createRuntime-ms": {Figure: "hook", Case: "createRuntime", Variant: withoutDaemon, Value: 1},
		"Hook/worker poststart-ms":     {Figure: "hook", Case: "poststart", Variant: withoutDaemon, Value: 1},
		"Hook/worker poststop-ms":      {Figure: "hook", Case: "poststop", Variant: withoutDaemon, Value: 1},
	}},
}

// native has containerd start containers, and runs Go's benchmarks, each several times.
func (r *runner) native(ctx context.Context) error {
	lines, err := r.measured(ctx, "the machine itself", nil, native)
	r.take(0, lines)
	errs := []error{err}
	for _, b := range goBenchmarks {
		fmt.Fprintf(os.Stderr, "%4.0f s  go test -bench %s %s\n", time.Since(r.began).Seconds(), b.bench, b.pkg)
		cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^Benchmark"+b.bench+"$",
			"-benchtime", b.time, "-count", strconv.Itoa(sizes(r.quick).counts), b.pkg)
		out, err := cmd.CombinedOutput()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w\n%s", b.pkg, err, out))
		}
		samples, err := parse(string(out), b.values)
		r.samples = append(r.samples, samples...)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// parse reads what go test prints of benchmarks. The values are those that one unit is
// worth.
func parse(out string, of map[string]result.Sample) ([]result.Sample, error) {
	var samples []result.Sample
	release, err := kernelRelease()
	if err != nil {
		return nil, err
	}
	turns := map[string]int{}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 4 || !strings.HasPrefix(f[0], "Benchmark") {
			continue
		}
		name := strings.TrimPrefix(f[0], "Benchmark")
		if i := strings.LastIndex(name, "-"); i > 0 {
			name = name[:i] // the number of CPUs
		}
		for i := 2; i+1 < len(f); i += 2 {
			s, known := of[name+" "+f[i+1]]
			if !known {
				continue
			}
			v, err := strconv.ParseFloat(f[i], 64)
			if err != nil {
				return samples, fmt.Errorf("%q: %w", line, err)
			}
			s.Value *= v
			s.Kernel, s.Turn = release, turns[name]
			samples = append(samples, s)
		}
		turns[name]++
	}
	return samples, nil
}

// tell writes the results, and returns an error for what is above its limit.
func (r *runner) tell() error {
	figures := figuresOf(r.quick)
	results, err := result.Summarize(figures, r.samples)
	if err != nil {
		return err
	}
	if len(results)+len(r.outputs) == 0 {
		return errors.New("nothing was measured")
	}
	report := result.Report{
		Date: r.began.UTC().Truncate(time.Second), Took: time.Since(r.began).Round(time.Second).Seconds(),
		Command: "make bench", Quick: r.quick, Commit: r.commit, Results: results, Outputs: r.outputs,
	}
	if r.quick {
		report.Command += " QUICK=1"
	}
	if r.only != "" {
		report.Command += " ONLY=" + r.only
	}
	if report.Machine, err = machine(); err != nil {
		return err
	}
	if err := report.Write(filepath.Join(r.out, "results.json")); err != nil {
		return err
	}
	var table bytes.Buffer
	if err := report.Table(&table, figures, false); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(r.out, "results.txt"), table.Bytes(), 0o644); err != nil {
		return err
	}
	for _, o := range r.outputs {
		if err := os.WriteFile(filepath.Join(r.out, o.Name+".txt"), []byte(o.Text), 0o644); err != nil {
			return err
		}
	}
	for _, f := range figures {
		if !slices.ContainsFunc(results, func(r result.Result) bool { return r.Figure == f.Name }) {
			continue
		}
		if err := draw(filepath.Join(r.out, f.Name+".svg"), f, results); err != nil {
			return err
		}
	}
	if _, err := os.Stdout.Write(table.Bytes()); err != nil {
		return err
	}
	var errs []error
	for _, f := range figures {
		if r.only == "" && !slices.ContainsFunc(results, func(r result.Result) bool { return r.Figure == f.Name }) {
			errs = append(errs, fmt.Errorf("not measured: %s", f.Title))
		}
	}
	if above := result.Above(figures, results); len(above) > 0 {
		errs = append(errs, fmt.Errorf("above the limit:\n%s", strings.Join(above, "\n")))
	}
	return errors.Join(errs...)
}

func draw(path string, f result.Figure, results []result.Result) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(chart.Write(file, f, results), file.Close())
}

// commit is what is checked out, if git knows.
func commit(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

func machine() (m result.Machine, err error) {
	m.CPUs = runtime.NumCPU()
	if m.CPU, err = cpuModel(); err != nil {
		return m, err
	}
	if m.Kernel, err = kernelRelease(); err != nil {
		return m, err
	}
	var info unix.Sysinfo_t
	err = unix.Sysinfo(&info)
	m.MiB = int(info.Totalram * uint64(info.Unit) >> 20)
	return m, err
}

func kernelRelease() (string, error) {
	var u unix.Utsname
	err := unix.Uname(&u)
	return unix.ByteSliceToString(u.Release[:]), err
}

// cpuModel is what the kernel calls the CPU.
func cpuModel() (string, error) {
	file, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		if key, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value), nil
		}
	}
	return "", lines.Err()
}
