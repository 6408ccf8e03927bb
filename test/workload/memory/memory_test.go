package memory

import (
	"bytes"
	"compress/flate"
	"errors"
	"testing"
)

func region(t *testing.T, pages int, seed uint64) *Region {
	t.Helper()
	r, err := Map(pages, pages, seed, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func sum(t *testing.T, r *Region) uint64 {
	t.Helper()
	s, err := r.Check()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSameSeedSameData(t *testing.T) {
	a, b, c := region(t, 64, 1), region(t, 64, 1), region(t, 64, 2)
	if !bytes.Equal(a.data, b.data) || sum(t, a) != sum(t, b) {
		t.Error("two regions of one seed differ")
	}
	if bytes.Equal(a.data, c.data) || sum(t, a) == sum(t, c) {
		t.Error("two regions of different seeds are equal")
	}
	b.Write(3, 5, 9)
	if sum(t, a) == sum(t, b) {
		t.Error("a write did not change the sum")
	}
	a.Write(3, 5, 9)
	if !bytes.Equal(a.data, b.data) {
		t.Error("the same write left two regions different")
	}
}

func TestPagesDifferAndDoNotCompress(t *testing.T) {
	r := region(t, 256, 7)
	seen := map[string]int{}
	for p := range r.Pages() {
		key := string(r.page(p))
		if other, ok := seen[key]; ok {
			t.Fatalf("pages %d and %d are equal", other, p)
		}
		seen[key] = p
	}
	var packed bytes.Buffer
	w, err := flate.NewWriter(&packed, flate.DefaultCompression)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(r.data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if packed.Len() < len(r.data) {
		t.Errorf("%d bytes were compressed to %d", len(r.data), packed.Len())
	}
}

func TestCheckFindsOneFlippedBit(t *testing.T) {
	r := region(t, 16, 1)
	r.data[5*PageSize+1234] ^= 4
	var corrupt *CorruptionError
	if _, err := r.Check(); !errors.As(err, &corrupt) {
		t.Fatalf("Check returned %v", err)
	}
	if corrupt.Page != 5 || corrupt.Offset != 1232 || corrupt.Got^corrupt.Want != 4<<16 {
		t.Errorf("Check found %v", corrupt)
	}
}

func TestRepeatedPages(t *testing.T) {
	r, err := Map(8, 4, 1, true)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	sum(t, r)
	half := len(r.data) / 2
	if !bytes.Equal(r.data[:half], r.data[half:]) {
		t.Error("the second half does not repeat the first")
	}
}
