package seal

import (
	"crypto/cipher"
	"encoding/binary"
	"fmt"

	"github.com/google/uuid"
)

// LogBlockBytes is the unit in which the write log's positions count.
const LogBlockBytes = 4096

// LogCipher encrypts the payload of one volume in one stretch of the write log, a segment in one use of it: AES-256-CTR under
// a subkey of its own. There is no tag: blocks stay as long as they are and may be read one at a time, and the log's checksums,
// which then are of the ciphertext, tell damage. The keystream of a block is fixed by its position, so a position must be
// written once under one salt; a segment that is used again, and a log that goes on after a crash, draws a new salt.
//
//	subkey  HKDF-SHA256 of the volume's key, with the salt, for "log" and the log's uuid and generation
//	counter of the first 16 bytes of block p: 256 p, as 16 bytes, big endian
//
// Methods may be called concurrently.
type LogCipher struct{ block cipher.Block }

// Log gives the cipher of the stretch of log that has this uuid, generation and salt.
func (k *Key) Log(log uuid.UUID, generation uint64, salt [SaltBytes]byte) (*LogCipher, error) {
	block, err := k.block("log", salt, binary.LittleEndian.AppendUint64(append([]byte(nil), log[:]...), generation))
	if err != nil {
		return nil, fmt.Errorf("encrypt log %s generation %d: %w", log, generation, err)
	}
	return &LogCipher{block}, nil
}

// XOR encrypts or decrypts blocks from position on into dst, which is as long as src and is it or does not overlap it.
func (c *LogCipher) XOR(dst, src []byte, position uint64) {
	if len(src)%LogBlockBytes != 0 || len(dst) != len(src) || position >= 1<<52 {
		panic(fmt.Sprintf("log cipher: %d bytes into %d at block %d", len(src), len(dst), position))
	}
	var counter [16]byte
	binary.BigEndian.PutUint64(counter[8:], position*(LogBlockBytes/16))
	cipher.NewCTR(c.block, counter[:]).XORKeyStream(dst, src)
}
