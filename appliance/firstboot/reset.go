package firstboot

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"varve/control/durable"
)

const resetFile = "reset"

// AskReset has the next boot forget everything: settings, then what is on the data disk.
func AskReset(p Paths) error {
	return durable.Replace(p.State, resetFile, []byte("factory reset\n"), 0o600)
}

func resetAsked(p Paths) bool {
	_, err := os.Stat(filepath.Join(p.State, resetFile))
	return err == nil
}

// forget takes the settings away. Which disk is the data disk is still known: it is the one to erase.
func forget(p Paths) error {
	var errs []error
	for _, name := range []string{settingsFile, pendingFile} {
		if err := os.Remove(filepath.Join(p.State, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, durable.SyncDir(p.State))...)
}

// erase empties a data disk. The keys go first: what they have encrypted is lost whatever happens next.
func erase(root string) error {
	first := []string{"secrets.key", "tls", "control"}
	for _, name := range first {
		if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
			return err
		}
	}
	if err := durable.SyncDir(root); err != nil {
		return err
	}
	list, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	for _, e := range list {
		if err := os.RemoveAll(filepath.Join(root, e.Name())); err != nil {
			return err
		}
	}
	return durable.SyncDir(root)
}

// resetDone is said when the data disk is empty.
func resetDone(p Paths) error {
	if err := os.Remove(filepath.Join(p.State, resetFile)); err != nil {
		return err
	}
	return durable.SyncDir(p.State)
}
