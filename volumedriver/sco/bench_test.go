package sco

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"varve/volumedriver/seal"
)

// data of the benchmarks: text-like, three quarters zeros (a file system with small files), random.
var benchData = []struct {
	name string
	kind func(i int) int
}{
	{"text", func(int) int { return 1 }},
	{"zeros", func(i int) int { return []int{0, 0, 0, 1}[i%4] }},
	{"random", func(int) int { return 3 }},
}

func benchBuilder(b *testing.B, o Options, kind func(int) int, gap uint64) *Builder {
	builder := New(Header{Volume: volume, Seq: 1, LastLog: 1}, MaxBlocks, o)
	for i := range uint64(MaxBlocks) {
		p, err := builder.Reserve(i*gap, []uint32{0})
		if err != nil {
			b.Fatal(err)
		}
		builder.h.CRC[i] = fill(p, kind(int(i)), i)
	}
	return builder
}

func benchOptions(b *testing.B) map[string]Options {
	key := newKey(b)
	return map[string]Options{"none": {}, "s2": {Codec: S2}, "zstd": {Codec: Zstd}, "gcm": {Key: key}, "s2+gcm": {Codec: S2, Key: key}}
}

// BenchmarkPack builds 16 MiB.
func BenchmarkPack(b *testing.B) {
	options := benchOptions(b)
	for _, name := range []string{"none", "s2", "gcm", "s2+gcm", "zstd"} {
		for _, d := range benchData {
			b.Run(name+"/"+d.name, func(b *testing.B) {
				builder := benchBuilder(b, options[name], d.kind, 1)
				size := 0
				b.SetBytes(MaxBlocks * bs)
				b.ReportAllocs()
				for b.Loop() {
					parts, err := builder.Finish()
					if err != nil {
						b.Fatal(err)
					}
					size = len(parts[0]) + len(parts[1]) + len(parts[2])
				}
				b.ReportMetric(float64(size)/(MaxBlocks*bs), "size")
			})
		}
	}
}

// BenchmarkRead reads one block, or 1 MiB, from memory and checks it.
func BenchmarkRead(b *testing.B) {
	options := benchOptions(b)
	for _, name := range []string{"none", "s2", "gcm", "s2+gcm", "zstd"} {
		for _, blocks := range []int{1, 256} {
			b.Run(fmt.Sprintf("%s/%dK", name, blocks*4), func(b *testing.B) {
				builder := benchBuilder(b, options[name], benchData[0].kind, 2)
				parts, err := builder.Finish()
				if err != nil {
					b.Fatal(err)
				}
				object := bytes.Join(parts, nil)
				table := builder.Header().Table()
				p := make([]byte, blocks*bs)
				b.SetBytes(int64(len(p)))
				b.ReportAllocs()
				at := uint32(0)
				for b.Loop() {
					at = (at + 1009) % uint32(MaxBlocks-blocks)
					if err := table.Read(p, at, func(p []byte, off int64) error { copy(p, object[off:]); return nil }); err != nil {
						b.Fatal(err)
					}
					for i := range blocks {
						if crc, _ := table.CRCOf(at + uint32(i)); Checksum(p[i*bs:(i+1)*bs]) != crc {
							b.Fatal("wrong bytes")
						}
					}
				}
			})
		}
	}
}

// BenchmarkLooksRandom is what a frame that is not compressed costs with a codec.
func BenchmarkLooksRandom(b *testing.B) {
	p := make([]byte, frameBytes)
	for i := range MaxFrameBlocks {
		fill(p[i*bs:(i+1)*bs], 3, uint64(i))
	}
	b.SetBytes(frameBytes)
	for b.Loop() {
		if !looksRandom(p) {
			b.Fatal("not random")
		}
	}
}

// BenchmarkParse reads a header with 4096 extents.
func BenchmarkParse(b *testing.B) {
	options := benchOptions(b)
	for _, name := range []string{"none", "s2+gcm"} {
		b.Run(name, func(b *testing.B) {
			builder := benchBuilder(b, options[name], benchData[0].kind, 2)
			parts, err := builder.Finish()
			if err != nil {
				b.Fatal(err)
			}
			ring := &seal.Ring{}
			if k := options[name].Key; k != nil {
				ring.Add(k)
			}
			b.ReportAllocs()
			for b.Loop() {
				h, err := Parse(parts[0], ring)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(h.Table().Bytes())/MaxBlocks, "B/block")
			}
		})
	}
}

// BenchmarkFrameSize shows what the size of a frame costs: space, building, and reading one block.
func BenchmarkFrameSize(b *testing.B) {
	options := benchOptions(b)
	for _, name := range []string{"s2", "gcm", "zstd"} {
		for _, blocks := range []int{1, 2, 4, 8, 16} {
			o := options[name]
			o.FrameBlocks = blocks
			b.Run(fmt.Sprintf("%s/%dK", name, blocks*4), func(b *testing.B) {
				builder := benchBuilder(b, o, benchData[0].kind, 1)
				start := time.Now()
				parts, err := builder.Finish()
				if err != nil {
					b.Fatal(err)
				}
				pack := time.Since(start)
				object := bytes.Join(parts, nil)
				table := builder.Header().Table()
				p := make([]byte, bs)
				at := uint32(0)
				for b.Loop() {
					at = (at + 1009) % MaxBlocks
					if err := table.Read(p, at, func(p []byte, off int64) error { copy(p, object[off:]); return nil }); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(len(object))/(MaxBlocks*bs), "size")
				b.ReportMetric(MaxBlocks*bs/1e6/pack.Seconds(), "packMB/s")
			})
		}
	}
}

// BenchmarkLBA looks up the address and the checksum of one block, as every read does, in an object of single blocks written
// at random, and tells the size of its table.
func BenchmarkLBA(b *testing.B) {
	for _, gap := range []uint64{1, 65536} {
		b.Run(fmt.Sprintf("gap-%d", gap), func(b *testing.B) {
			builder := benchBuilder(b, Options{}, benchData[0].kind, gap)
			if _, err := builder.Finish(); err != nil {
				b.Fatal(err)
			}
			table := builder.Header().Table()
			x := uint32(0)
			for b.Loop() {
				x = (x + 1009) % MaxBlocks
				if lba, _, ok := table.Block(x); !ok || lba != uint64(x)*gap {
					b.Fatal(lba)
				}
			}
			b.ReportMetric(float64(table.Bytes())/MaxBlocks, "B/block")
		})
	}
}
