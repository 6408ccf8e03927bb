package result

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// Width is that of a table, in columns.
const Width = 80

// nameWidth is that of the first column.
const nameWidth = 30

// Table writes the results for people, a short table with the cases that figures name
// for it.
func (r Report) Table(w io.Writer, figures []Figure, short bool) error {
	var b strings.Builder
	b.WriteString(r.Date.UTC().Format("2 January 2006") + ", " + r.Command)
	if r.Commit != "" {
		b.WriteString(", " + r.Commit)
	}
	b.WriteString("\n")
	fmt.Fprintf(&b, "%d CPUs %s, Linux %s\n", r.Machine.CPUs, r.Machine.CPU, r.Machine.Kernel)
	var guests []string
	for _, row := range r.Results {
		guest := fmt.Sprintf("a VM of it: %s, Linux %s\n", row.CPU, row.Kernel)
		if row.Kernel != r.Machine.Kernel && !slices.Contains(guests, guest) {
			guests = append(guests, guest)
		}
	}
	b.WriteString(strings.Join(guests, ""))
	for _, f := range figures {
		rows := slices.DeleteFunc(slices.Clone(r.Results), func(row Result) bool {
			return row.Figure != f.Name || short && f.Short != nil && !slices.Contains(f.Short, row.Case) && !slices.Contains(f.Short, row.Variant)
		})
		if len(rows) == 0 {
			continue
		}
		title := f.Title
		if f.Unit != "" {
			title += ", " + f.Unit
		}
		fmt.Fprintf(&b, "\n%s\n", title)
		fmt.Fprintf(&b, "%s\n", strings.TrimRight(fmt.Sprintf("%-*s %3s %-22s %s", nameWidth, "", "n", "median (quartiles)", f.of()), " "))
		names, last := Names(rows), ""
		one := !slices.ContainsFunc(rows, func(r Result) bool { return names(r) != names(rows[0]) })
		for _, row := range rows {
			switch {
			case one:
				fmt.Fprintf(&b, "%-*s", nameWidth, "  "+row.Case)
			case row.Case != last:
				fmt.Fprintf(&b, "  %s\n", row.Case)
				fallthrough
			default:
				fmt.Fprintf(&b, "%-*s", nameWidth, "    "+names(row))
			}
			last = row.Case
			b.WriteString(strings.TrimRight(row.numbers(f), " ") + "\n")
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (f Figure) of() string {
	switch {
	case f.Case != "":
		return "of " + f.Case
	case f.Variant != "":
		return "of " + f.Variant
	}
	return ""
}

// isBase tells whether others are compared with a result.
func (f Figure) isBase(r Result) bool {
	return f.Case != "" && r.Case == f.Case || f.Variant != "" && r.Variant == f.Variant
}

// Names names variants. Those that several kernels have bear what the kernel's release ends
// with, too.
func Names(rows []Result) func(Result) string {
	return func(r Result) string {
		other := slices.ContainsFunc(rows, func(o Result) bool {
			return o.Case == r.Case && o.Variant == r.Variant && o.Kernel != r.Kernel
		})
		if _, kind, ok := strings.Cut(r.Kernel, "-"); ok && other {
			return r.Variant + ", " + kind
		}
		return r.Variant
	}
}

// numbers are what a row has besides its name.
func (r Result) numbers(f Figure) string {
	over := ""
	if r.Over > 0 {
		over = ">"
	}
	ratio := ""
	if r.Ratio != nil {
		ratio = fmt.Sprintf("%s%s (%s-%s)", over, number(r.Ratio.Median), number(r.Ratio.Q1), number(r.Ratio.Q3))
	} else if f.isBase(r) {
		ratio = "1"
	} else if f.of() != "" {
		ratio = "-" // what it compares with was not measured
	}
	return fmt.Sprintf(" %3d %-22s %s", r.N, fmt.Sprintf("%s%s (%s-%s)", over, number(r.Median), number(r.Q1), number(r.Q3)), ratio)
}

// number has three digits that count, and four behind the point at most.
func number(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 100 || v <= -100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v < 0.0995 && v > -0.0995:
		return strconv.FormatFloat(v, 'f', 4, 64)
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}
