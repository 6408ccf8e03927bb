// Package rank tells whether one sample lies higher than another, by the ranks of
// their values only: the test of Wilcoxon, Mann and Whitney.
package rank

import (
	"cmp"
	"math"
	"slices"
)

// Result is what a comparison of two samples came to.
type Result struct {
	// AUC is how often a value of the first sample is above one of the second, of all
	// pairs of such, where two that are equal count half: the area under the curve of who
	// tells them apart by a threshold. By chance it is 0.5.
	AUC float64
	// Z is how many standard deviations that is from chance. Of samples that do not
	// differ it is normally distributed, but for small ones.
	Z float64
}

// Compare compares two samples, neither of them empty.
func Compare(a, b []float64) Result {
	type value struct {
		float64
		first bool
	}
	all := make([]value, 0, len(a)+len(b))
	for _, v := range a {
		all = append(all, value{v, true})
	}
	for _, v := range b {
		all = append(all, value{v, false})
	}
	slices.SortFunc(all, func(x, y value) int { return cmp.Compare(x.float64, y.float64) })

	n1, n2, n := float64(len(a)), float64(len(b)), float64(len(all))
	var sum, tied float64 // the ranks of the first, and the sum of t³-t over all ties
	for i := 0; i < len(all); {
		end, firsts := i, 0
		for ; end < len(all) && all[end].float64 == all[i].float64; end++ {
			if all[end].first {
				firsts++
			}
		}
		// Ranks are counted from 1; equals have the mean of theirs.
		sum += float64(firsts) * float64(i+1+end) / 2
		t := float64(end - i)
		tied += t*t*t - t
		i = end
	}
	u := sum - n1*(n1+1)/2
	r := Result{AUC: u / (n1 * n2)}
	if variance := n1 * n2 / 12 * (n + 1 - tied/(n*(n-1))); variance > 0 {
		r.Z = (u - n1*n2/2) / math.Sqrt(variance)
	}
	return r
}

// Threshold is the |Z| that any of so many comparisons of samples that do not differ
// goes beyond with at most the given probability, whether they depend on each other or
// not.
func Threshold(comparisons int, probability float64) float64 {
	return math.Sqrt2 * math.Erfcinv(probability/float64(comparisons))
}

// Median is that of a sample that is not empty.
func Median(sample []float64) float64 {
	sorted := slices.Sorted(slices.Values(sample))
	half := len(sorted) / 2
	if len(sorted)%2 == 0 {
		return (sorted[half-1] + sorted[half]) / 2
	}
	return sorted[half]
}

// Above is the part of a sample, from 0 to 1, that is above a threshold.
func Above(sample []float64, threshold float64) float64 {
	n := 0
	for _, v := range sample {
		if v > threshold {
			n++
		}
	}
	return float64(n) / float64(len(sample))
}
