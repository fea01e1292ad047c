package writelog

import (
	"bytes"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"testing"

	"varve/volumedriver/blockio"
	"varve/volumedriver/seal"
	"varve/volumedriver/vfs"
)

// sealedRecord writes one block under the key and reads back what lies in the log.
func sealedRecord(t *testing.T, l *Log, seq uint64, key *seal.Key, block []byte) (Logged, []byte) {
	t.Helper()
	m := &model{issued: make([]Record, seq)}
	r := Record{Volume: volumeA, Seq: seq, Kind: Data, LBA: 7, Blocks: 1, Key: 1, SealKey: key}
	var got Logged
	s := sinkFunc(func(g *Logged) { got = *g; got.CRC = slices.Clone(g.CRC) })
	err := l.Append(r, block, s, false, nil, 0)
	for tries := 0; errors.Is(err, blockio.ErrBusy) && tries < 100; tries++ {
		if err = l.WaitSpace(testContext); err == nil {
			err = l.Append(r, block, s, false, nil, 0)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	l.Kick()
	if err := m.sync(l); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, blockSize)
	if err := l.ReadAt(p, got.Loc); err != nil {
		t.Fatal(err)
	}
	return got, p
}

type sinkFunc func(g *Logged)

func (f sinkFunc) Logged(g *Logged)        { f(g) }
func (f sinkFunc) LogFailed(uint64, error) {}

// TestKeystreamIsNeverUsedTwice: the same bytes written again, in the same place of a segment after it was recycled, after a
// restart, or anywhere else, give other ciphertext.
func TestKeystreamIsNeverUsedTwice(t *testing.T) {
	cfg := testConfig(vfs.NewMem(1))
	block := make([]byte, blockSize) // zeros: the ciphertext is the keystream
	seen := map[string]uint64{}
	seq := uint64(0)
	for range 4 {
		l := mustOpen(t, cfg)
		for range 100 { // several times round the slots
			seq++
			g, p := sealedRecord(t, l, seq, testKeys[1], block)
			for i := 0; i < blockSize; i += 16 {
				if at, ok := seen[string(p[i:i+16])]; ok {
					t.Fatalf("record %d has the keystream of record %d", seq, at)
				}
				seen[string(p[i:i+16])] = seq
			}
			if err := readBackBlock(l, &g, p, block, testKeys[1]); err != nil {
				t.Fatal(err)
			}
			l.Release(volumeA, seq)
		}
		closeLog(t, l)
	}
}

// TestEachVolumeHasItsKey: in one segment, each record is under the key that it was appended with and no other, so that erasing
// one volume's key takes just what is its.
func TestEachVolumeHasItsKey(t *testing.T) {
	l := mustOpen(t, testConfig(vfs.NewMem(1)))
	defer closeLog(t, l)
	for seq := uint64(1); seq <= 6; seq++ {
		key := testKeys[1+seq%2]
		g, p := sealedRecord(t, l, seq, key, make([]byte, blockSize))
		s := l.slots[g.Loc.slot()].Load().sealing.Load()
		c, err := key.Log(l.id, s.gen, s.salt)
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, blockSize)
		c.XOR(want, want, uint64(uint32(g.Loc)))
		if !bytes.Equal(p, want) {
			t.Errorf("record %d is not under its key", seq)
		}
	}
}

func readBackBlock(l *Log, g *Logged, p, want []byte, key *seal.Key) error {
	crc := slices.Clone(g.CRC)
	if err := l.Unseal(p, crc, g.Loc, key); err != nil {
		return err
	}
	if !bytes.Equal(p, want) || crc[0] != crc32.Checksum(want, castagnoli) {
		return errors.New("not what was written")
	}
	return nil
}

// TestSealedPayloadIsNowhereInClear looks through every file of a log.
func TestSealedPayloadIsNowhereInClear(t *testing.T) {
	mem := vfs.NewMem(1)
	cfg := testConfig(mem)
	l := mustOpen(t, cfg)
	block := bytes.Repeat([]byte("the guest's secret, "), blockSize/20+1)[:blockSize]
	sealedRecord(t, l, 1, testKeys[1], block)
	closeLog(t, l)
	names, err := mem.ReadDir(cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	plainCRC := le.AppendUint32(nil, crc32.Checksum(block, castagnoli))
	looked := 0
	for _, n := range names {
		f, err := mem.OpenFile(path.Join(cfg.Dir, n), os.O_RDONLY, 0)
		if err != nil {
			continue // the lock
		}
		size, err := f.Size()
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, size)
		if size > 0 {
			if _, err := f.ReadAt(b, 0); err != nil {
				t.Fatal(err)
			}
		}
		if bytes.Contains(b, []byte("secret")) || bytes.Contains(b, plainCRC) {
			t.Errorf("%s holds the plaintext or its checksum", n)
		}
		looked += len(b)
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if looked < 32*blockSize {
		t.Errorf("only %d bytes looked at", looked)
	}
}

// TestSealedBlockSpoiltInMemory: a block that changes between its checksum and the disk does not fit it when it is read.
func TestSealedBlockSpoiltInMemory(t *testing.T) {
	l := mustOpen(t, testConfig(vfs.NewMem(1)))
	defer closeLog(t, l)
	var got Logged
	r := Record{Volume: volumeA, Seq: 1, Kind: Data, Blocks: 1, Key: 2, SealKey: testKeys[2]}
	if err := l.Append(r, payloadOf(&r), sinkFunc(func(g *Logged) { got = *g; got.CRC = slices.Clone(g.CRC) }), false, nil, 0); err != nil {
		t.Fatal(err)
	}
	l.mu.Lock()
	l.open.payload[100] ^= 8
	l.mu.Unlock()
	l.Kick()
	p := make([]byte, blockSize)
	if err := l.ReadAt(p, got.Loc); err != nil {
		t.Fatal(err)
	}
	if crc32.Checksum(p, castagnoli) == got.CRC[0] {
		t.Error("the ciphertext fits")
	}
	crc := slices.Clone(got.CRC)
	if err := l.Unseal(p, crc, got.Loc, testKeys[2]); err != nil {
		t.Fatal(err)
	}
	if crc32.Checksum(p, castagnoli) == crc[0] || crc[0] != crc32.Checksum(payloadOf(&r), castagnoli) {
		t.Error("the plaintext fits, or its checksum is another")
	}
}

// TestErasedKey: what is appended under a key that is erased before the commit is not written in clear; reading it fails.
func TestErasedKey(t *testing.T) {
	l := mustOpen(t, testConfig(vfs.NewMem(1)))
	defer closeLog(t, l)
	key, err := seal.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	var got Logged
	block := bytes.Repeat([]byte{0x5a}, blockSize)
	r := Record{Volume: volumeA, Seq: 1, Kind: Data, Blocks: 1, Key: 1, SealKey: key}
	if err := l.Append(r, block, sinkFunc(func(g *Logged) { got = *g; got.CRC = slices.Clone(g.CRC) }), false, nil, 0); err != nil {
		t.Fatal(err)
	}
	key.Erase()
	l.Kick()
	p := make([]byte, blockSize)
	if err := l.ReadAt(p, got.Loc); err != nil || !bytes.Equal(p, make([]byte, blockSize)) || got.CRC[0] != crc32.Checksum(p, castagnoli) {
		t.Error("not zeros", err)
	}
	if err := l.Unseal(p, nil, got.Loc, key); !errors.Is(err, seal.ErrNoKey) {
		t.Error(err)
	}
}

// TestUnsealRefuses: half blocks, a place that was recycled, records whose key is not there.
func TestUnsealRefuses(t *testing.T) {
	l := mustOpen(t, testConfig(vfs.NewMem(1)))
	defer closeLog(t, l)
	block := make([]byte, blockSize)
	g, p := sealedRecord(t, l, 1, testKeys[1], block)
	if l.Unseal(p[:100], nil, g.Loc, testKeys[1]) == nil || l.Unseal(p, make([]uint32, 2), g.Loc, testKeys[1]) == nil {
		t.Error("half a block, or checksums of two, accepted")
	}
	for _, r := range []Record{
		{Volume: volumeA, Seq: 2, Kind: Data, Blocks: 1, Key: 1},
		{Volume: volumeA, Seq: 2, Kind: Data, Blocks: 1, SealKey: testKeys[1]},
		{Volume: volumeA, Seq: 2, Kind: Zero, Blocks: 1, Key: 1, SealKey: testKeys[1]},
	} {
		payload := payloadOf(&r)
		if err := l.Append(r, payload, sinkFunc(func(*Logged) {}), false, nil, 0); err == nil {
			t.Errorf("%+v accepted", r)
		}
		if err := l.AppendAll([]Record{r}, payload, sinkFunc(func(*Logged) {}), false, nil, 0); err == nil {
			t.Errorf("%+v accepted", r)
		}
	}
	l.Release(volumeA, 1)
	rng := rand.New(rand.NewPCG(1, 1))
	seq := uint64(1)
	for range 200 {
		seq++
		copy(block, noise[rng.IntN(blockSize):])
		h, _ := sealedRecord(t, l, seq, testKeys[1], block)
		l.Release(volumeA, seq)
		if h.Loc.slot() == g.Loc.slot() && h.Loc.gen() != g.Loc.gen() {
			if err := l.Unseal(p, nil, g.Loc, testKeys[1]); !errors.Is(err, ErrStale) {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("no slot was recycled")
}

// BenchmarkSealedCommit compares a batch of 16 blocks with and without a key.
func BenchmarkSealedCommit(b *testing.B) {
	for name, key := range map[string]uint16{"plain": 0, "sealed": 1} {
		b.Run(name, func(b *testing.B) {
			cfg := testConfig(vfs.NewMem(1))
			cfg.SegmentBytes = 64 << 20
			l := mustOpen(b, cfg)
			defer closeLog(b, l)
			s := sinkFunc(func(*Logged) {})
			r := Record{Volume: volumeA, Kind: Data, Blocks: 16, Key: key, SealKey: testKeys[key]}
			p := payloadOf(&r)
			b.SetBytes(int64(len(p)))
			b.ReportAllocs()
			for b.Loop() {
				r.Seq++
				for l.Append(r, p, s, false, nil, 0) != nil {
					if err := l.WaitSpace(testContext); err != nil {
						b.Fatal(err)
					}
				}
				l.Kick()
				l.Release(volumeA, r.Seq)
			}
		})
	}
}
