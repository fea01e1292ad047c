package volumedriver

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"varve/volumedriver/writelog"
)

// fakeLog has at each block its location, in every segment.
type fakeLog struct {
	blocks int // of a segment
	calls  int
	fail   error
}

func (l *fakeLog) ReadAt(p []byte, loc writelog.Loc) error {
	l.calls++
	if int(uint32(loc))+len(p)/blockSize > l.blocks {
		return errors.New("beyond the segment")
	}
	for i := range len(p) / blockSize {
		binary.LittleEndian.PutUint64(p[i*blockSize:], uint64(loc.Add(uint32(i))))
	}
	return l.fail
}

// TestReadLogged: whatever the runs, each gets its own blocks, and few calls are made for what lies together.
func TestReadLogged(t *testing.T) {
	const segment = 1 << 14
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(1, seed))
		var reads []logRead
		var want []writelog.Loc
		for gen := range uint64(3) {
			gap := 1 + rng.IntN(6)
			for at := 1 + rng.IntN(4); at < segment; {
				n := min(1+rng.IntN(1+rng.IntN(300)), segment-at)
				reads = append(reads, logRead{writelog.Loc(gen<<32 | uint64(at)), make([]byte, n*blockSize)})
				at += n + rng.IntN(gap)
				if rng.IntN(4) == 0 {
					at += rng.IntN(2000)
				}
			}
		}
		rng.Shuffle(len(reads), func(i, j int) { reads[i], reads[j] = reads[j], reads[i] })
		for _, r := range reads {
			want = append(want, r.loc)
		}
		kept := append([]logRead(nil), reads...)
		if err := readLogged(&fakeLog{blocks: segment}, reads); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		for i, r := range kept {
			for k := range len(r.dst) / blockSize {
				if got := writelog.Loc(binary.LittleEndian.Uint64(r.dst[k*blockSize:])); got != want[i].Add(uint32(k)) {
					t.Fatalf("seed %d: run at %#x: block %d is that at %#x", seed, want[i], k, got)
				}
			}
		}
	}
	// 4 KiB writes of which every eighth block is a batch header.
	var reads []logRead
	for at := range 4096 {
		if at%8 != 0 {
			reads = append(reads, logRead{writelog.Loc(at), make([]byte, blockSize)})
		}
	}
	l := &fakeLog{blocks: 4096}
	if err := readLogged(l, reads); err != nil || l.calls > 4096*blockSize/logWindow+1 {
		t.Errorf("%d calls for %d blocks that lie together, %v", l.calls, len(reads), err)
	}
	l.fail = writelog.ErrStale
	if err := readLogged(l, reads); !errors.Is(err, writelog.ErrStale) {
		t.Errorf("a stale read gives %v", err)
	}
}
