package writelog

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"github.com/google/uuid"

	"varve/volumedriver/vfs"
)

// meta is the content of log.meta, replaced whole by temp, sync, rename, sync of the directory:
//
//	magic 8 | format 4 | flags 4 (1: clean) | log 16 | segment bytes 8 | generation 8 | last batch 8 | chain 4 | boot id length 4
//	| verifier 8 | boot id 64 | … | crc 4 at 508
//
// generation is one that is known to exist (0: none was ever made). last batch and chain count when clean.
type meta struct {
	id           uuid.UUID
	segmentBytes int64
	generation   uint64
	clean        bool
	last         uint64
	chain        uint32
	verifier     [8]byte
	bootID       string
}

const (
	metaName      = "log.meta"
	metaMagic     = "varvlog\n"
	metaBytes     = 512
	metaCRCAt     = metaBytes - 4
	bootIDMax     = 64
	fencedName    = "fenced"
	lockName      = "lock"
	segmentPrefix = "seg-"
	segmentSuffix = ".log"
)

func (m *meta) encode() []byte {
	b := make([]byte, metaBytes)
	copy(b, metaMagic)
	le.PutUint32(b[8:], formatVersion)
	if m.clean {
		le.PutUint32(b[12:], 1)
	}
	copy(b[16:32], m.id[:])
	le.PutUint64(b[32:], uint64(m.segmentBytes))
	le.PutUint64(b[40:], m.generation)
	le.PutUint64(b[48:], m.last)
	le.PutUint32(b[56:], m.chain)
	n := copy(b[72:72+bootIDMax], m.bootID)
	le.PutUint32(b[60:], uint32(n))
	copy(b[64:72], m.verifier[:])
	le.PutUint32(b[metaCRCAt:], crcAround(b, metaCRCAt))
	return b
}

func parseMeta(b []byte) (meta, error) {
	if len(b) != metaBytes || string(b[:8]) != metaMagic {
		return meta{}, fmt.Errorf("%w: %s is not a write log's", ErrCorrupt, metaName)
	}
	if v := le.Uint32(b[8:]); v != formatVersion {
		return meta{}, fmt.Errorf("write log has format %d, this version of varve knows %d: start the version that wrote it",
			v, formatVersion)
	}
	if crcAround(b, metaCRCAt) != le.Uint32(b[metaCRCAt:]) {
		return meta{}, fmt.Errorf("%w: checksum of %s", ErrCorrupt, metaName)
	}
	m := meta{
		id:           uuid.UUID(b[16:32]),
		segmentBytes: int64(le.Uint64(b[32:])),
		generation:   le.Uint64(b[40:]),
		clean:        le.Uint32(b[12:])&1 != 0,
		last:         le.Uint64(b[48:]),
		chain:        le.Uint32(b[56:]),
		verifier:     [8]byte(b[64:72]),
	}
	n := le.Uint32(b[60:])
	if n > bootIDMax || m.segmentBytes < segmentBytesMin || m.segmentBytes > segmentBytesMax || m.segmentBytes%blockSize != 0 {
		return meta{}, fmt.Errorf("%w: %s says segments of %d bytes", ErrCorrupt, metaName, m.segmentBytes)
	}
	m.bootID = string(b[72 : 72+n])
	return m, nil
}

// readMeta gives fs.ErrNotExist if there is none.
func readMeta(fsys vfs.FS, dir string) (meta, error) {
	f, err := fsys.OpenFile(path.Join(dir, metaName), os.O_RDONLY, 0)
	if err != nil {
		return meta{}, fmt.Errorf("open %s: %w", metaName, err)
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return meta{}, fmt.Errorf("size of %s: %w", metaName, err)
	}
	if size != metaBytes {
		return meta{}, fmt.Errorf("%w: %s has %d bytes, want %d", ErrCorrupt, metaName, size, metaBytes)
	}
	b := make([]byte, metaBytes)
	if _, err := f.ReadAt(b, 0); err != nil {
		return meta{}, fmt.Errorf("read %s: %w", metaName, err)
	}
	return parseMeta(b)
}

func writeMeta(fsys vfs.FS, dir string, m *meta) error {
	name := path.Join(dir, metaName)
	if err := writeFile(fsys, name+".tmp", m.encode()); err != nil {
		return err
	}
	if err := fsys.Rename(name+".tmp", name); err != nil {
		return fmt.Errorf("rename %s.tmp: %w", name, err)
	}
	if err := fsys.SyncDir(dir); err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}

// writeFile makes a file with that content and syncs it, but not its name.
func writeFile(fsys vfs.FS, name string, b []byte) error {
	f, err := fsys.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("create %s: %w", name, err)
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", name, err), f.Close())
	}
	if err := f.Sync(); err != nil {
		return errors.Join(fmt.Errorf("sync %s: %w", name, err), f.Close())
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("close %s: %w", name, err)
	}
	return nil
}

func exists(fsys vfs.FS, name string) (bool, error) {
	_, err := fsys.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
