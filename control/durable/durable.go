// Package durable writes small files so that a power cut leaves the old content or the new one, never less: write a new
// file, sync it, rename it over the old one, sync the directory.
package durable

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Replace makes dir/name hold b.
func Replace(dir, name string, b []byte, perm fs.FileMode) error {
	tmp := filepath.Join(dir, name+".new")
	if err := write(tmp, b, perm); err != nil {
		return fmt.Errorf("write %s: %w", filepath.Join(dir, name), err)
	}
	err := os.Rename(tmp, filepath.Join(dir, name))
	if err == nil {
		err = SyncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("replace %s: %w", filepath.Join(dir, name), err)
	}
	return nil
}

func write(path string, b []byte, perm fs.FileMode) error {
	// A file left by a crash may have another mode.
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// SyncDir puts a directory's entries on disk.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}

// MakeDir makes a directory, for this user alone, and puts its entry on disk. Its parents are made as well.
func MakeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := SyncDir(filepath.Dir(filepath.Clean(dir))); err != nil {
		return fmt.Errorf("sync the parent of %s: %w", dir, err)
	}
	return nil
}
