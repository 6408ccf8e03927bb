package memory

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/kernel"
)

// MergedRanges returns where a process may have merged pages, in ascending order: the
// memory of its own that is present in the mappings of which the kernel says that they
// have any, protected from access or not. Unlike [Merged] that has those which a process
// came to by fork. Where the kernel does not tell, as older ones have no field KSM in
// smaps, or lacks PAGEMAP_SCAN, it is more than that. It ends early with the
// error of ctx, and other errors are those of [Find].
func MergedRanges(ctx context.Context, pid int) ([]kernel.Range, error) {
	smaps, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return nil, err
	}
	defer smaps.Close()
	mappings, err := parse(ctx, smaps)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", smaps.Name(), err)
	}
	pagemap, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return nil, err
	}
	defer pagemap.Close()
	var ranges []kernel.Range
	for _, m := range mappings {
		if !m.private || m.special || m.anonymous == 0 || m.counted && m.merged == 0 {
			continue
		}
		found, err := scan(ctx, pagemap, pid, m.Range, Options{Zero: true})
		if errors.Is(err, unix.ENOTTY) {
			found.present = []kernel.Range{m.Range}
		} else if err != nil {
			return nil, fmt.Errorf("scanning %s: %w", pagemap.Name(), err)
		}
		ranges = append(ranges, found.present...)
	}
	return ranges, nil
}
