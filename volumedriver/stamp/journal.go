package stamp

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/google/uuid"
)

// A journal is an Oracle's memory as text, one event a line, so that the process which loads a volume and the one which
// checks it need not be the same:
//
//	volume 6ba7b810-9dad-11d1-80b4-00c04fd430c8 65536    the first line: the volume and its blocks
//	invoke 17 write 3 4096 8                             op 17: writer 3 is about to write 8 blocks from block 4096 on
//	ok 17                                                it was acknowledged
//	durable 17                                           it was acknowledged as durable
//	failed 17                                            nothing of it was applied
//	unknown 17                                           nobody knows
//	flush 40 16                                          a flush begins, after 40 events, op 16 the last acknowledged
//	flushed 40 16                                        that flush was acknowledged
//	rebase 15                                            a restart found prefix 15
//	settle 4096 9                                        a restart found op 9 in block 4096
//	blocks 131072                                        the volume has another size
//
// A last line without its end was being written when its writer was killed, and does not count.

// RecordTo appends every further event to w, one Write each, before the method that notes it returns. On a new Oracle it begins
// a journal, on one from ReadJournal it goes on with that.
func (o *Oracle) RecordTo(w io.Writer) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.journal, o.err = w, nil
	if len(o.ops) == 0 && o.events == 0 {
		o.recordLocked("volume %s %d", o.volume, o.blocks)
	}
	return o.err
}

// JournalErr is the first error of writing the journal. With one, the journal is not to be believed.
func (o *Oracle) JournalErr() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

func (o *Oracle) recordLocked(format string, args ...any) {
	if o.journal == nil || o.err != nil {
		return
	}
	if _, err := o.journal.Write(fmt.Appendf(nil, format+"\n", args...)); err != nil {
		o.err = fmt.Errorf("write journal of volume %s: %w", o.volume, err)
	}
}

const (
	journalLineMax   = 200
	journalBlocksMax = 1 << 20 // of one operation
)

// ReadJournal builds the Oracle that wrote a journal.
func ReadJournal(r io.Reader) (*Oracle, error) {
	br := bufio.NewReaderSize(r, journalLineMax)
	var o *Oracle
	for n := 1; ; n++ {
		line, err := br.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			if o == nil {
				return nil, errors.New("read journal: it has no first line")
			}
			return o, nil
		}
		if err == nil && o == nil {
			o, err = parseHead(string(line))
		} else if err == nil {
			err = o.parseLine(string(line))
		}
		if err != nil {
			return nil, fmt.Errorf("read journal: line %d %q: %w", n, line, err)
		}
	}
}

func parseHead(line string) (*Oracle, error) {
	var id string
	var blocks uint64
	if _, err := fmt.Sscanf(line, "volume %s %d\n", &id, &blocks); err != nil {
		return nil, err
	}
	volume, err := uuid.Parse(id)
	if err != nil {
		return nil, err
	}
	return NewOracle(volume, blocks), nil
}

// parseLine repeats the event that a line tells.
func (o *Oracle) parseLine(line string) error {
	var verb string
	var a, b uint64
	if _, err := fmt.Sscanf(line, "%s %d", &verb, &a); err != nil {
		return err
	}
	switch verb {
	case "invoke":
		return o.parseInvoke(line)
	case "flush", "flushed", "settle":
		if _, err := fmt.Sscanf(line, verb+" %d %d\n", &a, &b); err != nil {
			return err
		}
		if verb != "flush" && b > uint64(len(o.ops)) {
			return fmt.Errorf("there is no op %d", b)
		}
	case "ok", "durable", "failed", "unknown":
		if a == 0 || a > uint64(len(o.ops)) {
			return fmt.Errorf("there is no op %d", a)
		}
	}
	switch verb {
	case "ok":
		o.Acked(a)
	case "durable":
		o.AckedDurable(a)
	case "failed":
		o.Failed(a)
	case "unknown":
		o.Unknown(a)
	case "flush":
	case "flushed":
		o.FlushDone(Flush{a, b})
	case "rebase":
		o.Rebase(a)
	case "settle":
		o.settleLocked(a, b)
	case "blocks":
		o.SetBlocks(a)
	default:
		return fmt.Errorf("unknown event %q", verb)
	}
	return nil
}

func (o *Oracle) parseInvoke(line string) error {
	var p op
	var seq uint64
	var kind string
	if _, err := fmt.Sscanf(line, "invoke %d %s %d %d %d\n", &seq, &kind, &p.writer, &p.lba, &p.blocks); err != nil {
		return err
	}
	for k, name := range kindNames {
		if name == kind {
			p.kind = Kind(k)
		}
	}
	switch {
	case p.kind.String() != kind:
		return fmt.Errorf("unknown operation %q", kind)
	case seq != uint64(len(o.ops))+1:
		return fmt.Errorf("op %d follows op %d", seq, len(o.ops))
	case p.blocks > journalBlocksMax:
		return fmt.Errorf("%d blocks are more than %d", p.blocks, journalBlocksMax)
	}
	o.submit(p)
	return nil
}
