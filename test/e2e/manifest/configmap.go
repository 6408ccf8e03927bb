package manifest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// WriteConfigMap makes a directory that of a ConfigMap, or changes what it has, as the
// kubelet does (AtomicWriter in pkg/volume/util of Kubernetes): all files are behind one
// symbolic link, and a rename puts another in its place.
func WriteConfigMap(dir string, files map[string]string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write ConfigMap: %w", err)
		}
	}()
	version, err := os.MkdirTemp(dir, "..")
	if err != nil {
		return err
	}
	if err := os.Chmod(version, 0o755); err != nil {
		return err
	}
	const data = "..data"
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(version, name), []byte(content), 0o644); err != nil {
			return err
		}
		err := os.Symlink(filepath.Join(data, name), filepath.Join(dir, name))
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	link := filepath.Join(dir, data)
	before, err := os.Readlink(link)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(filepath.Base(version), link+"_tmp"); err != nil {
		return err
	}
	if err := os.Rename(link+"_tmp", link); err != nil {
		return err
	}
	if before == "" {
		return nil
	}
	return os.RemoveAll(filepath.Join(dir, before))
}
