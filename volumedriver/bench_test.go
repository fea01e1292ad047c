package volumedriver

import (
	"context"
	"math/rand/v2"
	"testing"

	"varve/volumedriver/backend/local"
	"varve/volumedriver/blockio"
	"varve/volumedriver/vfs"
)

// benchVolume is a volume of size bytes on the real file system, with everything running.
func benchVolume(b *testing.B, size int64) *Volume {
	dir := b.TempDir()
	d, err := Open(Config{FS: vfs.OS(), Dir: dir + "/data", LogBytes: 1 << 30})
	must(b, err)
	store, err := local.Open(vfs.OS(), dir+"/backend")
	must(b, err)
	d.AddPool(testPool, store)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	b.Cleanup(func() {
		cancel()
		must(b, <-ended)
		must(b, d.Close())
	})
	v, err := d.Create(ctx, Spec{ID: testVolume, Pool: testPool, Epoch: 1, Size: size, PoolName: "default", Path: "d.raw", Kind: "disk"})
	must(b, err)
	return v
}

// BenchmarkWrite4K submits bursts of 16 random writes.
func BenchmarkWrite4K(b *testing.B) {
	v := benchVolume(b, 1<<30)
	p := block(1)
	c := &completion{func(error) {}}
	b.SetBytes(blockSize)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		off := rand.Int64N(1<<18) * blockSize
		if v.TryWrite(p, off, 0, c, 0) != nil {
			must(b, v.Write(context.Background(), p, off, 0))
		}
		if i%16 == 15 {
			v.Kick()
		}
	}
	v.Kick()
}

// BenchmarkWriteFlush4K writes and flushes one block at a time.
func BenchmarkWriteFlush4K(b *testing.B) {
	v := benchVolume(b, 1<<30)
	p := block(1)
	c := &completion{func(error) {}}
	b.SetBytes(blockSize)
	for b.Loop() {
		off := rand.Int64N(1<<18) * blockSize
		if v.TryWrite(p, off, 0, c, 0) != nil {
			must(b, v.Write(context.Background(), p, off, 0))
		}
		v.Kick()
		must(b, v.FlushInline())
	}
}

// BenchmarkWrite1M writes in sequence, round and round.
func BenchmarkWrite1M(b *testing.B) {
	v := benchVolume(b, 1<<30)
	p := make([]byte, 1<<20)
	c := &completion{func(error) {}}
	b.SetBytes(1 << 20)
	for i := int64(0); b.Loop(); i++ {
		off := i % 1024 << 20
		stampBlock(p[:blockSize], uint64(i))
		if v.TryWrite(p, off, 0, c, 0) != nil {
			must(b, v.Write(context.Background(), p, off, 0))
		}
		v.Kick()
	}
}

// BenchmarkRead4K reads at random what is in the log, or in objects.
func BenchmarkRead4K(b *testing.B) {
	for _, drained := range []bool{false, true} {
		b.Run(map[bool]string{false: "log", true: "objects"}[drained], func(b *testing.B) {
			v := benchVolume(b, 1<<30)
			p := make([]byte, 1<<20)
			for i := range int64(256) {
				must(b, v.Write(context.Background(), p, i<<20, 0))
			}
			if drained {
				must(b, v.d.Drain(context.Background()))
			}
			b.SetBytes(blockSize)
			b.ReportAllocs()
			busy := 0
			for b.Loop() {
				off := rand.Int64N(1<<16) * blockSize
				if err := v.TryRead(p[:blockSize], off); err != nil {
					if err != blockio.ErrBusy {
						b.Fatal(err)
					}
					busy++
					must(b, v.Read(context.Background(), p[:blockSize], off))
				}
			}
			b.ReportMetric(float64(busy)/float64(b.N), "busy/op")
		})
	}
}
