package main

import (
	"strings"
	"testing"
)

// A bar is as long as what is read of what there is, and goes at the end.
func TestProgress(t *testing.T) {
	for _, tc := range []struct {
		look     int
		resident uint64
		read     uint64
		bar      string
	}{
		{1, 100, 50, "[" + strings.Repeat("#", 15) + strings.Repeat(" ", 15) + "]"},
		{1, 0, 50, "[" + strings.Repeat("#", 30) + "]"},
		{1, 100, 300, "[" + strings.Repeat("#", 30) + "]"},
		{2, 100, 50, "[" + strings.Repeat("#", 30) + "]"}, // of none in the first
	} {
		var out strings.Builder
		read, done := progress(&out, tc.resident)
		read(tc.look, tc.read)
		done()
		if s := out.String(); !strings.Contains(s, tc.bar) || !strings.HasSuffix(s, "\r\x1b[K") {
			t.Errorf("%+v: %q", tc, s)
		}
	}
}
