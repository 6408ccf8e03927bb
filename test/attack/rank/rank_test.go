package rank

import (
	"math"
	"math/rand/v2"
	"testing"
)

func near(t *testing.T, what string, got, want, off float64) {
	t.Helper()
	if math.IsNaN(got) || math.Abs(got-want) > off {
		t.Errorf("%s is %v, want %v", what, got, want)
	}
}

func TestCompare(t *testing.T) {
	for name, tc := range map[string]struct {
		a, b   []float64
		auc, z float64
	}{
		"above":        {[]float64{4, 5, 6}, []float64{1, 2, 3}, 1, 4.5 / math.Sqrt(9.0/12*7)},
		"below":        {[]float64{1, 2, 3}, []float64{4, 5, 6}, 0, -4.5 / math.Sqrt(9.0/12*7)},
		"in turns":     {[]float64{1, 4}, []float64{2, 3}, 0.5, 0},
		"all the same": {[]float64{7, 7, 7}, []float64{7, 7}, 0.5, 0},
		"one each":     {[]float64{2}, []float64{1}, 1, 0.5 / math.Sqrt(0.25)},
		// 3 and 3 are equal: of six pairs one counts half. With one tie of two among five
		// the variance is 6/12 * (6 - 6/20).
		"a tie": {[]float64{3, 5}, []float64{1, 3, 4}, 4.5 / 6, 1.5 / math.Sqrt(0.5*5.7)},
	} {
		t.Run(name, func(t *testing.T) {
			r := Compare(tc.a, tc.b)
			near(t, "AUC", r.AUC, tc.auc, 1e-12)
			near(t, "z", r.Z, tc.z, 1e-12)
		})
	}
}

// Over all ways to divide values between two samples, of which many are equal, z has a
// mean of 0 and a variance of 1, and the AUC is what counting pairs says.
func TestAllDivisions(t *testing.T) {
	values := []float64{1, 1, 1, 2, 3, 3, 4, 5, 5, 5, 9}
	const first = 4
	var n, sum, squares float64
	for chosen := range 1 << len(values) {
		var a, b []float64
		for i, v := range values {
			if chosen>>i&1 == 1 {
				a = append(a, v)
			} else {
				b = append(b, v)
			}
		}
		if len(a) != first {
			continue
		}
		above := 0.0
		for _, x := range a {
			for _, y := range b {
				if x > y {
					above++
				} else if x == y {
					above += 0.5
				}
			}
		}
		r := Compare(a, b)
		near(t, "AUC", r.AUC, above/float64(len(a)*len(b)), 1e-12)
		n, sum, squares = n+1, sum+r.Z, squares+r.Z*r.Z
	}
	near(t, "mean of z", sum/n, 0, 1e-12)
	near(t, "variance of z", squares/n, 1, 1e-12)
}

// Samples of one distribution are told apart as often as the threshold allows, and a
// shift that is small next to their spread is found.
func TestChance(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	draw := func(n int, shift float64) []float64 {
		sample := make([]float64, n)
		for i := range sample {
			// With a long tail, and with ties, as times have.
			sample[i] = math.Round(100 * math.Exp(random.NormFloat64()+shift))
		}
		return sample
	}
	const rounds = 2000
	found := 0
	for range rounds {
		if math.Abs(Compare(draw(100, 0), draw(100, 0)).Z) > Threshold(1, 0.05) {
			found++
		}
	}
	// Five standard deviations of a binomial distribution.
	near(t, "rate of false alarms", float64(found)/rounds, 0.05, 5*math.Sqrt(0.05*0.95/rounds))
	if r := Compare(draw(1000, 0.3), draw(1000, 0)); r.Z < Threshold(20, 1e-4) || r.AUC < 0.5 {
		t.Errorf("a shift is not found: %+v", r)
	}
}

func TestThreshold(t *testing.T) {
	near(t, "threshold of one in twenty", Threshold(1, 0.05), 1.959964, 1e-6)
	near(t, "that of two comparisons", Threshold(2, 0.1), Threshold(1, 0.05), 1e-12)
}

func TestMedian(t *testing.T) {
	near(t, "median of three", Median([]float64{9, 1, 4}), 4, 0)
	near(t, "median of four", Median([]float64{9, 1, 4, 6}), 5, 0)
	near(t, "part above", Above([]float64{1, 2, 3, 4}, 3), 0.25, 0)
}
