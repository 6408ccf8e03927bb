package chart

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/selective-ksm/selective-ksm/test/bench/result"
)

func draw(t *testing.T, f result.Figure, results []result.Result) string {
	t.Helper()
	var b strings.Builder
	if err := Write(&b, f, results); err != nil {
		t.Fatal(err)
	}
	d := xml.NewDecoder(strings.NewReader(b.String()))
	for {
		_, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, b.String())
		}
	}
	if bad := "NaN"; strings.Contains(b.String(), bad) || strings.Contains(b.String(), "Inf") {
		t.Errorf("a number is none in\n%s", b.String())
	}
	return b.String()
}

func at(variant, kernel string, x, median float64) result.Result {
	return result.Result{
		Figure: "f", Case: "a < b", Variant: variant, Kernel: kernel, X: x,
		Spread: result.Spread{N: 3, Median: median, Q1: median * 0.9, Q3: median * 1.1},
	}
}

func TestLines(t *testing.T) {
	for _, log := range []bool{false, true} {
		f := result.Figure{Name: "f", Title: "Time & money", Unit: "s", Axis: "processes", Log: log}
		text := draw(t, f, []result.Result{at("a", "1", 2, 1), at("a", "1", 8, 4), at("b", "1", 2, 30), at("b", "1", 8, 50)})
		for what, want := range map[string]int{"<polyline": 2, "<circle": 4, "Time &amp; money, s": 1, ">processes<": 1} {
			if n := strings.Count(text, what); n != want {
				t.Errorf("log %t: %d times %q, not %d, in\n%s", log, n, what, want, text)
			}
		}
	}
}

// Values that are all zero, or all the same, can be drawn.
func TestFlat(t *testing.T) {
	for _, v := range []float64{0, 7} {
		for _, f := range []result.Figure{{Name: "f", Axis: "x"}, {Name: "f", Axis: "x", Log: true}, {Name: "f"}, {Name: "f", Log: true}} {
			draw(t, f, []result.Result{at("a", "1", 1, v)})
		}
	}
}

func TestBars(t *testing.T) {
	text := draw(t, result.Figure{Name: "f", Title: "Time"}, []result.Result{at("a", "6.12-x", 0, 1), at("a", "6.12-y", 0, 2), at("b", "6.12-x", 0, 3)})
	for _, want := range []string{"a &lt; b: a, x<", "a &lt; b: a, y<", "a &lt; b: b<"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
	if err := Write(io.Discard, result.Figure{Name: "other"}, nil); err == nil {
		t.Error("a chart of nothing is one")
	}
}
