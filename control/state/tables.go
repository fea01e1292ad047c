package state

import (
	"encoding/binary"
	"errors"

	"github.com/google/uuid"
	"github.com/hashicorp/go-memdb"
)

// Tables and indexes of the namespace; other objects have theirs in their own files. Every index is unique and its
// argument is the finished key, so that a lookup neither reflects nor formats:
//
//	cluster id=1 byte · node id=uuid · token id=name · vpool id=uuid name=name fsid=fsid
//	inode   id=fsid|ino · name=fsid|parent|name · cookie=fsid|parent|cookie      (the root has no name and no cookie)
//	volume  id=uuid · pool=fsid|uuid      doomed id=uuid · pool=fsid|uuid
const (
	tCluster = "cluster"
	tNode    = "node"
	tToken   = "token"
	tVPool   = "vpool"
	tInode   = "inode"
	tVolume  = "volume"
	tDoomed  = "doomed"

	byID     = "id"
	byName   = "name"
	byFSID   = "fsid"
	byCookie = "cookie"
	byPool   = "pool"
)

var clusterKey = []byte{1}

func key2(a, b uint64) []byte {
	k := make([]byte, 0, 16)
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(k, a), b)
}

func key3(a, b, c uint64) []byte { return binary.BigEndian.AppendUint64(key2(a, b), c) }

func keyName(fsid, parent uint64, name string) []byte {
	k := make([]byte, 0, 16+len(name))
	return append(binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(k, fsid), parent), name...)
}

func keyFSID(fsid uint64) []byte { return binary.BigEndian.AppendUint64(nil, fsid) }

func keyPool(fsid uint64, id uuid.UUID) []byte { return append(keyFSID(fsid), id[:]...) }

// index derives an object's key; ok is false where the object is not in the index.
type index func(obj any) (key []byte, ok bool)

var errKey = errors.New("index argument is not a key")

// FromObject implements memdb.SingleIndexer.
func (f index) FromObject(obj any) (bool, []byte, error) {
	key, ok := f(obj)
	return ok, key, nil
}

// FromArgs implements memdb.Indexer.
func (f index) FromArgs(args ...any) ([]byte, error) {
	if len(args) == 1 {
		if key, ok := args[0].([]byte); ok {
			return key, nil
		}
	}
	return nil, errKey
}

// PrefixFromArgs implements memdb.PrefixIndexer.
func (f index) PrefixFromArgs(args ...any) ([]byte, error) { return f.FromArgs(args...) }

func always[T any](key func(*T) []byte) index {
	return func(obj any) ([]byte, bool) { return key(obj.(*T)), true }
}

func named(f func(*Inode) []byte) index {
	return func(obj any) ([]byte, bool) {
		n := obj.(*Inode)
		if n.Ino == RootIno {
			return nil, false
		}
		return f(n), true
	}
}

func table(name string, indexes map[string]index) *memdb.TableSchema {
	t := &memdb.TableSchema{Name: name, Indexes: make(map[string]*memdb.IndexSchema)}
	for n, f := range indexes {
		t.Indexes[n] = &memdb.IndexSchema{Name: n, Unique: true, AllowMissing: n != byID, Indexer: f}
	}
	return t
}

func newDB() *memdb.MemDB {
	schema := &memdb.DBSchema{Tables: make(map[string]*memdb.TableSchema)}
	for _, o := range objects {
		if o.table == nil {
			continue
		}
		if schema.Tables[o.table.Name] != nil {
			panic("two tables are called " + o.table.Name)
		}
		schema.Tables[o.table.Name] = o.table
	}
	db, err := memdb.NewMemDB(schema)
	if err != nil {
		panic(err) // the schema is a constant
	}
	return db
}
