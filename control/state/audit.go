package state

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"unicode/utf8"
)

// AuditEntriesMax is how many entries the state keeps. Older ones are dropped; the chain then starts at the hash of the last one
// dropped, so that an export kept elsewhere still joins.
const AuditEntriesMax = 1 << 16

const (
	tAudit         = "audit"
	auditFieldMax  = 512
	auditAppendMax = 64
)

// AuditEntry is one thing that was done or refused. Entries form a chain:
//
//	Hash = SHA-256( JSON of the entry with an empty Hash ),   Previous = Hash of the entry before ("" for the first)
//
// so that nothing inside can be changed or taken out without the last hash changing, which an export keeps elsewhere.
type AuditEntry struct {
	Seq      uint64 `json:"seq"`
	Time     Time   `json:"time"`
	Who      string `json:"who"`
	Via      string `json:"via"`
	From     string `json:"from"`
	Action   string `json:"action"`
	Object   string `json:"object"`
	Result   string `json:"result"`
	Detail   string `json:"detail,omitempty"`
	Request  string `json:"request"`
	Previous string `json:"previous"`
	Hash     string `json:"hash"`
}

// Sum is what the entry's Hash must be.
func (e AuditEntry) Sum() string {
	e.Hash = ""
	b, err := json.Marshal(e)
	if err != nil {
		panic(err) // strings and numbers
	}
	return fmt.Sprintf("%x", sha256.Sum256(b))
}

// AppendAudit appends to the audit log. Seq, Previous and Hash are given by apply; Time too where it is 0.
type AppendAudit struct {
	Entries []AuditEntry `json:"entries"`
}

func (*AppendAudit) kind() (string, int) { return "append_audit", 1 }

func (c *AppendAudit) check() error {
	if len(c.Entries) == 0 || len(c.Entries) > auditAppendMax {
		return invalid("audit", fmt.Sprintf("%d entries", len(c.Entries)))
	}
	for _, e := range c.Entries {
		for _, s := range []string{e.Who, e.Via, e.From, e.Action, e.Object, e.Result, e.Detail, e.Request} {
			if len(s) > auditFieldMax || !utf8.ValidString(s) {
				return invalid("audit", "a field is too long or not UTF-8")
			}
		}
		if e.Seq != 0 || e.Previous != "" || e.Hash != "" || e.Action == "" {
			return invalid("audit", "an entry that is numbered already or says nothing")
		}
	}
	return nil
}

func (c *AppendAudit) apply(t *tx) (Result, error) {
	last := t.lastAudit()
	for _, e := range c.Entries {
		e.Seq, e.Previous = last.Seq+1, last.Hash
		if e.Time == 0 {
			e.Time = t.at
		}
		e.Hash = e.Sum()
		t.put(tAudit, &e)
		if e.Seq > AuditEntriesMax {
			if old, ok := first[AuditEntry](&t.View, tAudit, byID, auditKey(e.Seq-AuditEntriesMax)); ok {
				t.del(tAudit, old)
			}
		}
		last = e
	}
	return Result{Seq: last.Seq}, nil
}

func auditKey(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }

// lastAudit is the newest entry, or the zero one.
func (v *View) lastAudit() AuditEntry {
	obj, err := v.txn.Last(tAudit, byID+"_prefix", []byte(nil))
	if err != nil {
		panic(err)
	}
	if e, ok := obj.(*AuditEntry); ok {
		return *e
	}
	return AuditEntry{}
}

// Audit returns up to limit entries with a number greater than after, oldest first.
func (v *View) Audit(after uint64, limit int) []AuditEntry {
	it, err := v.txn.LowerBound(tAudit, byID, auditKey(after+1))
	if err != nil {
		panic(err)
	}
	var out []AuditEntry
	for obj := it.Next(); obj != nil && len(out) < limit; obj = it.Next() {
		out = append(out, *obj.(*AuditEntry))
	}
	return out
}

// VerifyAudit walks the chain. broken is the number of the first entry that does not fit, 0 if all do.
func (v *View) VerifyAudit() (firstSeq, lastSeq uint64, entries int, head string, broken uint64) {
	var previous *AuditEntry
	rows(v, tAudit, byID, nil, func(e *AuditEntry) bool {
		if previous == nil {
			firstSeq = e.Seq
		}
		fits := e.Hash == e.Sum() && (previous == nil || e.Seq == previous.Seq+1 && e.Previous == previous.Hash) &&
			(e.Seq > 1 || e.Previous == "")
		if !fits && broken == 0 {
			broken = e.Seq
		}
		entries++
		lastSeq, head, previous = e.Seq, e.Hash, e
		return true
	})
	return firstSeq, lastSeq, entries, head, broken
}

func auditTable(frame byte) object {
	o := rowObject[AuditEntry](frame, tAudit, map[string]index{byID: always(func(e *AuditEntry) []byte { return auditKey(e.Seq) })})
	o.commands = []func() Command{command[AppendAudit]}
	o.check = func(v *View) error {
		if _, _, _, _, broken := v.VerifyAudit(); broken != 0 {
			return fmt.Errorf("audit entry %d does not fit the chain", broken)
		}
		return nil
	}
	return o
}
