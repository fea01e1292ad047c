package server

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What the runtime says when the process dies by a panic, a fatal error or a signal of its own goes to a file as well:
//
//	DIR/TIME-PID.txt   a line with version and unit, then the stacks of all goroutines
//
// The file is there while the process runs, locked, and goes when it ends in order; those that stay are crash reports. They hold code
// places and addresses, no data of volumes. The newest crashesMax are kept.
const (
	crashName    = "crash"
	crashSuffix  = ".txt"
	crashesMax   = 20
	crashTime    = "20060102T150405Z"
	crashHeadMax = 200
)

// CrashDir is where the crash reports of an appliance are.
func CrashDir(data string) string { return filepath.Join(data, crashName) }

// Crash is a report.
type Crash struct {
	File string    `json:"file"`
	At   time.Time `json:"at"`
	Head string    `json:"head"` // version, unit and the first line of what was said
}

// KeepCrash has the runtime write to a new file below dir. done removes it; it is called when the process ends in order.
func KeepCrash(dir, version, unit string) (done func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("crash reports: %w", err)
	}
	path := filepath.Join(dir, fmt.Sprintf("%s-%d%s", time.Now().UTC().Format(crashTime), os.Getpid(), crashSuffix))
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("crash reports: %w", err)
	}
	if _, err = fmt.Fprintf(f, "varve %s %s\n", version, unit); err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err == nil {
		err = debug.SetCrashOutput(f, debug.CrashOptions{})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("crash reports: %w", err), f.Close(), os.Remove(path))
	}
	return func() {
		_ = debug.SetCrashOutput(nil, debug.CrashOptions{})
		f.Close()
		os.Remove(path)
	}, nil
}

// Crashes are the reports below dir, the newest first. What a process that was killed left, and what is too many, is removed.
func Crashes(dir string) ([]Crash, error) {
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("crash reports: %w", err)
	}
	slices.Reverse(list)
	var out []Crash
	for _, e := range list {
		if !strings.HasSuffix(e.Name(), crashSuffix) {
			continue
		}
		c, keep, err := readCrash(filepath.Join(dir, e.Name()))
		if err != nil {
			return out, err
		}
		switch {
		case keep && len(out) < crashesMax:
			out = append(out, c)
		case keep:
			if err := os.Remove(c.File); err != nil {
				return out, err
			}
		}
	}
	return out, nil
}

// readCrash reads the head of a report; keep is false for the file of a process that runs, and for one that says nothing, which goes.
func readCrash(path string) (c Crash, keep bool, err error) {
	f, err := os.Open(path)
	if err != nil {
		return c, false, err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
		return c, false, nil
	}
	info, err := f.Stat()
	if err != nil {
		return c, false, err
	}
	b := make([]byte, crashHeadMax)
	n, err := f.Read(b)
	if err != nil {
		return c, false, os.Remove(path)
	}
	lines := strings.SplitN(string(b[:n]), "\n", 3)
	if len(lines) < 3 {
		return c, false, os.Remove(path)
	}
	return Crash{File: path, At: info.ModTime().UTC(), Head: lines[0] + ": " + lines[1]}, true, nil
}

const crashRecent = 7 * 24 * time.Hour

// crashChecks names the processes of this node that have crashed.
func (e estate) crashChecks(f *findings, self string) {
	list, err := Crashes(CrashDir(e.cfg.Data))
	switch {
	case err != nil:
		f.add("node.crashed", stateWarning, self, err.Error(), "")
	case len(list) > 0 && f.now.Sub(list[0].At) < crashRecent:
		f.add("node.crashed", stateWarning, self, fmt.Sprintf("%s: %s (%d reports)", list[0].At.Format(time.RFC3339), list[0].Head, len(list)), "")
	default:
		f.add("node.crashed", stateOK, self, "none in a week", "")
	}
}
