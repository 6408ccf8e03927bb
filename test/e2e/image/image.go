// Package image writes container images that hold one static program and nothing else,
// as a runtime imports them: no registry and no image builder is needed. The same
// program makes the same image, to the byte.
package image

import (
	"archive/tar"
	"bytes"
	"cmp"
	_ "crypto/sha256" // for go-digest
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// nameAnnotation is where containerd's importer looks for an image's full name.
const nameAnnotation = "io.containerd.image.name"

// Image is an image of one program.
type Image struct {
	// Name is the image's full name, with registry and tag.
	Name string
	// Program is the file to copy; it becomes Path, the image's entry point.
	Program, Path string
	// User is who it runs as, root if it is empty.
	User string
	// Labels are the image's, and Architecture what its program is for, as Go names it:
	// if it is empty, this machine's.
	Labels       map[string]string
	Architecture string
}

// Write writes the image as a tar archive in OCI layout.
func (m Image) Write(w io.Writer) error {
	layer, err := m.layer()
	if err != nil {
		return fmt.Errorf("image %s: %w", m.Name, err)
	}
	platform := v1.Platform{OS: "linux", Architecture: cmp.Or(m.Architecture, runtime.GOARCH)}
	a := archive{w: tar.NewWriter(w)}
	layerAt := a.blob(v1.MediaTypeImageLayer, layer)
	configAt := a.json(v1.MediaTypeImageConfig, v1.Image{
		Platform: platform,
		Config:   v1.ImageConfig{User: m.User, Entrypoint: []string{m.Path}, Labels: m.Labels},
		RootFS:   v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{layerAt.Digest}},
	})
	manifestAt := a.json(v1.MediaTypeImageManifest, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageManifest,
		Config:    configAt,
		Layers:    []v1.Descriptor{layerAt},
	})
	manifestAt.Platform = &platform
	manifestAt.Annotations = map[string]string{nameAnnotation: m.Name}
	a.file(v1.ImageIndexFile, a.encode(v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageIndex,
		Manifests: []v1.Descriptor{manifestAt},
	}))
	a.file(v1.ImageLayoutFile, a.encode(v1.ImageLayout{Version: v1.ImageLayoutVersion}))
	if a.err == nil {
		a.err = a.w.Close()
	}
	if a.err != nil {
		return fmt.Errorf("image %s: %w", m.Name, a.err)
	}
	return nil
}

// layer returns the image's only layer, not compressed: it is read once.
func (m Image) layer() ([]byte, error) {
	program, err := os.ReadFile(m.Program)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: m.Path, Mode: 0o755, Size: int64(len(program))}); err != nil {
		return nil, err
	}
	if _, err := w.Write(program); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// archive writes an OCI layout. Its first error stays, and makes it write
// nothing more.
type archive struct {
	w   *tar.Writer
	err error
}

func (a *archive) file(name string, data []byte) {
	if a.err == nil {
		a.err = a.w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))})
	}
	if a.err == nil {
		_, a.err = a.w.Write(data)
	}
}

func (a *archive) blob(mediaType string, data []byte) v1.Descriptor {
	d := digest.FromBytes(data)
	a.file(v1.ImageBlobsDir+"/"+d.Algorithm().String()+"/"+d.Encoded(), data)
	return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

func (a *archive) json(mediaType string, v any) v1.Descriptor {
	return a.blob(mediaType, a.encode(v))
}

func (a *archive) encode(v any) []byte {
	data, err := json.Marshal(v)
	if a.err == nil {
		a.err = err
	}
	return data
}
