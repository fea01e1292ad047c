package stamp

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
)

// image is a volume in memory.
type image []byte

func newImage(blocks int) image { return make(image, blocks*BlockSize) }

func (v image) read(p []byte, lba uint64) error {
	if n := copy(p, v[lba*BlockSize:]); n != len(p) {
		return io.ErrUnexpectedEOF
	}
	return nil
}

func (v image) block(lba uint64) []byte { return v[lba*BlockSize:][:BlockSize] }

// history is an oracle with what its operations do.
type history struct {
	*Oracle
	blocks int
	does   []func(image)
}

func newHistory(blocks int) *history {
	return &history{Oracle: NewOracle(vol, uint64(blocks)), blocks: blocks}
}

func (h *history) write(lba uint64, blocks int) uint64 {
	p := make([]byte, blocks*BlockSize)
	seq := h.Write(1, lba, p)
	h.does = append(h.does, func(v image) { copy(v[lba*BlockSize:], p) })
	return seq
}

func (h *history) zero(kind Kind, lba uint64, blocks int) uint64 {
	seq := h.Zero(kind, 1, lba, uint64(blocks))
	h.does = append(h.does, func(v image) { clear(v[lba*BlockSize:][:blocks*BlockSize]) })
	return seq
}

// at gives the image after k operations.
func (h *history) at(k uint64) image {
	v := newImage(h.blocks)
	for _, do := range h.does[:k] {
		do(v)
	}
	return v
}

func wantViolation(t *testing.T, err error, kind string, lba uint64) {
	t.Helper()
	var v *Violation
	if !errors.As(err, &v) || v.Kind != kind || v.LBA != lba {
		t.Errorf("got %v, want %q at block %d", err, kind, lba)
	} else {
		t.Log(v)
	}
}

// standard is: 1 write 0-3, 2 write 1, 3 trim 2-3, 4 write 5, 5 write 0, 6 trim 5; all acknowledged, flushed after 4.
func standard() *history {
	h := newHistory(8)
	h.Acked(h.write(0, 4))
	h.Acked(h.write(1, 1))
	h.Acked(h.zero(Trim, 2, 2))
	h.Acked(h.write(5, 1))
	f := h.FlushBegin()
	h.Acked(h.write(0, 1))
	h.FlushDone(f)
	h.Acked(h.zero(WriteZeroes, 5, 1))
	return h
}

func TestPrefixAccepted(t *testing.T) {
	h := standard()
	for k := uint64(4); k <= 6; k++ {
		if got, err := h.CheckPrefix(h.Mark(), h.at(k).read); err != nil || got != k {
			t.Errorf("prefix %d: %d, %v", k, got, err)
		}
	}
	if got, err := h.CheckPrefix(h.Mark().Killed(), h.at(6).read); err != nil || got != 6 {
		t.Errorf("after a kill: %d, %v", got, err)
	}
}

func TestPlantedViolations(t *testing.T) {
	h := standard()
	m := h.Mark()
	prefix := func(change func(image)) error {
		v := h.at(6)
		change(v)
		_, err := h.CheckPrefix(m, v.read)
		return err
	}
	copyFrom := func(k, lba uint64) func(image) {
		return func(v image) { copy(v.block(lba), h.at(k).block(lba)) }
	}
	_, err := h.CheckPrefix(m, h.at(3).read) // were it not for block 0, op 6 might have zeroed block 5
	wantViolation(t, err, Inexact, 5)
	_, err = h.CheckPrefix(m, h.at(0).read)
	wantViolation(t, err, LostDurable, 0)
	_, err = h.CheckPrefix(m.Killed(), h.at(5).read)
	wantViolation(t, err, Resurrected, 5)
	wantViolation(t, prefix(copyFrom(1, 1)), LostDurable, 1)
	wantViolation(t, prefix(copyFrom(0, 1)), LostDurable, 1)
	wantViolation(t, prefix(copyFrom(1, 2)), Resurrected, 2)
	wantViolation(t, prefix(func(v image) { copy(v.block(1)[512:1024], h.at(1).block(1)[512:]) }), Damaged, 1)
	wantViolation(t, prefix(func(v image) { v[100] ^= 1 }), Damaged, 0)
	wantViolation(t, prefix(func(v image) { clear(v[:BlockSize/2]) }), Damaged, 0)
	wantViolation(t, prefix(func(v image) { copy(v.block(7), v.block(1)) }), Displaced, 7)
	wantViolation(t, prefix(func(v image) { Stamp{other, 1, 1, 2}.Fill(v.block(1)) }), Displaced, 1)
	wantViolation(t, prefix(func(v image) { Stamp{vol, 1, 1, 9}.Fill(v.block(1)) }), Unwritten, 1)
	wantViolation(t, prefix(func(v image) { Stamp{vol, 7, 1, 2}.Fill(v.block(7)) }), Unwritten, 7)
	wantViolation(t, prefix(func(v image) { Stamp{vol, 2, 1, 3}.Fill(v.block(2)) }), Unwritten, 2)
	wantViolation(t, prefix(func(v image) { Stamp{vol, 1, 2, 2}.Fill(v.block(1)) }), Unwritten, 1)

	early := m
	early.Ops = 4
	_, err = h.CheckPrefix(early, h.at(5).read)
	wantViolation(t, err, Unwritten, 0)
	_, err = h.CheckPrefix(m, func([]byte, uint64) error { return io.ErrClosedPipe })
	if !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("failing read: %v", err)
	}

	// Nothing is durable here, so a missing write is a hole.
	h = newHistory(8)
	h.write(0, 1)
	h.write(1, 1)
	h.zero(Trim, 0, 1)
	h.write(2, 1)
	v := h.at(4)
	clear(v.block(1))
	_, err = h.CheckPrefix(h.Mark(), v.read)
	wantViolation(t, err, Hole, 1)
	v = h.at(4)
	copy(v.block(0), h.at(1).block(0))
	_, err = h.CheckPrefix(h.Mark(), v.read)
	wantViolation(t, err, Resurrected, 0)
}

// TestTrimsAtTheEnd: zeros fit several prefixes, and each pair of blocks may agree where all three do not.
func TestTrimsAtTheEnd(t *testing.T) {
	h := newHistory(3)
	h.write(0, 1)      // 1
	h.write(1, 1)      // 2
	h.zero(Trim, 0, 1) // 3
	h.write(2, 1)      // 4
	h.zero(Trim, 1, 1) // 5
	h.zero(Trim, 2, 1) // 6
	for k, want := range []uint64{0, 1, 2, 3, 4, 5, 0} {
		got, err := h.CheckPrefix(h.Mark(), h.at(uint64(k)).read)
		if err != nil || got != want {
			t.Errorf("prefix %d: %d, %v", k, got, err)
		}
	}
	h.AckedDurable(1)
	if got, err := h.CheckPrefix(h.Mark(), h.at(6).read); err != nil || got != 6 {
		t.Errorf("all trimmed with op 1 durable: %d, %v", got, err)
	}
	h.AckedDurable(6)
	_, err := h.CheckPrefix(h.Mark(), h.at(5).read)
	wantViolation(t, err, Resurrected, 2)

	h = newHistory(2)
	h.write(0, 1)      // 1
	h.zero(Trim, 0, 1) // 2: block 0 is zero in 0, 2, 3, 4
	h.write(1, 1)      // 3
	h.zero(Trim, 1, 1) // 4: block 1 is zero in 0, 1, 2, 4
	m := h.Mark()
	m.Required, m.Ops = 1, 3
	if got, err := h.CheckPrefix(m, newImage(2).read); err != nil || got != 2 {
		t.Errorf("both zero: %d, %v", got, err)
	}
	m.Required = 3
	_, err = h.CheckPrefix(m, newImage(2).read)
	wantViolation(t, err, LostDurable, 1)
}

func TestNoPrefixFits(t *testing.T) {
	h := newHistory(2)
	h.write(0, 1)      // 1: zero before
	h.zero(Trim, 0, 1) // 2
	h.write(0, 1)      // 3: block 0 is zero in 0 and 2
	h.write(1, 1)      // 4
	h.zero(Trim, 1, 1) // 5
	m := h.Mark()
	m.Required = 1 // block 0 zero: 2; block 1 zero: 0-3, 5
	if got, err := h.CheckPrefix(m, newImage(2).read); err != nil || got != 2 {
		t.Errorf("both zero: %d, %v", got, err)
	}
	h = newHistory(2)
	h.write(0, 2)      // 1
	h.zero(Trim, 0, 1) // 2: block 0 is zero in 2 only
	h.write(0, 1)      // 3
	h.zero(Trim, 1, 1) // 4: block 1 is zero from 4 on
	m = h.Mark()
	m.Required = 1
	_, err := h.CheckPrefix(m, newImage(2).read)
	wantViolation(t, err, Inexact, 1)
}

func TestFailedAndUnknown(t *testing.T) {
	h := newHistory(4)
	h.Acked(h.write(0, 1))
	h.Failed(h.write(0, 1))
	h.Unknown(h.write(1, 1))
	h.AckedDurable(h.write(2, 1))
	apply := func(which ...int) image {
		v := newImage(4)
		for _, i := range which {
			h.does[i-1](v)
		}
		return v
	}
	for _, ok := range [][]int{{1, 4}, {1, 3, 4}} {
		if got, err := h.CheckPrefix(h.Mark(), apply(ok...).read); err != nil || got != 4 {
			t.Errorf("ops %v: %d, %v", ok, got, err)
		}
	}
	_, err := h.CheckPrefix(h.Mark(), apply(1, 2, 4).read)
	wantViolation(t, err, Resurrected, 0)
	wantViolation(t, h.CheckBlocks(h.Mark(), apply(1, 2, 4).read), Resurrected, 0)
}

func TestRebase(t *testing.T) {
	h := newHistory(4)
	h.AckedDurable(h.write(0, 1))
	h.Acked(h.write(1, 1))
	h.Acked(h.write(2, 1))
	h.Acked(h.write(1, 1))
	k, err := h.CheckPrefix(h.Mark(), h.at(2).read)
	if k != 2 || err != nil {
		t.Fatalf("prefix %d, %v", k, err)
	}
	branch := h.Clone()
	h.Rebase(2)
	lost := h.does[2]
	h.does[2], h.does[3] = func(image) {}, func(image) {}
	h.AckedDurable(h.write(3, 1))
	if k, err := h.CheckPrefix(h.Mark(), h.at(5).read); k != 5 || err != nil {
		t.Errorf("after the restart: %d, %v", k, err)
	}
	v := h.at(5)
	lost(v)
	_, err = h.CheckPrefix(h.Mark(), v.read)
	wantViolation(t, err, Resurrected, 2)
	_, err = h.CheckPrefix(h.Mark(), h.at(1).read)
	wantViolation(t, err, LostDurable, 1)
	v = h.at(2)
	lost(v)
	if k, err := branch.CheckPrefix(branch.Mark(), v.read); k != 3 || err != nil {
		t.Errorf("the clone knows of the restart: %d, %v", k, err)
	}
}

// TestAgainstBruteForce makes images of blocks from random prefixes, and compares the verdict with trying all prefixes.
func TestAgainstBruteForce(t *testing.T) {
	accepted, refused := 0, 0
	for seed := range uint64(2000) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		const blocks = 4
		h := newHistory(blocks)
		for range 1 + rnd.IntN(8) {
			lba := rnd.IntN(blocks)
			n := 1 + rnd.IntN(blocks-lba)
			var seq uint64
			if rnd.IntN(2) == 0 {
				seq = h.write(uint64(lba), n)
			} else {
				seq = h.zero(Trim, uint64(lba), n)
			}
			switch rnd.IntN(6) {
			case 0:
				h.AckedDurable(seq)
			case 1:
				h.Acked(seq)
				h.FlushDone(h.FlushBegin())
			default:
				h.Acked(seq)
			}
		}
		m := h.Mark()
		if rnd.IntN(2) == 0 {
			m.Required = rnd.Uint64N(m.Ops + 1)
		}
		images := make([]image, m.Ops+1)
		for k := range images {
			images[k] = h.at(uint64(k))
		}
		v := bytes.Clone(images[rnd.IntN(len(images))])
		if rnd.IntN(2) == 0 {
			for range 1 + rnd.IntN(2) {
				lba := rnd.Uint64N(blocks)
				copy(image(v).block(lba), images[rnd.IntN(len(images))].block(lba))
			}
		}
		want := slices.IndexFunc(images[m.Required:], func(w image) bool { return bytes.Equal(w, v) })
		got, err := h.CheckPrefix(m, image(v).read)
		switch {
		case want < 0 && err == nil:
			t.Fatalf("seed %d: an image that is no prefix was taken for prefix %d", seed, got)
		case want >= 0 && (err != nil || got != m.Required+uint64(want)):
			t.Fatalf("seed %d: prefix %d was taken for %d, %v", seed, m.Required+uint64(want), got, err)
		}
		if want >= 0 {
			accepted++
		} else {
			refused++
		}
	}
	if accepted < 300 || refused < 300 {
		t.Errorf("%d accepted, %d refused", accepted, refused)
	}
}

func TestConcurrentMode(t *testing.T) {
	const writers, stripe = 4, 8
	h := NewOracle(vol, writers*stripe)
	v := newImage(writers * stripe)
	var mu sync.Mutex // of v
	var wg sync.WaitGroup
	for w := range uint32(writers) {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 1))
			for i := range 200 {
				lba := uint64(w)*stripe + rnd.Uint64N(stripe)
				p := make([]byte, BlockSize)
				var seq uint64
				if rnd.IntN(5) == 0 {
					seq = h.Zero(Trim, w, lba, 1)
				} else {
					seq = h.Write(w, lba, p)
				}
				mu.Lock()
				copy(v.block(lba), p)
				mu.Unlock()
				if i%10 == 0 {
					h.AckedDurable(seq)
				} else {
					h.Acked(seq)
				}
				if i%20 == 0 {
					h.FlushDone(h.FlushBegin())
				}
				if i%40 == 0 {
					mu.Lock()
					err := h.CheckBlocks(h.Mark(), v.read)
					mu.Unlock()
					if err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if err := h.CheckBlocks(h.Mark().Killed(), v.read); err != nil {
		t.Error(err)
	}
}

func TestConcurrentViolations(t *testing.T) {
	h := standard()
	m := h.Mark()
	blocks := func(change func(image)) error {
		v := h.at(6)
		change(v)
		return h.CheckBlocks(m, v.read)
	}
	copyFrom := func(k, lba uint64) func(image) {
		return func(v image) { copy(v.block(lba), h.at(k).block(lba)) }
	}
	for _, fine := range []error{blocks(func(image) {}), blocks(copyFrom(4, 0)), blocks(copyFrom(4, 5))} {
		if fine != nil {
			t.Error(fine)
		}
	}
	wantViolation(t, blocks(copyFrom(1, 1)), LostDurable, 1)
	wantViolation(t, blocks(copyFrom(0, 1)), LostDurable, 1)
	wantViolation(t, blocks(copyFrom(1, 3)), Resurrected, 3)
	wantViolation(t, blocks(func(v image) { clear(v.block(0)[:512]) }), Damaged, 0)
	wantViolation(t, blocks(func(v image) { copy(v.block(6), v.block(0)) }), Displaced, 6)
	wantViolation(t, blocks(func(v image) { Stamp{vol, 0, 1, 7}.Fill(v.block(0)) }), Unwritten, 0)
	wantViolation(t, h.CheckBlocks(m.Killed(), h.at(4).read), LostDurable, 0)

	// After a restart that found block 0 as of op 1 and block 5 zeroed, neither op 5 nor op 4 may come back.
	v := h.at(6)
	copyFrom(1, 0)(v)
	if err := h.Settle(m, v.read); err != nil {
		t.Fatal(err)
	}
	if err := h.CheckBlocks(h.Mark(), v.read); err != nil {
		t.Error(err)
	}
	wantViolation(t, h.CheckBlocks(h.Mark(), h.at(6).read), Resurrected, 0)
	back := bytes.Clone(v)
	copyFrom(4, 5)(back)
	wantViolation(t, h.CheckBlocks(h.Mark(), image(back).read), Resurrected, 5)
	older := bytes.Clone(v)
	clear(image(older).block(0))
	wantViolation(t, h.CheckBlocks(h.Mark(), image(older).read), LostDurable, 0)
	h.Acked(h.write(0, 1))
	h.does[6](v)
	if err := h.CheckBlocks(h.Mark(), v.read); err != nil {
		t.Error(err)
	}
}

func TestJournal(t *testing.T) {
	var text bytes.Buffer
	h := newHistory(8)
	if err := h.RecordTo(&text); err != nil {
		t.Fatal(err)
	}
	h.Acked(h.write(0, 4))
	h.AckedDurable(h.write(1, 1))
	h.Acked(h.zero(Trim, 2, 2))
	f := h.FlushBegin()
	h.Failed(h.write(0, 1))
	h.FlushDone(f)
	h.Unknown(h.zero(WriteZeroes, 5, 1))
	h.Acked(h.write(6, 1))

	// The process that wrote it is killed in the middle of a line.
	again, err := ReadJournal(strings.NewReader(text.String() + "invoke 7 wri"))
	if err != nil {
		t.Fatal(err)
	}
	if again.Mark() != h.Mark() || fmt.Sprint(again.ops) != fmt.Sprint(h.ops) {
		t.Errorf("read back: %+v, want %+v", again.Mark(), h.Mark())
	}
	_, err = again.CheckPrefix(again.Mark(), h.at(2).read)
	wantViolation(t, err, Resurrected, 2)

	// It goes on with the journal after a restart.
	h.Rebase(5)
	k, err := ReadJournal(&text)
	if err != nil || k.Mark() != h.Mark() || k.ops[5].fate != dropped {
		t.Errorf("after a restart: %+v, %v", k, err)
	}
	for _, bad := range []string{"", "volume", "volume x 1\n", "volume " + vol.String() + " 1\nok 1\n",
		"volume " + vol.String() + " 1\ninvoke 2 write 0 0 1\n", "volume " + vol.String() + " 1\ninvoke 1 erase 0 0 1\n",
		"volume " + vol.String() + " 1\nsettle 1 1\n", "volume " + vol.String() + " 1\nwhat 1\n",
		"volume " + vol.String() + " 1\ninvoke 1 write 0 0 99999999\n", "volume " + vol.String() + " " + strings.Repeat("1", 300) + "\n"} {
		if _, err := ReadJournal(strings.NewReader(bad)); err == nil {
			t.Errorf("journal %q was read", bad)
		}
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

func TestJournalErrorIsKept(t *testing.T) {
	h := newHistory(1)
	if err := h.RecordTo(failingWriter{}); !errors.Is(err, io.ErrShortWrite) {
		t.Error(err)
	}
	h.write(0, 1)
	if !errors.Is(h.JournalErr(), io.ErrShortWrite) {
		t.Error(h.JournalErr())
	}
}

func FuzzReadJournal(f *testing.F) {
	f.Add("volume " + vol.String() + " 8\ninvoke 1 write 1 0 4\nok 1\nflush 2 1\nflushed 2 1\nsettle 0 1\nrebase 1\n")
	f.Fuzz(func(t *testing.T, text string) {
		o, err := ReadJournal(strings.NewReader(text))
		if err != nil {
			return
		}
		o.blocks = min(o.blocks, 16)
		_, _ = o.CheckPrefix(o.Mark(), newImage(16).read)
		_ = o.CheckBlocks(o.Mark(), newImage(16).read)
	})
}

func BenchmarkCheckPrefix(b *testing.B) {
	h := newHistory(256)
	rnd := rand.New(rand.NewPCG(1, 1))
	for range 1000 {
		h.Acked(h.write(rnd.Uint64N(250), 1+rnd.IntN(6)))
	}
	v, m := h.at(1000), h.Mark()
	for b.Loop() {
		if _, err := h.CheckPrefix(m, v.read); err != nil {
			b.Fatal(err)
		}
	}
}
