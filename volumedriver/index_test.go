package volumedriver

import (
	"testing"

	"pgregory.net/rapid"

	"varve/volumedriver/writelog"
)

// TestIndexAgainstModel compares the index with a plain map of block -> newest sequence number and kind.
func TestIndexAgainstModel(t *testing.T) {
	const span = 8 * leafBlocks
	rapid.Check(t, func(t *rapid.T) {
		var x index
		type state struct {
			seq  uint64
			zero bool
		}
		model := make(map[uint64]state)
		seq := uint64(0)
		for range rapid.IntRange(1, 60).Draw(t, "ops") {
			seq++
			lba := rapid.Uint64Range(0, span-1).Draw(t, "lba")
			switch rapid.IntRange(0, 3).Draw(t, "op") {
			case 0, 1:
				n := rapid.Uint64Range(1, min(64, span-lba)).Draw(t, "n")
				x.put(lba, writelog.Loc(seq<<20), seq, make([]uint32, n), 0)
				for b := lba; b < lba+n; b++ {
					model[b] = state{seq, false}
				}
			case 2:
				n := rapid.Uint64Range(1, span-lba).Draw(t, "n")
				x.zero(lba, n, seq)
				for b := lba; b < lba+n; b++ {
					model[b] = state{seq, true}
				}
			case 3: // an SCO up to some record was installed
				upto := rapid.Uint64Range(1, seq).Draw(t, "upto")
				for b, s := range model {
					if s.seq <= upto {
						if w, ok := x.data[b]; ok && w.seq <= upto {
							x.remove(b)
						}
						delete(model, b)
					}
				}
				x.forgetZeros(upto)
			}
		}
		for b := range uint64(span) {
			want, ok := model[b]
			w, in := x.data[b]
			if !in {
				if z, zero := x.zeroAt(b); zero {
					w, in = where{seq: z.seq, zero: true}, true
				}
			}
			if ok != in || ok && (w.seq != want.seq || w.zero != want.zero) {
				t.Fatalf("block %d: index %v %+v, model %v %+v", b, in, w, ok, want)
			}
			if next := x.nextEvent(b, span); in && next > b {
				t.Fatalf("block %d is indexed, but the next event is %d", b, next)
			}
		}
		counts := make(map[uint64]uint16)
		for b := range x.data {
			counts[b/leafBlocks]++
		}
		for leaf := range uint64(span / leafBlocks) {
			if x.leaves.count[leaf] != counts[leaf] {
				t.Fatalf("leaf %d: %d counted, %d there", leaf, x.leaves.count[leaf], counts[leaf])
			}
			next, ok := x.leaves.next(leaf)
			want, found := leaf, false
			for ; want < span/leafBlocks; want++ {
				if counts[want] > 0 {
					found = true
					break
				}
			}
			if ok != found || ok && next != want {
				t.Fatalf("next leaf from %d: %d %v, want %d %v", leaf, next, ok, want, found)
			}
		}
	})
}

// TestRecordQueue checks order, payload count and dropping across chunks.
func TestRecordQueue(t *testing.T) {
	var q recordQueue
	const n = 3*queueChunk + 7
	for i := uint64(1); i <= n; i++ {
		q.push(&writelog.Logged{Record: writelog.Record{Seq: i, Kind: writelog.Data, Blocks: 1}, CRC: []uint32{uint32(i)}}, 0)
	}
	for _, drop := range []uint64{0, 5, queueChunk, queueChunk + 1, 2 * queueChunk, n - 1, n} {
		q.drop(drop)
		if want := int64(n-drop) * blockSize; q.bytes != want {
			t.Fatalf("after drop %d: %d bytes, want %d", drop, q.bytes, want)
		}
		next := drop + 1
		q.after(0, func(r *record) bool {
			if r.seq != next || r.crcOf(0) != uint32(next) {
				t.Fatalf("after drop %d: record %d, want %d", drop, r.seq, next)
			}
			next++
			return true
		})
		if next != n+1 {
			t.Fatalf("after drop %d: records end at %d", drop, next-1)
		}
	}
	if _, ok := q.oldest(); ok || q.chunks != nil {
		t.Fatal("the empty queue keeps chunks")
	}
}

// TestPaceRate: no limit while the log is half empty, then never faster when fuller, the drain rate at the steep point.
func TestPaceRate(t *testing.T) {
	const drain = 100 << 20
	if r := paceRate(0.5, drain); r != 0 {
		t.Errorf("limited to %g at half occupancy", r)
	}
	last := paceRate(0.51, drain)
	for o := 0.52; o <= 1.0; o += 0.01 {
		r := paceRate(o, drain)
		if r > last || r <= 0 {
			t.Errorf("rate %g at %g after %g", r, o, last)
		}
		last = r
	}
	if r := paceRate(paceSteep, drain); r < drain*0.999 || r > drain*1.001 {
		t.Errorf("rate %g at the steep point, want the drain rate", r)
	}
	if r := paceRate(1, 0); r < paceFloor {
		t.Errorf("rate %g when nothing drains: below the floor", r)
	}
}
