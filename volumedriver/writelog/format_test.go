package writelog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"strings"
	"testing"

	"github.com/google/uuid"

	"varve/volumedriver/seal"
	"varve/volumedriver/vfs"
)

func TestSegmentHeaderCodec(t *testing.T) {
	b := make([]byte, blockSize)
	for _, h := range []segmentHeader{
		{gen: 1, low: 1},
		{slot: 4095, log: uuid.UUID{1, 2, 3}, gen: 1 << 40, low: 1<<40 - 3, prevLast: 77, prevChain: 5, salt: 9, segmentBytes: 64 << 20,
			keySalt: [seal.SaltBytes]byte{7, 15: 8}},
	} {
		h.encode(b)
		got, err := parseSegmentHeader(b)
		if err != nil || got != h {
			t.Fatalf("%+v, want %+v: %v", got, h, err)
		}
		for bit := range segmentHdrBytes * 8 {
			b[bit/8] ^= 1 << (bit % 8)
			if got, err := parseSegmentHeader(b); err == nil {
				t.Fatalf("bit %d flipped and still a header: %+v", bit, got)
			}
			b[bit/8] ^= 1 << (bit % 8)
		}
	}
	h := segmentHeader{gen: 2, low: 3}
	h.encode(b)
	if _, err := parseSegmentHeader(b); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
	h = segmentHeader{gen: 2, low: 2}
	h.encode(b)
	le.PutUint32(b[8:], formatVersion+1)
	le.PutUint32(b[segmentCRCAt:], crcAround(b, segmentCRCAt))
	if _, err := parseSegmentHeader(b); err == nil || errors.Is(err, errNoHeader) || errors.Is(err, ErrCorrupt) {
		t.Fatalf("a newer format: %v", err)
	}
}

func TestBatchCodec(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	m := &model{}
	for _, records := range []int{0, 1, 70, 71, 72, 300} {
		b := newBatch(limits{records: records, payloadBlocks: 3 * records, headBytes: headerBytes(records, 3*records)})
		for i := range b.head {
			b.head[i] = 0xff // what the last use left
		}
		for range records {
			r := m.next(rng, 3)
			r.Value = rng.Uint64()
			m.issued = append(m.issued, r)
			b.add(&r, payloadOf(&r), nil)
		}
		h := batchHeader{log: uuid.UUID{9}, gen: 3, number: 4, durable: 2, low: 1, time: -5, chain: 6, salt: 7,
			records: uint32(records), payloadBlocks: uint32(len(b.crcs)), flags: flagSeal}
		head := b.encode(&h)
		got, err := parseBatchHeader(head)
		if err != nil || got != h || !batchHeaderIntact(&got, head) {
			t.Fatalf("%+v, want %+v: %v", got, h, err)
		}
		if int64(len(head)+len(b.payload)) != b.size(0, 0) {
			t.Fatalf("%d and %d bytes, size said %d", len(head), len(b.payload), b.size(0, 0))
		}
		for i := range b.entries {
			var r Record
			blocks, err := getRecord(head[batchHdrBytes+i*recordBytes:], &r)
			r.SealKey = testKeys[r.Key] // not stored
			if err != nil || r != b.entries[i].Record || blocks*blockSize != len(payloadOf(&r)) {
				t.Fatalf("%+v, want %+v: %v", r, b.entries[i].Record, err)
			}
		}
		for range 500 {
			bit := rng.IntN(len(head) * 8)
			head[bit/8] ^= 1 << (bit % 8)
			if got, err := parseBatchHeader(head); err == nil && batchHeaderIntact(&got, head) {
				t.Fatalf("bit %d flipped and still intact", bit)
			}
			head[bit/8] ^= 1 << (bit % 8)
		}
	}
}

func TestMetaCodec(t *testing.T) {
	m := meta{id: uuid.UUID{1}, segmentBytes: 64 << 20, generation: 5, clean: true, last: 6, chain: 7,
		verifier: [8]byte{8, 9}, bootID: strings.Repeat("x", bootIDMax)}
	b := m.encode()
	if got, err := parseMeta(b); err != nil || got != m {
		t.Fatalf("%+v, want %+v: %v", got, m, err)
	}
	for bit := range len(b) * 8 {
		b[bit/8] ^= 1 << (bit % 8)
		if _, err := parseMeta(b); err == nil {
			t.Fatalf("bit %d flipped unnoticed", bit)
		}
		b[bit/8] ^= 1 << (bit % 8)
	}
	for _, b := range [][]byte{nil, b[:100], make([]byte, metaBytes)} {
		if _, err := parseMeta(b); !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
	}
}

func TestLoc(t *testing.T) {
	l := makeLoc(4095, 1<<20|77, 1<<32-3)
	if l.slot() != 4095 || l.gen() != 77 || l.offset() != (1<<32-3)*blockSize || l.Add(2).offset() != (1<<32-1)*blockSize {
		t.Fatalf("%x", uint64(l))
	}
}

// TestScannerTakesOnlyTheNextBatch: an intact batch that is not the next one of this generation ends the scan.
func TestScannerTakesOnlyTheNextBatch(t *testing.T) {
	mem := vfs.NewMem(1)
	f, err := mem.OpenFile("seg", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(8 * blockSize); err != nil {
		t.Fatal(err)
	}
	seg := segmentHeader{log: uuid.UUID{1}, gen: 5, low: 2, prevLast: 10, salt: 3, segmentBytes: 8 * blockSize}
	seg.encode(make([]byte, blockSize))
	write := func(off int64, change func(h *batchHeader, payload []byte)) batchHeader {
		b := newBatch(limits{records: 1, payloadBlocks: 1, headBytes: blockSize})
		r := Record{Volume: volumeA, Seq: 1, Kind: Data, Blocks: 1}
		b.add(&r, payloadOf(&r), nil)
		h := batchHeader{log: seg.log, gen: 5, number: 11, low: 2, chain: seg.crc, salt: 3, records: 1, payloadBlocks: 1}
		change(&h, b.payload)
		if _, err := f.WriteAt(append(b.encode(&h), b.payload...), off); err != nil {
			t.Fatal(err)
		}
		return h
	}
	scan := func() *scanner { return newScanner(&segment{path: "seg", file: f}, &seg) }
	good := write(blockSize, func(*batchHeader, []byte) {})
	if h, err := scan().next(); err != nil || h != good {
		t.Fatal(h, err)
	}
	for name, change := range map[string]func(h *batchHeader, payload []byte){
		"another log":        func(h *batchHeader, _ []byte) { h.log[0]++ },
		"another generation": func(h *batchHeader, _ []byte) { h.gen-- },
		"another salt":       func(h *batchHeader, _ []byte) { h.salt++ },
		"an older batch":     func(h *batchHeader, _ []byte) { h.number-- },
		"a later batch":      func(h *batchHeader, _ []byte) { h.number++ },
		"another chain":      func(h *batchHeader, _ []byte) { h.chain++ },
		"a seal of later":    func(h *batchHeader, _ []byte) { h.flags = flagSeal },
		"wrong payload":      func(_ *batchHeader, p []byte) { p[4095] ^= 1 },
	} {
		write(blockSize, change)
		sc := scan()
		if _, err := sc.next(); !errors.Is(err, errBreak) || sc.off != blockSize || sc.number != 10 {
			t.Errorf("%s: %v, off %d, number %d", name, err, sc.off, sc.number)
		}
	}
	// A break, and good batches behind it: they stay unread, but are seen.
	write(blockSize, func(_ *batchHeader, p []byte) { p[0] ^= 1 })
	write(3*blockSize, func(h *batchHeader, _ []byte) { h.number, h.durable, h.chain = 12, 9, good.crc })
	sc := scan()
	if _, err := sc.next(); !errors.Is(err, errBreak) || sc.off != blockSize {
		t.Fatal(err, sc.off)
	}
	if number, durable, err := sc.beyond(); number != 11 && number != 12 || durable != 9 || err != nil {
		t.Fatal(number, durable, err)
	}
}

// oldLog makes a log with sealed segments and a tail, and gives its model.
func oldLog(t *testing.T, clean bool) (*vfs.Mem, Config, *model) {
	t.Helper()
	mem := vfs.NewMem(1)
	cfg := testConfig(mem)
	m, rng := &model{}, rand.New(rand.NewPCG(8, 8))
	l, _, err := m.recover(cfg, 0)
	if err != nil {
		t.Fatal(err)
	}
	for l.Stats().SegmentsUsed < 3 || l.Stats().Bytes%cfg.SegmentBytes < cfg.SegmentBytes/2 {
		ok, err := m.append(l, rng, 2)
		if err != nil {
			t.Fatal(err)
		}
		l.Kick()
		if !ok {
			if err := l.WaitSpace(testContext); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.sync(l); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // not synced
		r := Record{Volume: volumeA, Seq: uint64(len(m.issued) + 1), Kind: Data, LBA: 3, Blocks: 1}
		m.issued = append(m.issued, r)
		if err := l.Append(r, payloadOf(&r), m, false, nil, 0); err != nil {
			t.Fatal(err)
		}
		l.Kick()
	}
	for range 3 { // at the third, the preparer has noted the generation
		l.prepare <- struct{}{}
	}
	left := mem.Kill()
	closeLog(t, l)
	if clean {
		left = mem
	}
	cfg.FS = left
	return left, cfg, m
}

// TestDamage: damage to anything durable is refused with the file's name, and nothing is taken for an empty log. Damage to
// the last batches, for which no sync vouches, cuts them off.
func TestDamage(t *testing.T) {
	_, cfg, m := oldLog(t, false)
	m.durable = m.written - 2
	l, replayed, err := m.recover(Config{FS: cfg.FS.(*vfs.Mem).Kill(), Dir: cfg.Dir}, m.written)
	if err != nil {
		t.Fatal(err)
	}
	closeLog(t, l)
	last := replayed[len(replayed)-1]
	tail := segmentPath(cfg.Dir, last.Loc.slot())
	var cutAt int64 // of the first batch that is not durable
	for i := range replayed {
		if replayed[i].Batch == replayed[m.durable-1].Batch+1 {
			cutAt = replayed[i].Loc.offset() - blockSize
			break
		}
	}

	flip := func(name string, off int64) func(vfs.FS) error {
		return func(fsys vfs.FS) error {
			f, err := fsys.OpenFile(name, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			var b [1]byte
			if _, err := f.ReadAt(b[:], off); err != nil {
				return err
			}
			b[0] ^= 0x10
			_, err = f.WriteAt(b[:], off)
			return err
		}
	}
	truncate := func(name string, size int64) func(vfs.FS) error {
		return func(fsys vfs.FS) error {
			f, err := fsys.OpenFile(name, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			return f.Truncate(size)
		}
	}
	remove := func(name string) func(vfs.FS) error { return func(fsys vfs.FS) error { return fsys.Remove(name) } }
	metaFile := path.Join(cfg.Dir, metaName)
	type damage struct {
		name string
		do   func(vfs.FS) error
		cut  bool // the tail may be cut
	}
	var cases []damage
	for slot := range 3 {
		name := segmentPath(cfg.Dir, slot)
		cases = append(cases,
			damage{name + " removed", remove(name), false},
			damage{name + " empty", truncate(name, 0), false},
			damage{name + " short", truncate(name, cfg.SegmentBytes-blockSize), false},
			damage{name + " half a block", truncate(name, 100), false})
		end := int64(24 * blockSize) // a sealed segment may have room left that nothing uses
		if name == tail {
			end = cutAt
		}
		for off := int64(0); off < end; off += 509 {
			cases = append(cases, damage{fmt.Sprintf("%s bit at %d", name, off), flip(name, off), false})
		}
	}
	for off := cutAt; off < last.Loc.offset()+int64(len(last.CRC))*blockSize; off += 509 {
		cases = append(cases, damage{fmt.Sprintf("tail bit at %d", off), flip(tail, off), true})
	}
	cases = append(cases,
		damage{"meta removed", remove(metaFile), false},
		damage{"meta empty", truncate(metaFile, 0), false},
		damage{"meta short", truncate(metaFile, 511), false},
		damage{"meta bit", flip(metaFile, 40), false})
	refused, cut := 0, 0
	for _, c := range cases {
		fsys := cfg.FS.(*vfs.Mem).Kill()
		if err := c.do(fsys); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		cc := cfg
		cc.FS = fsys
		got := newModelOf(m)
		l, _, err := got.recover(cc, m.durable)
		switch {
		case c.cut && err == nil:
			cut++
			closeLog(t, l)
		case c.cut:
			t.Errorf("%s: %v", c.name, err)
		case err == nil:
			closeLog(t, l)
			t.Errorf("%s: opened", c.name)
		case !errors.Is(err, ErrCorrupt):
			t.Errorf("%s: %v", c.name, err)
		default:
			refused++
			if !strings.Contains(err.Error(), cfg.Dir) {
				t.Errorf("%s: the error names nothing: %v", c.name, err)
			}
		}
	}
	t.Logf("%d refused, %d cut", refused, cut)
}

// TestCleanStopAllowsNoLoss: after a clean stop even the last batch must be there.
func TestCleanStopAllowsNoLoss(t *testing.T) {
	mem, cfg, m := oldLog(t, true)
	last := m.logged[len(m.logged)-1]
	f, err := mem.OpenFile(segmentPath(cfg.Dir, last.Loc.slot()), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{1, 2, 3}, last.Loc.offset()-blockSize+200); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := m.recover(cfg, 0); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
}

func TestVerifierChangesOnlyWithLoss(t *testing.T) {
	for name, c := range map[string]struct {
		boot    string
		clean   bool
		torn    bool
		fenced  bool
		changes bool
	}{
		"clean":                {boot: "boot-1", clean: true},
		"clean, machine boots": {boot: "boot-2", clean: true},
		"killed":               {boot: "boot-1"},
		"machine boots":        {boot: "boot-2", changes: true},
		"torn":                 {boot: "boot-1", torn: true, changes: true},
		"fenced":               {boot: "boot-1", fenced: true, changes: true},
	} {
		fsys, cfg, m := oldLog(t, c.clean)
		before, err := readMeta(fsys, cfg.Dir)
		if err != nil {
			t.Fatal(err)
		}
		if c.torn {
			last := m.logged[len(m.logged)-1]
			f, err := fsys.OpenFile(segmentPath(cfg.Dir, last.Loc.slot()), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte{1, 2, 3}, last.Loc.offset()+1000); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if c.fenced {
			if err := writeFile(fsys, path.Join(cfg.Dir, fencedName), []byte("disk on fire")); err != nil {
				t.Fatal(err)
			}
		}
		cfg.BootID = c.boot
		l := mustOpen(t, cfg)
		first := l.Verifier()
		closeLog(t, l)
		if (first != before.verifier) != c.changes {
			t.Errorf("%s: from %x to %x", name, before.verifier, first)
		}
		if _, err := fsys.Stat(path.Join(cfg.Dir, fencedName)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the mark of a fenced log stays: %v", name, err)
		}
		l = mustOpen(t, cfg)
		if l.Verifier() != first {
			t.Errorf("%s: it changed once more", name)
		}
		closeLog(t, l)
	}
}

func TestOpenRefuses(t *testing.T) {
	mem := vfs.NewMem(1)
	cfg := testConfig(mem)
	l := mustOpen(t, cfg)
	if _, err := Open(cfg, nil); err == nil {
		t.Fatal("opened twice")
	}
	closeLog(t, l)
	for _, bad := range []Config{
		{FS: mem, Dir: "x", SegmentBytes: 100},
		{FS: mem, Dir: "x", SegmentBytes: 1 << 40},
		{FS: mem, Dir: "x", Segments: 1},
		{FS: mem, Dir: "x", Segments: 4000},
		{FS: mem, Dir: "x", BatchBytes: 1},
	} {
		if _, err := Open(bad, nil); err == nil {
			t.Errorf("opened with %+v", bad)
		}
	}
	b := func() []byte {
		m, err := readMeta(mem, cfg.Dir)
		if err != nil {
			t.Fatal(err)
		}
		return m.encode()
	}()
	binary.LittleEndian.PutUint32(b[8:], formatVersion+1)
	if err := writeFile(mem, path.Join(cfg.Dir, metaName), b); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(cfg, nil); err == nil || !strings.Contains(err.Error(), fmt.Sprint("format ", formatVersion+1)) {
		t.Fatal(err)
	}
}

// TestOtherSettings: an existing log keeps its segment size; it may get more or fewer slots.
func TestOtherSettings(t *testing.T) {
	_, cfg, m := oldLog(t, true)
	for _, segments := range []int{2, 9, 3} {
		cfg.SegmentBytes, cfg.Segments = 1<<20, segments
		l, _, err := m.recover(cfg, m.written)
		if err != nil {
			t.Fatal(err)
		}
		if l.Stats().SegmentBytes != 32*blockSize {
			t.Fatalf("%+v", l.Stats())
		}
		if n := l.slotCount; n > max(segments, len(l.live)) {
			t.Fatalf("%d slots, %d live, want %d", n, len(l.live), segments)
		}
		m.release(l, len(m.issued))
		for range 10 {
			if ok, err := m.append(l, rand.New(rand.NewPCG(1, 1)), 1); !ok || err != nil {
				t.Fatal(ok, err)
			}
			l.Kick()
		}
		closeLog(t, l)
	}
}

// FuzzRecoverSegment puts arbitrary bytes behind the header of the newest segment, also over good batches: no panic, and
// what is accepted is a prefix of what was there.
func FuzzRecoverSegment(f *testing.F) {
	mem := vfs.NewMem(1)
	cfg := testConfig(mem)
	m, rng := &model{}, rand.New(rand.NewPCG(8, 8))
	l, _, err := m.recover(cfg, 0)
	if err != nil {
		f.Fatal(err)
	}
	for range 5 {
		if _, err := m.append(l, rng, 1); err != nil {
			f.Fatal(err)
		}
		l.Kick()
	}
	left := mem.Kill()
	if err := l.Close(); err != nil {
		f.Fatal(err)
	}
	file, err := left.OpenFile(segmentPath(cfg.Dir, 0), os.O_RDWR, 0)
	if err != nil {
		f.Fatal(err)
	}
	good := make([]byte, 12*blockSize)
	if _, err := file.ReadAt(good, 0); err != nil {
		f.Fatal(err)
	}
	if err := file.Close(); err != nil {
		f.Fatal(err)
	}
	f.Add(uint16(blockSize/16), good[blockSize:2*blockSize])
	f.Add(uint16(blockSize/16), good[blockSize:])
	f.Add(uint16(2*blockSize/16), good[blockSize:4*blockSize])
	f.Add(uint16(0), good[:blockSize])
	f.Add(uint16(0), []byte{1})
	for at := 64; at < batchHdrBytes; at += 4 {
		huge := append([]byte(nil), good[blockSize:2*blockSize]...)
		le.PutUint32(huge[at:], 0xfffffff0)
		le.PutUint32(huge[batchCRCAt:], crcAround(huge, batchCRCAt))
		f.Add(uint16(blockSize/16), huge)
	}
	f.Fuzz(func(t *testing.T, at16 uint16, b []byte) {
		off := int64(at16) * 16
		b = b[:min(int64(len(b)), max(0, cfg.SegmentBytes-off))]
		cut := left.Kill()
		file, err := cut.OpenFile(segmentPath(cfg.Dir, 0), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
		c := cfg
		c.FS = cut
		var seen []Logged
		l, err := openIdle(c, func(g *Logged, _ int) error {
			x := *g
			x.CRC = bytes32(g.CRC)
			seen = append(seen, x)
			return nil
		})
		if err != nil {
			return // refused
		}
		if err := l.closeFiles(); err != nil {
			t.Fatal(err)
		}
		// Whoever fuzzes cannot make the checksums of other records.
		if err := m.check(seen, 0); err != nil {
			t.Fatal(err)
		}
	})
}
