package state

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/google/uuid"
)

// Command is one change of the state. Only this package's commands are.
type Command interface {
	// kind is the command's name in the log and its version. A change of its fields or meaning takes a new version; a new
	// field that is left out when it is zero, and then means what was done before, does not.
	kind() (name string, version int)
	// check refuses what is wrong whatever the state is. It runs before a command enters the log and again in apply.
	check() error
	apply(*tx) (Result, error)
}

// ErrUnknownCommand: an entry of a type or version that this binary does not know.
var ErrUnknownCommand = errors.New("unknown command")

// ErrCorruptEntry: an entry that is not what Encode wrote.
var ErrCorruptEntry = errors.New("corrupt log entry")

// kinds are the types of command that the objects bring, by name.
var kinds = commandKinds(objects)

type commandKind struct {
	version int
	new     func() Command
}

func commandKinds(objects []object) map[string]commandKind {
	kinds := make(map[string]commandKind)
	for _, o := range objects {
		for _, f := range o.commands {
			name, version := f().kind()
			if _, twice := kinds[name]; twice {
				panic("two commands are called " + name)
			}
			kinds[name] = commandKind{version, f}
		}
	}
	return kinds
}

// command makes an empty command of a type: an entry of object.commands.
func command[T any, P interface {
	*T
	Command
}]() Command {
	return P(new(T))
}

type envelope struct {
	Version int             `json:"v"`
	Type    string          `json:"t"`
	ID      uuid.UUID       `json:"id"`
	At      Time            `json:"at"`
	Base    uint64          `json:"b,omitempty"`
	Payload json.RawMessage `json:"p"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Encode makes the log entry of a command. id makes the command happen once, however often it is proposed; at is the
// proposer's clock.
func Encode(cmd Command, id uuid.UUID, at Time) ([]byte, error) { return EncodeAfter(cmd, id, at, 0) }

// EncodeAfter is Encode for an entry that may be proposed again and again: base is the index that the proposer has seen, before
// which this command cannot have been applied. 0 trusts the window.
func EncodeAfter(cmd Command, id uuid.UUID, at Time, base uint64) ([]byte, error) {
	if cmd == nil {
		return nil, fmt.Errorf("encode nothing: %w", ErrUnknownCommand)
	}
	name, version := cmd.kind()
	if _, ok := kinds[name]; !ok {
		return nil, fmt.Errorf("encode %T: %w", cmd, ErrUnknownCommand)
	}
	if id == uuid.Nil {
		return nil, invalid("command "+name, "no id")
	}
	if err := cmd.check(); err != nil {
		return nil, err
	}
	payload, err := json.Marshal(cmd)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", name, err)
	}
	body, err := json.Marshal(envelope{Version: version, Type: name, ID: id, At: at, Base: base, Payload: payload})
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", name, err)
	}
	if len(body) > EntryBytesMax-4 {
		return nil, invalid("command "+name, fmt.Sprintf("%d bytes, more than %d", len(body), EntryBytesMax))
	}
	entry := binary.LittleEndian.AppendUint32(make([]byte, 0, 4+len(body)), crc32.Checksum(body, castagnoli))
	return append(entry, body...), nil
}

func decode(entry []byte) (Command, envelope, error) {
	if len(entry) < 4 || len(entry) > EntryBytesMax {
		return nil, envelope{}, fmt.Errorf("%w: %d bytes", ErrCorruptEntry, len(entry))
	}
	sum, body := binary.LittleEndian.Uint32(entry), entry[4:]
	if got := crc32.Checksum(body, castagnoli); got != sum {
		return nil, envelope{}, fmt.Errorf("%w: checksum %08x, want %08x", ErrCorruptEntry, got, sum)
	}
	var env envelope
	if err := strict(body, &env); err != nil {
		return nil, envelope{}, fmt.Errorf("%w: %w", ErrCorruptEntry, err)
	}
	kind, ok := kinds[env.Type]
	if !ok || env.Version != kind.version {
		return nil, envelope{}, fmt.Errorf("%w: %q version %d", ErrUnknownCommand, env.Type, env.Version)
	}
	cmd := kind.new()
	if err := strict(env.Payload, cmd); err != nil {
		return nil, envelope{}, fmt.Errorf("%w: %s: %w", ErrCorruptEntry, env.Type, err)
	}
	if env.ID == uuid.Nil {
		return nil, envelope{}, fmt.Errorf("%w: %s: no id", ErrCorruptEntry, env.Type)
	}
	if err := cmd.check(); err != nil {
		return nil, envelope{}, fmt.Errorf("%w: %w", ErrCorruptEntry, err)
	}
	return cmd, env, nil
}

// strict decodes one JSON value with no unknown field and nothing after it.
func strict(b []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("bytes after the value")
	}
	return nil
}

// tx is what a command sees and changes: the state as of its entry.
type tx struct {
	View
	index uint64
	at    Time
	// id is the command's; derived counts the ids made from it.
	id      uuid.UUID
	derived int
	// published counts the events of this entry, lastSeq is that of the last.
	published int
	lastSeq   uint64
}

// put inserts or replaces a row. The schema is constant and rows have their keys, so an error is a broken invariant.
func (t *tx) put(table string, row any) {
	if err := t.txn.Insert(table, row); err != nil {
		panic(err)
	}
}

func (t *tx) del(table string, row any) {
	if err := t.txn.Delete(table, row); err != nil {
		panic(err)
	}
}

// after is the command's time, but later than last: clients compare ctimes to notice a change.
func (t *tx) after(last Time) Time { return max(t.at, last+1) }
