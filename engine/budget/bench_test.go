package budget

import (
	"fmt"
	"sync"
	"testing"
	"time"
)

// BenchmarkTurns has as many partitions as a node may have take turns that cost nothing but
// themselves, all at once.
func BenchmarkTurns(b *testing.B) {
	for _, partitions := range []int{1, 16, 256} {
		b.Run(fmt.Sprint(partitions), func(b *testing.B) {
			budget := New(Limits{Total: 1, Partition: 1, Window: time.Minute, Workers: 2})
			each := b.N/partitions + 1
			var all sync.WaitGroup
			for i := range partitions {
				all.Go(func() {
					name := fmt.Sprint(i)
					for range each {
						if err := budget.Do(b.Context(), name, func() (time.Duration, error) { return time.Microsecond, nil }); err != nil {
							b.Error(err)
						}
					}
				})
			}
			all.Wait()
		})
	}
}
