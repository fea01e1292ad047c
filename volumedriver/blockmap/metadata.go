package blockmap

import (
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
)

// Update writes and deletes metadata records, all together and durably, along with all that was written before. Unlike
// Checkpoint it leaves dirty leaves where they are.
func (s *Store) Update(puts []KV, deletes [][]byte) error {
	if err := s.Err(); err != nil {
		return err
	}
	b := s.db.NewBatch()
	var err error
	for _, kv := range puts {
		err = errors.Join(err, b.Set(metadataKey(kv.Key), kv.Value, nil))
	}
	for _, k := range deletes {
		err = errors.Join(err, b.Delete(metadataKey(k), nil))
	}
	if err == nil {
		err = s.commit(b, pebble.Sync)
	}
	if err != nil {
		return fmt.Errorf("update the block map's metadata: %w", err)
	}
	return nil
}
