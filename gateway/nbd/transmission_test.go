package nbd

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

func pattern(seed uint64, n int) []byte {
	p := make([]byte, n)
	r := rand.NewPCG(seed, 1)
	for i := 0; i+8 <= n; i += 8 {
		v := r.Uint64()
		for j := range 8 {
			p[i+j] = byte(v >> (8 * j))
		}
	}
	return p
}

func TestReadWriteFlush(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		for _, structured := range []bool{false, true} {
			m := newMemory(64 << 20)
			_, addr, _ := listen(t, network, Config{Exports: newExports(map[string]Device{"d": m})})
			c := attach(t, addr, "d", structured)
			if c.size != 64<<20 {
				t.Fatalf("size %d", c.size)
			}
			data := pattern(1, 1<<20)
			c.pwrite(0, data)
			if !bytes.Equal(c.pread(0, 1<<20), data) {
				t.Fatal("1 MiB differs")
			}
			c.pwrite(1537, bytes.Repeat([]byte("Q"), 777))
			want := cat(data[1536:1537], bytes.Repeat([]byte("Q"), 777), data[1537+777:1537+778])
			if !bytes.Equal(c.pread(1536, 779), want) {
				t.Fatal("unaligned write differs")
			}
			big := pattern(2, 32<<20)
			c.pwrite(8<<20, big)
			if !bytes.Equal(c.pread(8<<20, 32<<20), big) {
				t.Fatal("32 MiB differ")
			}
			c.ok(cmdFlush, 0, 0, 0, nil)
			c.ok(cmdFlush, 0, 0, 0, nil)
			if n := m.flushCount(); n < 2 {
				t.Fatalf("%d flushes", n)
			}
			c.request(cmdDisc, 0, 1, 0, 0, nil)
			c.closed()
		}
	}
}
