package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func write(t *testing.T, m Image) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := m.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// files reads an archive.
func files(t *testing.T, archive []byte) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	r := tar.NewReader(bytes.NewReader(archive))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		if all[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func TestImage(t *testing.T) {
	program := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(program, []byte("of one kind"), 0o700); err != nil {
		t.Fatal(err)
	}
	m := Image{
		Name: "example.org/program:1", Program: program, Path: "/program",
		User: "0:0", Labels: map[string]string{"b": "2", "a": "1"}, Architecture: "riscv64",
	}
	first := write(t, m)

	// What is in it can be found from its index on, and is what its digests say.
	all := files(t, first)
	blob := func(d v1.Descriptor) []byte {
		t.Helper()
		data := all["blobs/sha256/"+d.Digest.Encoded()]
		if digest.FromBytes(data) != d.Digest || int64(len(data)) != d.Size {
			t.Errorf("%s has %d bytes of %v", d.Digest, len(data), d)
		}
		return data
	}
	decode := func(data []byte, into any) {
		t.Helper()
		if err := json.Unmarshal(data, into); err != nil {
			t.Fatal(err)
		}
	}
	var (
		index    v1.Index
		manifest v1.Manifest
		config   v1.Image
	)
	decode(all["index.json"], &index)
	decode(blob(index.Manifests[0]), &manifest)
	decode(blob(manifest.Config), &config)
	want := v1.ImageConfig{User: "0:0", Entrypoint: []string{"/program"}, Labels: m.Labels}
	if !reflect.DeepEqual(config.Config, want) || config.Architecture != "riscv64" || config.OS != "linux" {
		t.Errorf("the configuration is %+v", config)
	}
	layer := blob(manifest.Layers[0])
	if config.RootFS.DiffIDs[0] != digest.FromBytes(layer) {
		t.Error("the layer is not that of the configuration")
	}
	if root := files(t, layer); len(root) != 1 || string(root["/program"]) != "of one kind" {
		t.Errorf("its files are %q", root)
	}

	// The same program by another name, of another time and with other rights.
	again := program + "-again"
	if err := os.WriteFile(again, []byte("of one kind"), 0o555); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(again, time.Unix(1, 0), time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	m.Program = again
	if second := write(t, m); !bytes.Equal(first, second) {
		t.Error("the same program made another image")
	}
}
