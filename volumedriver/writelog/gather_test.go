package writelog

import (
	"io/fs"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"varve/volumedriver/vfs"
)

// slowFS is a file system whose Datasync takes a time.
type slowFS struct {
	vfs.FS
	sync time.Duration
}

func (f *slowFS) OpenFile(path string, flag int, perm fs.FileMode) (vfs.File, error) {
	file, err := f.FS.OpenFile(path, flag, perm)
	return &slowFile{file, f}, err
}

type slowFile struct {
	vfs.File
	fs *slowFS
}

func (f *slowFile) Datasync() error {
	time.Sleep(f.fs.sync)
	return f.File.Datasync()
}

// client is one that has a durable write at a time.
type client struct{ ended chan struct{} }

func (c *client) Logged(*Logged)           {}
func (c *client) LogFailed(uint64, error)  {}
func (c *client) Done(_ uint64, err error) { c.ended <- struct{}{} }
func (c *client) Settle(bool)              {}

// TestGather: what a sync of 300 us makes of clients that write durably and think in between. The clock is the test's.
func TestGather(t *testing.T) {
	const took = 300 * time.Microsecond
	for _, c := range []struct {
		name        string
		clients     int
		think       func(client, i int) time.Duration
		inline      bool
		perSync     float64       // writes that a sync serves, at least
		perWriteMax time.Duration // that a client waits, on average
	}{
		{"one", 1, func(_, _ int) time.Duration { return 50 * time.Microsecond }, false, 0.99, took + time.Microsecond},
		{"one that syncs itself", 1, func(_, _ int) time.Duration { return 0 }, true, 0.99, took + time.Microsecond},
		{"sixteen that come back at once", 16, func(n, _ int) time.Duration { return time.Duration(10+5*n) * time.Microsecond }, false,
			14, took + 120*time.Microsecond},
		{"sixteen that sync themselves", 16, func(n, _ int) time.Duration { return time.Duration(10+5*n) * time.Microsecond }, true,
			14, took + 120*time.Microsecond},
		// The hold does not pay: it is given up, and costs each write next to nothing beside the sync that is under way.
		{"three that come when they like", 3, func(n, i int) time.Duration { return time.Duration(1+(n*7+i*3)%11) * time.Millisecond },
			false, 0.9, took * 3 / 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				slow := &slowFS{FS: vfs.NewMem(1)}
				cfg := testConfig(slow)
				cfg.SegmentBytes = 128 << 20 // it never rolls
				l := mustOpen(t, cfg)
				defer func() { slow.sync = 0; closeLog(t, l) }()
				slow.sync = took
				const writes = 400
				var clients sync.WaitGroup
				var mu sync.Mutex // guards what follows
				var seq uint64
				var waited time.Duration
				before := l.Stats().Syncs
				for n := range c.clients {
					clients.Go(func() {
						who := &client{make(chan struct{}, 1)}
						for i := range writes {
							time.Sleep(c.think(n, i))
							begun := time.Now()
							mu.Lock()
							seq++
							err := l.Append(zeroRecord(seq), nil, who, true, who, 0)
							mu.Unlock()
							if err != nil {
								t.Error(err)
								return
							}
							if c.inline {
								l.KickSync()
							} else {
								l.Kick()
							}
							<-who.ended
							mu.Lock()
							waited += time.Since(begun)
							mu.Unlock()
						}
					})
				}
				clients.Wait()
				total := float64(c.clients * writes)
				if got := total / float64(l.Stats().Syncs-before); got < c.perSync {
					t.Errorf("a sync serves %.1f writes, want %.1f", got, c.perSync)
				}
				if got := waited / time.Duration(total); got > c.perWriteMax {
					t.Errorf("a write waits %v, at most %v are right", got, c.perWriteMax)
				}
			})
		})
	}
}
