package volumedriver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"

	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/sco"
	"varve/volumedriver/vfs"
)

// # The floor
//
// The map store keeps a journal of its own, and takes the first damaged record of the newest one for its torn end: a rotten
// bit would silently bring back an older map, whose log has been recycled since. So each checkpoint counts up a number that
// lies in the map, and, before the log lets anything go that the checkpoint covers, in a file beside it. A map that is older
// than that file is refused. One that is empty is not: it was lost whole, and knows no volume.
//
//	floor file   two slots of 4096 bytes, written in turn:  | "VFLOOR01" | number 8 | crc32c of the 16 bytes before 4 |

const (
	floorMagic = "VFLOOR01"
	floorKey   = "checkpoint"
)

// floor is how new the map must be.
type floor struct {
	file   vfs.File
	number uint64
}

// openFloor opens the file, or makes it, and compares it with the map.
func (d *Driver) openFloor() error {
	name := path.Join(d.cfg.Dir, "floor")
	info, err := d.cfg.FS.Stat(name)
	made := errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() < 2*blockSize // or a crash cut its making short
	if err != nil && !made {
		return fmt.Errorf("open %s: %w", name, err)
	}
	f, err := d.cfg.FS.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	d.floor.file = f
	if made {
		_, err := f.WriteAt(make([]byte, 2*blockSize), 0)
		if err == nil {
			err = f.Sync()
		}
		if err == nil {
			err = d.cfg.FS.SyncDir(d.cfg.Dir)
		}
		if err != nil {
			return fmt.Errorf("make %s: %w", name, err)
		}
	}
	low, err := readFloor(f)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	v, err := d.maps.Get([]byte(floorKey))
	if err == nil {
		d.floor.number, err = strconv.ParseUint(string(v), 10, 64)
	} else if errors.Is(err, blockmap.ErrNotFound) {
		d.floor.number, err = low, nil // a new map, or one that was lost whole: then it knows no volume
	}
	if err != nil {
		return fmt.Errorf("checkpoint number of the map: %w", errors.Join(blockio.ErrCorrupt, err))
	}
	if d.floor.number < low {
		return fmt.Errorf("the map is as of checkpoint %d, and %d was finished: it is damaged: %w", d.floor.number, low, blockio.ErrCorrupt)
	}
	return nil
}

// readFloor gives the highest number that an intact slot has; 0 if none has any.
func readFloor(f vfs.File) (low uint64, err error) {
	b := make([]byte, 20)
	for slot := range int64(2) {
		if _, err := f.ReadAt(b, slot*blockSize); err != nil {
			return 0, err
		}
		if string(b[:8]) == floorMagic && sco.Checksum(b[:16]) == binary.LittleEndian.Uint32(b[16:]) {
			low = max(low, binary.LittleEndian.Uint64(b[8:]))
		}
	}
	return low, nil
}

// next is the record with which a checkpoint of the map gets the next number.
func (f *floor) next() blockmap.KV {
	f.number++
	return blockmap.KV{Key: []byte(floorKey), Value: strconv.AppendUint(nil, f.number, 10)}
}

// raise makes the map's number the least that will be accepted.
func (f *floor) raise() error {
	b := make([]byte, 0, 20)
	b = append(b, floorMagic...)
	b = binary.LittleEndian.AppendUint64(b, f.number)
	b = binary.LittleEndian.AppendUint32(b, sco.Checksum(b))
	_, err := f.file.WriteAt(b, int64(f.number%2)*blockSize)
	if err == nil {
		err = f.file.Datasync()
	}
	if err != nil {
		return fmt.Errorf("raise the floor of the map: %w", err)
	}
	return nil
}

func (f *floor) close() error {
	if f.file == nil {
		return nil
	}
	return f.file.Close()
}
