package volumedriver

import (
	"testing"

	"github.com/google/uuid"

	"varve/volumedriver/sco"
)

// TestNewestChain: which SCOs make up a volume, after holes and changes of owner.
func TestNewestChain(t *testing.T) {
	id := uuid.New()
	type s struct{ epoch, seq, prevEpoch, prevSeq, first, last uint64 }
	for _, c := range []struct {
		name string
		have []s
		want []scoID
	}{
		{"nothing", nil, nil},
		{"one", []s{{1, 1, 0, 0, 0, 5}}, []scoID{{1, 1}}},
		{"a hole ends it", []s{{1, 1, 0, 0, 0, 5}, {1, 2, 1, 1, 5, 9}, {1, 4, 1, 3, 12, 20}}, []scoID{{1, 1}, {1, 2}}},
		{"the first is missing", []s{{1, 2, 1, 1, 5, 9}}, nil},
		{"late object of a replaced owner", []s{{1, 1, 0, 0, 0, 5}, {1, 2, 1, 1, 5, 9}, {1, 3, 1, 2, 9, 11}, {2, 513, 1, 2, 9, 10}},
			[]scoID{{1, 1}, {1, 2}, {2, 513}}},
		{"numbers skipped after a crash", []s{{1, 1, 0, 0, 0, 5}, {1, 513, 1, 1, 5, 6}}, []scoID{{1, 1}, {1, 513}}},
		{"new owner's first object missing", []s{{1, 1, 0, 0, 0, 5}, {1, 2, 1, 1, 5, 9}, {2, 600, 2, 599, 12, 13}}, []scoID{{1, 1}, {1, 2}}},
		{"log sequences do not meet", []s{{1, 1, 0, 0, 0, 5}, {1, 2, 1, 1, 6, 9}}, []scoID{{1, 1}}},
	} {
		headers := make(map[scoID]*sco.Header)
		for _, x := range c.have {
			headers[scoID{x.epoch, x.seq}] = &sco.Header{Volume: id, Epoch: x.epoch, Seq: x.seq, PrevEpoch: x.prevEpoch, PrevSeq: x.prevSeq,
				FirstLog: x.first, LastLog: x.last}
		}
		got := newestChain(headers)
		ok := len(got) == len(c.want)
		for i := range min(len(got), len(c.want)) {
			ok = ok && c.want[i] == scoID{got[i].Epoch, got[i].Seq}
		}
		if !ok {
			t.Errorf("%s: %d objects, want %v", c.name, len(got), c.want)
		}
	}
}
