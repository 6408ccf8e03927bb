package main

import (
	"math"
	"testing"

	"github.com/selective-ksm/selective-ksm/test/bench/result"
)

func TestExponent(t *testing.T) {
	for _, want := range []float64{-1, 0, 0.5, 1, 2} {
		var x, y []float64
		for _, v := range []float64{1, 4, 16, 256} {
			x, y = append(x, v), append(y, 3*math.Pow(v, want))
		}
		if got := exponent(x, y); math.Abs(got-want) > 1e-9 {
			t.Errorf("got %v, want %v", got, want)
		}
	}
}

func TestParse(t *testing.T) {
	samples, err := parse(`goos: linux
BenchmarkAnswers-2   	     100	  22391034 ns/op	         3.125 ms/slowest
BenchmarkAnswers-2   	     100	  22391034 ns/op	         4.5 ms/slowest
BenchmarkRound-2     	       5	 250000000 ns/op
PASS
`, map[string]result.Sample{
		"Answers ms/slowest": {Figure: "answer", Value: 1},
		"Round ns/op":        {Figure: "round", Value: 1e-6},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []struct {
		figure string
		value  float64
		turn   int
	}{{"answer", 3.125, 0}, {"answer", 4.5, 1}, {"round", 250, 0}}
	if len(samples) != len(want) {
		t.Fatalf("%+v", samples)
	}
	for i, w := range want {
		if s := samples[i]; s.Figure != w.figure || math.Abs(s.Value-w.value) > 1e-9 || s.Turn != w.turn || s.Kernel == "" {
			t.Errorf("got %+v, want %+v", s, w)
		}
	}
}

// Every figure has a title and a name of its own, and compares with one thing at most.
func TestFigures(t *testing.T) {
	for _, quick := range []bool{false, true} {
		seen := map[string]bool{}
		for _, f := range figuresOf(quick) {
			if f.Title == "" || seen[f.Name] || f.Case != "" && f.Variant != "" {
				t.Errorf("%+v", f)
			}
			seen[f.Name] = true
		}
	}
}
