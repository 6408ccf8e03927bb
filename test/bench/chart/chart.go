// Package chart draws the figures of the benchmarks as SVG: lines where the cases lie on
// an axis, and bars elsewhere.
package chart

import (
	"fmt"
	"html"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/selective-ksm/selective-ksm/test/bench/result"
)

// Sizes in pixels, of the chart and of what is around the drawing.
const (
	width            = 720
	left, right, top = 70, 210, 60
	plotHeight       = 300
	bar, gap         = 18, 6
	labels           = 330
)

// colours are of the Okabe and Ito palette, which the colour-blind can tell apart.
var colours = []string{"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999"}

// Write draws one figure, of which there must be results.
func Write(w io.Writer, f result.Figure, results []result.Result) error {
	rows := slices.DeleteFunc(slices.Clone(results), func(r result.Result) bool { return r.Figure != f.Name })
	if len(rows) == 0 {
		return fmt.Errorf("no results of %s", f.Name)
	}
	d := &drawing{f: f, rows: rows}
	if f.Axis != "" {
		d.lines()
	} else {
		d.bars()
	}
	_, err := fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="#fff"/>
%s</svg>
`, width, d.height, d.b.String())
	return err
}

type drawing struct {
	f      result.Figure
	rows   []result.Result
	height int
	b      strings.Builder
}

func (d *drawing) text(x, y float64, anchor, attributes, text string) {
	fmt.Fprintf(&d.b, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\"%s>%s</text>\n", x, y, anchor, attributes, html.EscapeString(text))
}

func (d *drawing) line(x1, y1, x2, y2 float64, colour string) {
	fmt.Fprintf(&d.b, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"/>\n", x1, y1, x2, y2, colour)
}

func (d *drawing) title() {
	title := d.f.Title
	if d.f.Unit != "" {
		title += ", " + d.f.Unit
	}
	d.text(10, 22, "start", ` font-size="15"`, title)
	d.text(10, 40, "start", ` fill="#555"`, "median, and from the first quartile to the third")
}

// names are the variants, in their order.
func (d *drawing) names() (names []string, of func(result.Result) string) {
	of = result.Names(d.rows)
	for _, r := range d.rows {
		if !slices.Contains(names, of(r)) {
			names = append(names, of(r))
		}
	}
	return names, of
}

// scale puts values between from and to.
type scale struct {
	low, high, from, to float64
	log                 bool
}

func (s scale) at(v float64) float64 {
	low, high := s.low, s.high
	if s.log {
		v, low, high = math.Log10(max(v, low)), math.Log10(low), math.Log10(high)
	}
	return s.from + (v-low)/(high-low)*(s.to-s.from)
}

// ticks are round values on a scale.
func (s scale) ticks() []float64 {
	var all []float64
	if s.log {
		for e := math.Floor(math.Log10(s.low)); ; e++ {
			v := math.Pow(10, e)
			if v > s.high*1.001 {
				return all
			}
			if v >= s.low*0.999 {
				all = append(all, v)
			}
		}
	}
	step := math.Pow(10, math.Floor(math.Log10(s.high-s.low)))
	for (s.high-s.low)/step < 4 {
		step /= 2
	}
	for v := math.Ceil(s.low/step) * step; v <= s.high*1.0001; v += step {
		all = append(all, v)
	}
	return all
}

func label(v float64) string {
	if v >= 1000 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

// scales hold all values of the figure.
func (d *drawing) scales() (x, y scale) {
	x = scale{low: math.Inf(1), from: left, to: width - right, log: d.f.Log}
	y = scale{low: math.Inf(1), from: top + plotHeight, to: top, log: d.f.Log}
	for _, r := range d.rows {
		x.low, x.high = min(x.low, r.X), max(x.high, r.X)
		if r.Q1 > 0 {
			y.low = min(y.low, r.Q1)
		}
		y.high = max(y.high, r.Q3)
	}
	if !d.f.Log {
		y.low = 0
	} else {
		y.low, y.high = math.Pow(10, math.Floor(math.Log10(y.low))), math.Pow(10, math.Ceil(math.Log10(y.high)))
	}
	if x.high <= x.low {
		x.high = x.low + 1
	}
	if !(y.high > y.low) {
		y.low, y.high = 0, 1
		y.log = false
	}
	return x, y
}

func (d *drawing) lines() {
	d.height = top + plotHeight + 50
	d.title()
	x, y := d.scales()
	for _, v := range y.ticks() {
		d.line(x.from, y.at(v), x.to, y.at(v), "#ddd")
		d.text(x.from-6, y.at(v)+4, "end", "", label(v))
	}
	var marks []float64
	for _, r := range d.rows {
		if !slices.Contains(marks, r.X) {
			marks = append(marks, r.X)
			d.text(x.at(r.X), y.from+18, "middle", "", label(r.X))
		}
	}
	d.text((x.from+x.to)/2, y.from+38, "middle", "", d.f.Axis)
	names, of := d.names()
	for i, name := range names {
		colour := colours[i%len(colours)]
		var points []string
		for _, r := range d.rows {
			if of(r) != name {
				continue
			}
			points = append(points, fmt.Sprintf("%.1f,%.1f", x.at(r.X), y.at(r.Median)))
			d.line(x.at(r.X), y.at(r.Q1), x.at(r.X), y.at(r.Q3), colour)
			fmt.Fprintf(&d.b, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\"/>\n", x.at(r.X), y.at(r.Median), colour)
		}
		fmt.Fprintf(&d.b, "<polyline points=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\"/>\n", strings.Join(points, " "), colour)
		at := float64(top + 14 + 20*i)
		fmt.Fprintf(&d.b, "<rect x=\"%d\" y=\"%.1f\" width=\"12\" height=\"12\" fill=\"%s\"/>\n", width-right+15, at-10, colour)
		d.text(width-right+32, at, "start", "", name)
	}
}

func (d *drawing) bars() {
	d.height = top + len(d.rows)*(bar+gap) + 20
	d.title()
	x := scale{from: labels, to: width - 80}
	least := math.Inf(1)
	for _, r := range d.rows {
		x.high = max(x.high, r.Q3)
		if r.Q1 > 0 {
			least = min(least, r.Q1)
		}
	}
	if x.high == 0 {
		x.high = 1
	} else if d.f.Log {
		x.low, x.log = math.Pow(10, math.Ceil(math.Log10(least))-1), true
	}
	names, of := d.names()
	for i, r := range d.rows {
		y := float64(top + i*(bar+gap))
		name := r.Case
		if len(names) > 1 {
			name += ": " + of(r)
		}
		d.text(labels-8, y+13, "end", "", name)
		colour := colours[slices.Index(names, of(r))%len(colours)]
		fmt.Fprintf(&d.b, "<rect x=\"%d\" y=\"%.1f\" width=\"%.1f\" height=\"%d\" fill=\"%s\"/>\n", labels, y, x.at(r.Median)-x.from, bar, colour)
		d.line(x.at(r.Q1), y+bar/2, x.at(r.Q3), y+bar/2, "#333")
		over := ""
		if r.Over > 0 {
			over = "over "
		}
		d.text(x.at(max(r.Median, r.Q3))+6, y+13, "start", "", over+label(r.Median))
	}
}
