package estimate

import "math"

// counted is what merging some lists of hashes with each other comes to.
type counted struct {
	pages, zeros uint64
	// saved are pages of which there is an equal one, zeros without.
	saved uint64
	// squares is the sum of the squares of what each content saves.
	squares float64
}

// count merges ascending lists, all at once, and counts what there is twice and more.
// The lists are used up: they are slices of their callers', whose elements stay.
func count(lists [][]uint64) counted {
	var c counted
	heap := make([][]uint64, 0, len(lists))
	for _, l := range lists {
		if len(l) > 0 {
			heap = append(heap, l)
		}
	}
	for i := len(heap)/2 - 1; i >= 0; i-- {
		sink(heap, i)
	}
	for len(heap) > 0 {
		hash := heap[0][0]
		n := uint64(0)
		for len(heap) > 0 && heap[0][0] == hash {
			same := 1
			for same < len(heap[0]) && heap[0][same] == hash {
				same++
			}
			n += uint64(same)
			if heap[0] = heap[0][same:]; len(heap[0]) == 0 {
				last := len(heap) - 1
				heap[0] = heap[last]
				heap = heap[:last]
			}
			sink(heap, 0)
		}
		c.pages += n
		if hash == zero {
			c.zeros = n
		} else {
			c.saved += n - 1
			c.squares += float64(n-1) * float64(n-1)
		}
	}
	return c
}

// sink restores the order of a heap by the first elements of its lists.
func sink(heap [][]uint64, i int) {
	for {
		least := i
		for child := 2*i + 1; child <= 2*i+2; child++ {
			if child < len(heap) && heap[child][0] < heap[least][0] {
				least = child
			}
		}
		if least == i {
			return
		}
		heap[i], heap[least] = heap[least], heap[i]
		i = least
	}
}

// saving is what a partition saves, in bytes, by a sample of one in rate contents. All
// pages of zeros are in the sample.
func (c counted) saving(rate float64) (bytes, variance float64) {
	page := float64(pageSize)
	saved := float64(c.saved) * rate
	if c.zeros > 0 {
		saved += float64(c.zeros - 1)
	}
	// Each content is in the sample with the probability 1/rate, whatever the others
	// are: the sum over those in it is that of Horvitz and Thompson, and so is the
	// estimate of its variance.
	return saved * page, c.squares * rate * (rate - 1) * page * page
}

// bound is what an estimate is off by at most, with a probability of 95 %.
func bound(variance float64) float64 { return 1.96 * math.Sqrt(variance) }
