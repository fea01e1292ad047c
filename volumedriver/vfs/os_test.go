package vfs

import (
	"bytes"
	"testing"
)

func TestOSAllocatesNothing(t *testing.T) {
	f := create(t, OS(), t.TempDir()+"/f")
	defer f.Close()
	p := make([]byte, 16<<10)
	write(t, f, p, 0)
	bufs := [][]byte{p[:4096], p[4096:8192], p[8192:]}
	for what, call := range map[string]func(){
		"WritevAt":  func() { _, err := f.WritevAt(bufs, 0); check(t, err) },
		"ReadAt":    func() { _, err := f.ReadAt(p, 0); check(t, err) },
		"TryReadAt": func() { _ = f.TryReadAt(p, 0) },
	} {
		call()
		if n := testing.AllocsPerRun(100, call); n >= 1 {
			t.Errorf("%s allocates %v times", what, n)
		}
	}
}

func TestOSTryReadFromPageCache(t *testing.T) {
	f := create(t, OS(), t.TempDir()+"/f")
	defer f.Close()
	want := bytes.Repeat([]byte("varve"), 1000)
	write(t, f, want, 0)
	got := make([]byte, len(want))
	if err := f.TryReadAt(got, 0); err == ErrWouldBlock {
		t.Skip("this file system does not know RWF_NOWAIT")
	} else if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %v", err)
	}
}

// A directory that cannot be synced is an error where it can change: what is allowed is a read-only file system alone.
func TestSyncDirFailsWhereItCannotSync(t *testing.T) {
	if err := OS().SyncDir("/proc"); err == nil {
		t.Error("/proc is said to be synced")
	}
	if err := OS().SyncDir(t.TempDir()); err != nil {
		t.Error(err)
	}
}
