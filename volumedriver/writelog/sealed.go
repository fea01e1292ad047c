package writelog

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"hash/crc32"
	"sync"

	"github.com/google/uuid"

	"varve/volumedriver/seal"
)

// # Encrypted payload
//
// A Data record may come with a key of its volume. Its blocks are then encrypted when the batch has its place, since the
// keystream of a block is fixed by the place: seal.LogCipher of (log, generation, key salt of the segment), at the block's
// index in the segment. The checksums in the log become those of the ciphertext, so recovery needs no keys. CRCs are affine,
//
//	crc(plaintext xor keystream) = crc(plaintext) xor crc(keystream) xor crc(zeros)
//
// hence they are carried over from the guest's checksum without a look at the data, and Unseal carries them back: what spoils
// a block in memory on its way is noticed as if there were no encryption. Records without a key pay nothing.
//
// The key salt is drawn when a generation begins. A start that finds nothing intact behind the newest header goes on in that
// generation (adopt), where the torn first batch of the last run may have left ciphertext under the same keystream: only who
// has an image of the disk from before that start as well could use it.

var errNotThere = errors.New("log segment has no key salt")

var zerosCRC = crc32.Checksum(make([]byte, blockSize), castagnoli)

// sealing is what the encrypted blocks of one generation share.
type sealing struct {
	log  uuid.UUID
	gen  uint64
	salt [seal.SaltBytes]byte

	mu      sync.RWMutex
	ciphers map[uuid.UUID]*seal.LogCipher // by key
}

// cipher gives the cipher of the key for this generation.
func (s *sealing) cipher(key *seal.Key) (*seal.LogCipher, error) {
	s.mu.RLock()
	c := s.ciphers[key.ID()]
	s.mu.RUnlock()
	if c != nil {
		return c, nil
	}
	c, err := key.Log(s.log, s.gen, s.salt)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ciphers == nil {
		s.ciphers = make(map[uuid.UUID]*seal.LogCipher)
	}
	s.ciphers[key.ID()] = c
	return c, nil
}

// keystreams holds memory for the keystream of a block.
var keystreams = sync.Pool{New: func() any { return new([blockSize]byte) }}

// xor encrypts or decrypts whole blocks, of which the first is the segment's block number first, and carries the checksums
// over, if there are any.
func xor(c *seal.LogCipher, p []byte, crcs []uint32, first uint32) {
	k := keystreams.Get().(*[blockSize]byte)
	defer keystreams.Put(k)
	for i := 0; i*blockSize < len(p); i++ {
		clear(k[:])
		c.XOR(k[:], k[:], uint64(first)+uint64(i))
		block := p[i*blockSize : (i+1)*blockSize]
		subtle.XORBytes(block, block, k[:])
		if crcs != nil {
			crcs[i] ^= crc32.Checksum(k[:], castagnoli) ^ zerosCRC
		}
	}
}

// checkKey says whether a record to be appended has the key that it names.
func (r *Record) checkKey() error {
	if (r.Key != 0) != (r.SealKey != nil) {
		return fmt.Errorf("log record %d of volume %s: key %d without its bytes, or the other way round", r.Seq, r.Volume, r.Key)
	}
	return nil
}

// sealPayload encrypts the payload of the placed batch's records that have a key. What belongs to a key that was erased
// meanwhile, with its volume, is written as zeros: nobody could read it.
func (b *batch) sealPayload() error {
	if !b.sealed {
		return nil
	}
	s := b.segment.sealing.Load()
	if s == nil || s.gen != b.gen {
		return fmt.Errorf("encrypt batch %d: %w", b.number, errNotThere)
	}
	for i := range b.entries {
		e := &b.entries[i]
		if e.Key == 0 {
			continue
		}
		p := b.payload[int(e.first)*blockSize:][:e.Blocks*blockSize]
		crcs := b.crcs[e.first:][:e.Blocks]
		c, err := s.cipher(e.SealKey)
		switch {
		case errors.Is(err, seal.ErrNoKey):
			clear(p)
			for i := range crcs {
				crcs[i] = zerosCRC
			}
		case err != nil:
			return fmt.Errorf("encrypt batch %d: %w", b.number, err)
		default:
			xor(c, p, crcs, b.payloadBlock(e.first))
		}
	}
	return nil
}

// Unseal decrypts blocks that were read at loc, all of one record that was appended with the key, and turns crcs, unless
// nil, from those that the log has told into those of the plaintext. ErrStale as from ReadAt.
func (l *Log) Unseal(p []byte, crcs []uint32, loc Loc, key *seal.Key) error {
	if len(p)%blockSize != 0 || crcs != nil && len(crcs) != len(p)/blockSize {
		return fmt.Errorf("decrypt %d bytes and %d checksums of the log: not whole blocks", len(p), len(crcs))
	}
	seg := l.slots[loc.slot()].Load()
	if seg == nil {
		return ErrStale
	}
	s := seg.sealing.Load()
	if s == nil || s.gen&genMask != loc.gen() {
		return ErrStale
	}
	c, err := s.cipher(key)
	if err != nil {
		return fmt.Errorf("decrypt %d bytes of log segment %s: %w", len(p), seg.path, err)
	}
	xor(c, p, crcs, uint32(loc))
	return nil
}
