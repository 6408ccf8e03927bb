// Command image makes the product's container image, FROM scratch, as a tar archive in
// OCI layout.
//
//	image NAME PROGRAM ARCHIVE
//
// The labels are what the program says of itself, so that the same program makes the
// same archive.
package main

import (
	"debug/buildinfo"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/selective-ksm/selective-ksm/test/e2e/image"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: image NAME PROGRAM ARCHIVE")
		os.Exit(2)
	}
	if err := build(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintf(os.Stderr, "image: %v\n", err)
		os.Exit(1)
	}
}

func build(name, program, archive string) error {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return err
	}
	said := map[string]string{}
	for _, s := range info.Settings {
		said[s.Key] = s.Value
	}
	labels := map[string]string{
		v1.AnnotationTitle:       "selective-ksm",
		v1.AnnotationDescription: "Merges the identical memory of containers, inside of partitions only",
		v1.AnnotationSource:      "https://" + info.Main.Path,
		v1.AnnotationLicenses:    "Apache-2.0",
	}
	if v := info.Main.Version; v != "(devel)" {
		labels[v1.AnnotationVersion] = v
	}
	if revision := said["vcs.revision"]; revision != "" {
		labels[v1.AnnotationRevision] = revision
	}
	f, err := os.Create(archive)
	if err != nil {
		return err
	}
	err = image.Image{
		Name: name, Program: program, Path: "/" + filepath.Base(program), User: "0:0", Labels: labels, Architecture: said["GOARCH"],
	}.Write(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(archive))
	}
	return nil
}
