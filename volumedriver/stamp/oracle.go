package stamp

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"

	"github.com/google/uuid"
)

// Kind is what an operation does to its blocks.
type Kind byte

const (
	Write Kind = iota
	WriteZeroes
	Trim // reads as zeros afterwards
)

var kindNames = [...]string{"write", "zero", "trim"}

func (k Kind) String() string { return kindNames[k] }

// op is an operation; its seq is its index in Oracle.ops plus one.
type op struct {
	kind   Kind
	fate   fate
	writer uint32
	lba    uint64
	blocks uint64

	acked   uint64 // events so far when it was acknowledged, 0 if it was not
	durable uint64 // likewise, as durable
}

type fate byte

const (
	ordinary fate = iota
	failed        // ended with an error that promises that nothing was applied
	unknown       // ended without an answer, or with an error that promises nothing
	dropped       // beyond the prefix that a crash left
)

// Oracle knows the operations on one volume in the order in which they were submitted. Its methods may be called concurrently.
//
// With a single submitter that order is the volume's own, and CheckPrefix applies. With several the order between them is not
// known; each must keep to blocks of its own and must not overlap itself, and CheckBlocks applies.
//
// A crash point is remembered as a Mark, so that many can be checked after one run. After a restart the test goes on with
// Rebase or Settle, which hold it against the volume when something comes back that was lost.
type Oracle struct {
	volume uuid.UUID

	mu       sync.Mutex
	blocks   uint64
	ops      []op
	versions map[uint64][]uint64 // per block, the seqs of all operations on it
	floor    map[uint64]uint64   // per block, the version that was found after a restart
	gone     map[uint64][]uint64 // per block, versions that the volume had lost at a restart
	events   uint64
	ackedMax uint64
	flushed  uint64 // what was acknowledged up to this event is durable
	required uint64 // every prefix must contain this op
	journal  io.Writer
	err      error // of the journal
}

// Mark is a moment: what had been submitted, and what had been promised.
type Mark struct {
	Ops      uint64 // submitted
	Events   uint64
	Flushed  uint64 // what was acknowledged up to this event is durable
	Required uint64 // the last op that was acknowledged as durable
	Acked    uint64 // the last op that was acknowledged
}

// Killed gives the mark for a crash that loses nothing acknowledged, durable or not: the end of the process alone.
func (m Mark) Killed() Mark {
	m.Flushed, m.Required = m.Events, max(m.Required, m.Acked)
	return m
}

// NewOracle starts with a volume of zeros.
func NewOracle(volume uuid.UUID, blocks uint64) *Oracle {
	return &Oracle{volume: volume, blocks: blocks, versions: map[uint64][]uint64{}, floor: map[uint64]uint64{},
		gone: map[uint64][]uint64{}}
}

// Write notes that p is about to be written at lba, and stamps it.
func (o *Oracle) Write(writer uint32, lba uint64, p []byte) (seq uint64) {
	seq = o.submit(op{kind: Write, writer: writer, lba: lba, blocks: uint64(len(p)) / BlockSize})
	Stamp{o.volume, lba, writer, seq}.Fill(p)
	return seq
}

// Zero notes that blocks are about to be zeroed (WriteZeroes) or trimmed (Trim).
func (o *Oracle) Zero(kind Kind, writer uint32, lba, blocks uint64) (seq uint64) {
	if kind == Write {
		panic("stamp: a write does not zero")
	}
	return o.submit(op{kind: kind, writer: writer, lba: lba, blocks: blocks})
}

func (o *Oracle) submit(p op) (seq uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.events++
	o.ops = append(o.ops, p)
	seq = uint64(len(o.ops))
	for b := p.lba; b < p.lba+p.blocks; b++ {
		o.versions[b] = append(o.versions[b], seq)
	}
	o.recordLocked("invoke %d %s %d %d %d", seq, p.kind, p.writer, p.lba, p.blocks)
	return seq
}

// Acked notes that the operation was acknowledged.
func (o *Oracle) Acked(seq uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ackLocked(seq)
	o.recordLocked("ok %d", seq)
}

func (o *Oracle) ackLocked(seq uint64) {
	o.events++
	o.ops[seq-1].acked = o.events
	o.ackedMax = max(o.ackedMax, seq)
}

// AckedDurable notes that the operation was acknowledged as durable (FUA, FILE_SYNC).
func (o *Oracle) AckedDurable(seq uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ackLocked(seq)
	o.ops[seq-1].durable = o.events
	o.required = max(o.required, seq)
	o.recordLocked("durable %d", seq)
}

// Failed notes that the operation ended with an error that promises that nothing of it was applied.
func (o *Oracle) Failed(seq uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ops[seq-1].fate = failed
	o.recordLocked("failed %d", seq)
}

// Unknown notes that the operation's outcome is not known, nor its place in the order: it may show, or never.
func (o *Oracle) Unknown(seq uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ops[seq-1].fate = unknown
	o.recordLocked("unknown %d", seq)
}

// Flush is a flush under way.
type Flush struct{ events, acked uint64 }

// FlushBegin notes that a flush is about to be submitted.
func (o *Oracle) FlushBegin() Flush {
	o.mu.Lock()
	defer o.mu.Unlock()
	f := Flush{o.events, o.ackedMax}
	o.recordLocked("flush %d %d", f.events, f.acked)
	return f
}

// FlushDone notes that a flush was acknowledged: all that had been acknowledged when it began is durable.
func (o *Oracle) FlushDone(f Flush) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.events++
	o.flushed = max(o.flushed, f.events)
	o.required = max(o.required, f.acked)
	o.recordLocked("flushed %d %d", f.events, f.acked)
}

// Mark remembers this moment.
func (o *Oracle) Mark() Mark {
	o.mu.Lock()
	defer o.mu.Unlock()
	return Mark{Ops: uint64(len(o.ops)), Events: o.events, Flushed: o.flushed, Required: o.required, Acked: o.ackedMax}
}

// Violation is a broken promise.
type Violation struct {
	Kind     string // one of the constants below
	LBA      uint64
	Found    string
	Expected string
}

const (
	LostDurable = "lost durable write" // a block is older than what was acknowledged as durable
	Hole        = "hole in the prefix" // a block is older than what other blocks show
	Resurrected = "resurrected block"  // bytes are back that were trimmed, zeroed, lost or refused
	Damaged     = "torn or corrupt"    // no version at all
	Displaced   = "misdirected"        // a block that belongs elsewhere
	Unwritten   = "never written"      // a version that nobody had submitted
	Inexact     = "no prefix fits"     // each pair of blocks may agree, but not all
)

func (v *Violation) Error() string {
	return fmt.Sprintf("%s: block %d holds %s, want %s", v.Kind, v.LBA, v.Found, v.Expected)
}

// ReadFunc reads whole blocks from lba on.
type ReadFunc func(p []byte, lba uint64) error

// readBlocks is how many blocks a check reads at once.
const readBlocks = 64

// eachBlock reads the volume and yields every block.
func (o *Oracle) eachBlock(read ReadFunc, yield func(lba uint64, p []byte) error) error {
	buf := make([]byte, min(readBlocks, o.blocks)*BlockSize)
	for lba := uint64(0); lba < o.blocks; lba += readBlocks {
		p := buf[:min(readBlocks, o.blocks-lba)*BlockSize]
		if err := read(p, lba); err != nil {
			return fmt.Errorf("read blocks %d+%d: %w", lba, len(p)/BlockSize, err)
		}
		for i := uint64(0); len(p) > 0; i, p = i+1, p[BlockSize:] {
			if err := yield(lba+i, p[:BlockSize]); err != nil {
				return err
			}
		}
	}
	return nil
}

// identifyLocked gives the op that a block shows, 0 for zeros.
func (o *Oracle) identifyLocked(m Mark, lba uint64, p []byte) (seq uint64, err error) {
	got, v := Check(p, Stamp{Volume: o.volume, LBA: lba})
	fail := func(kind, expected string) (uint64, error) {
		found := got.String()
		switch {
		case got == Stamp{}:
			found = v.String()
		case v != New:
			found = v.String() + ", " + found
		}
		return 0, &Violation{kind, lba, found, expected}
	}
	switch v {
	case Zero:
		return 0, nil
	case Torn, Corrupt:
		return fail(Damaged, "one whole version")
	case Misdirected:
		return fail(Displaced, "a version of this block")
	}
	if got.Volume != o.volume {
		return fail(Displaced, "a version of this block")
	}
	if slices.Contains(o.gone[lba], got.Seq) {
		return fail(Resurrected, "no version that an earlier restart had not found")
	}
	_, there := slices.BinarySearch(o.versions[lba], got.Seq)
	if !there || got.Seq > m.Ops || o.ops[got.Seq-1].writer != got.Writer || o.ops[got.Seq-1].kind != Write {
		return fail(Unwritten, fmt.Sprintf("one of the %d operations submitted", m.Ops))
	}
	switch o.ops[got.Seq-1].fate {
	case failed:
		return fail(Resurrected, "no write that was refused")
	case dropped:
		return fail(Resurrected, "no write that an earlier restart had not found")
	}
	return got.Seq, nil
}

// span is a range of prefixes, both ends included; prefix k is the state after op k.
type span struct{ from, to uint64 }

// fitsLocked appends the prefixes that fit a block, in order and apart from each other.
func (o *Oracle) fitsLocked(m Mark, lba, shows uint64, spans []span) []span {
	versions := o.versions[lba]
	if i, _ := slices.BinarySearch(versions, m.Ops+1); i < len(versions) {
		versions = versions[:i]
	}
	// upTo is the last prefix before the first op from version i on that must show.
	upTo := func(i int) uint64 {
		for _, seq := range versions[i:] {
			if o.ops[seq-1].fate == ordinary {
				return seq - 1
			}
		}
		return m.Ops
	}
	if shows != 0 {
		i, _ := slices.BinarySearch(versions, shows)
		return append(spans, span{shows, upTo(i + 1)})
	}
	last := span{0, upTo(0)}
	spans = append(spans, last)
	for i, seq := range versions {
		p := &o.ops[seq-1]
		if p.kind != Write && p.fate != failed && p.fate != dropped && seq > last.to {
			last = span{seq, upTo(i + 1)}
			spans = append(spans, last)
		}
	}
	return spans
}

// CheckPrefix tells which prefix of the operations submitted at m the volume equals; if several give the same image, the
// shortest of them that contains all that was acknowledged as durable. An error is a *Violation, or from read.
func (o *Oracle) CheckPrefix(m Mark, read ReadFunc) (prefix uint64, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	shows := make([]uint64, o.blocks)
	newest, newestAt := m.Required, uint64(0)
	err = o.eachBlock(read, func(lba uint64, p []byte) error {
		seq, err := o.identifyLocked(m, lba, p)
		if err != nil {
			return err
		}
		shows[lba] = seq
		if seq > newest {
			newest, newestAt = seq, lba
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	fitting := []span{{newest, m.Ops}}
	var spans []span
	for lba, seq := range shows {
		if len(o.versions[uint64(lba)]) == 0 {
			continue // zeros, as identified
		}
		spans = o.fitsLocked(m, uint64(lba), seq, spans[:0])
		if !overlaps(spans, newest, m.Ops) {
			return 0, o.tooOldLocked(m, uint64(lba), seq, newest, newestAt)
		}
		before := fitting[0].from
		if fitting = intersect(fitting, spans); len(fitting) == 0 {
			want := o.describeLocked(o.lastUpToLocked(uint64(lba), before))
			return 0, &Violation{Inexact, uint64(lba), o.describeLocked(seq),
				fmt.Sprintf("%s, since the blocks before it fit prefix %d, all up to op %d is durable", want, before, m.Required)}
		}
	}
	return fitting[0].from, nil
}

func overlaps(spans []span, from, to uint64) bool {
	return slices.ContainsFunc(spans, func(s span) bool { return s.from <= to && s.to >= from })
}

// tooOldLocked describes a block that misses an operation that is durable, or older than what another block shows.
func (o *Oracle) tooOldLocked(m Mark, lba, shows, newest, newestAt uint64) error {
	v := &Violation{Kind: LostDurable, LBA: lba, Found: o.describeLocked(shows)}
	why := fmt.Sprintf("since all up to op %d is durable", m.Required)
	missed := o.lastUpToLocked(lba, m.Required)
	if missed <= shows || shows == 0 && o.ops[missed-1].kind != Write {
		missed = o.lastUpToLocked(lba, newest)
		v.Kind = Hole
		why = fmt.Sprintf("since block %d shows op %d", newestAt, newest)
	}
	if shows != 0 && missed != 0 && o.ops[missed-1].kind != Write {
		v.Kind = Resurrected
	}
	v.Expected = o.describeLocked(missed) + ", " + why
	return v
}

// lastUpToLocked gives the last op on a block that must show in prefix k, 0 if there is none.
func (o *Oracle) lastUpToLocked(lba, k uint64) (last uint64) {
	for _, seq := range o.versions[lba] {
		if seq <= k && o.ops[seq-1].fate == ordinary {
			last = seq
		}
	}
	return last
}

func (o *Oracle) describeLocked(seq uint64) string {
	if seq == 0 {
		return "zeros"
	}
	p := o.ops[seq-1]
	return fmt.Sprintf("op %d (%s of blocks %d+%d by writer %d)", seq, p.kind, p.lba, p.blocks, p.writer)
}

// intersect gives the prefixes that are in both lists, which are in order.
func intersect(a, b []span) []span {
	var both []span
	for len(a) > 0 && len(b) > 0 {
		if from, to := max(a[0].from, b[0].from), min(a[0].to, b[0].to); from <= to {
			both = append(both, span{from, to})
		}
		if a[0].to < b[0].to {
			a = a[1:]
		} else {
			b = b[1:]
		}
	}
	return both
}

// CheckBlocks tells whether each block holds a version not older than the newest one that is durable at m. An error is a
// *Violation, or from read.
func (o *Oracle) CheckBlocks(m Mark, read ReadFunc) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.eachBlock(read, func(lba uint64, p []byte) error {
		_, err := o.checkBlockLocked(m, lba, p)
		return err
	})
}

func (o *Oracle) checkBlockLocked(m Mark, lba uint64, p []byte) (shows uint64, err error) {
	shows, err = o.identifyLocked(m, lba, p)
	if err != nil {
		return 0, err
	}
	durable := o.floor[lba]
	zeroed := durable == 0 // zeros may show
	for _, seq := range o.versions[lba] {
		if seq > m.Ops {
			break
		}
		p := &o.ops[seq-1]
		if p.fate == failed || p.fate == dropped {
			continue
		}
		if seq >= durable && (p.acked != 0 && p.acked <= m.Flushed || p.durable != 0 && p.durable <= m.Events) {
			durable, zeroed = seq, false
		}
		zeroed = zeroed || seq >= durable && p.kind != Write
	}
	if shows >= durable && shows != 0 || shows == 0 && zeroed {
		return shows, nil
	}
	kind := LostDurable
	if shows != 0 && o.ops[durable-1].kind != Write {
		kind = Resurrected
	}
	return 0, &Violation{kind, lba, o.describeLocked(shows), o.describeLocked(durable) + " or a later one"}
}

// Rebase makes the prefix that CheckPrefix gave the new beginning: later operations of the past must never show again, and
// the prefix itself stays, since readers have seen it.
func (o *Oracle) Rebase(prefix uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := prefix; i < uint64(len(o.ops)); i++ {
		o.ops[i].fate = dropped
	}
	o.required = max(o.required, prefix)
	o.recordLocked("rebase %d", prefix)
}

// Settle is CheckBlocks, and makes what each block shows the new beginning: what the volume has lost must never show again.
func (o *Oracle) Settle(m Mark, read ReadFunc) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.eachBlock(read, func(lba uint64, p []byte) error {
		shows, err := o.checkBlockLocked(m, lba, p)
		if err != nil {
			return err
		}
		o.settleLocked(lba, shows)
		return nil
	})
}

// settleLocked drops all versions of a block but the one that it shows. If it shows zeros, that is the last zeroing, or the
// beginning.
func (o *Oracle) settleLocked(lba, shows uint64) {
	versions := o.versions[lba]
	if len(versions) == 0 {
		return
	}
	if shows == 0 {
		for _, seq := range versions {
			if p := &o.ops[seq-1]; p.kind != Write && p.fate != failed && p.fate != dropped {
				shows = seq
			}
		}
	}
	var kept []uint64
	for _, seq := range versions {
		if seq == shows {
			kept = append(kept, seq)
		} else {
			o.gone[lba] = append(o.gone[lba], seq)
		}
	}
	o.versions[lba] = kept
	o.floor[lba] = shows
	o.recordLocked("settle %d %d", lba, shows)
}

// SetBlocks notes that the volume has another size.
func (o *Oracle) SetBlocks(blocks uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.blocks = blocks
	o.recordLocked("blocks %d", blocks)
}

// Clone gives an Oracle that knows the same and goes its own way, without a journal, for what is tried on a clone of the volume.
func (o *Oracle) Clone() *Oracle {
	o.mu.Lock()
	defer o.mu.Unlock()
	return &Oracle{volume: o.volume, blocks: o.blocks, ops: slices.Clone(o.ops), versions: cloneLists(o.versions),
		floor: maps.Clone(o.floor), gone: cloneLists(o.gone), events: o.events, ackedMax: o.ackedMax, flushed: o.flushed,
		required: o.required}
}

// cloneLists shares the lists, cut so that an append to either copies them.
func cloneLists(m map[uint64][]uint64) map[uint64][]uint64 {
	c := make(map[uint64][]uint64, len(m))
	for k, list := range m {
		c[k] = slices.Clip(list)
		m[k] = c[k]
	}
	return c
}

// Volume is the volume's identity.
func (o *Oracle) Volume() uuid.UUID { return o.volume }
