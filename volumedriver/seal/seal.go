// Package seal keeps the keys of encrypted volumes: it makes them, hands out what is derived from them, and wraps them so
// that they can lie beside the data that they protect.
//
// # Keys
//
//	KEK   key of a vPool, from a file or a passphrase; never on the backend      wraps
//	Key   key of a volume (DEK), 32 random bytes, named by a KeyID               derives, by HKDF-SHA256 with a random salt
//	subkey of one object or one stretch of log                                   encrypts
//
// Nothing is ever encrypted under a volume's key itself, and no subkey is used for two things: whoever writes draws a new
// salt of 16 random bytes for each object, and for each stretch of log, and stores it in clear with the ciphertext. So nonces
// may simply count within an object. That holds also when an object is built again after a failure, when a node is rolled
// back to an older state, or when a clone shares its parent's key, none of which a counter kept elsewhere would survive.
//
// A volume may have several keys over time: objects name theirs, new ones take the current one. A clone has its parent's
// keys too, wrapped again for the clone.
//
// # A wrapped key
//
//	| version 1 | KEK id 16 | nonce 12 | AES-256-GCM of the 32 bytes, and its tag 16 |                        = 77 bytes
//
// The additional data is "varve wrap", vPool, volume and KeyID, so a wrapped key can't be taken for another volume's. The KEK
// id is itself derived from the KEK: a wrong passphrase is told from a damaged root.
//
// # Rotation, and erasing
//
// A new KEK: Rewrap each wrapped key; no data is touched. A new volume key: new objects are written under it, and old ones
// follow when scrub moves them. Crypto-erase: forget the wrapped keys wherever they lie (Ring.Forget, the volume's roots on
// the backend); without them every copy of the data, wherever it is, is noise.
//
// Secrets are overwritten when they are erased, as far as Go lets one: the cipher states derived from them live until the
// garbage collector takes them. Key and KEK print as their ids.
package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"

	"github.com/google/uuid"
)

const (
	// SecretBytes is the size of every key.
	SecretBytes = 32
	// SaltBytes is the size of the salt that separates subkeys.
	SaltBytes = 16
	// WrappedBytes is the size of a wrapped key.
	WrappedBytes = 1 + 16 + nonceBytes + SecretBytes + tagBytes

	nonceBytes  = 12
	tagBytes    = 16
	wrapVersion = 1
)

var (
	// ErrNoKey: the key is not here, or was erased. What it protects can't be read, and must not be taken for damaged.
	ErrNoKey = errors.New("encryption key is not available")
	// ErrWrongKey: the KEK given is not the one that wrapped the key.
	ErrWrongKey = errors.New("wrong key encryption key or passphrase")
	// ErrWrapped: the wrapped key is damaged, or belongs to another volume.
	ErrWrapped = errors.New("wrapped key is not intact")
)

// Key is a volume's key. All methods may be called concurrently.
type Key struct {
	id     uuid.UUID
	mu     sync.RWMutex
	secret *[SecretBytes]byte // a pointer, since fmt prints what lies directly in a struct, also in unexported fields
	erased bool
}

// NewKey makes a key from random bytes.
func NewKey() (*Key, error) {
	id, err := uuid.NewRandom()
	if err != nil {
		return nil, fmt.Errorf("make a volume key: %w", err)
	}
	k := &Key{id: id, secret: new([SecretBytes]byte)}
	if _, err := rand.Read(k.secret[:]); err != nil {
		return nil, fmt.Errorf("make a volume key: %w", err)
	}
	return k, nil
}

// ID names the key; objects say it in clear.
func (k *Key) ID() uuid.UUID { return k.id }

// Salt gives new random bytes for one subkey.
func Salt() ([SaltBytes]byte, error) {
	var s [SaltBytes]byte
	_, err := rand.Read(s[:])
	return s, err
}

// AEAD gives AES-256-GCM under the subkey of (purpose, salt, context). ErrNoKey after Erase.
func (k *Key) AEAD(purpose string, salt [SaltBytes]byte, context []byte) (cipher.AEAD, error) {
	block, err := k.block(purpose, salt, context)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// block gives AES-256 under the subkey of (purpose, salt, context).
func (k *Key) block(purpose string, salt [SaltBytes]byte, context []byte) (cipher.Block, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if k.erased {
		return nil, fmt.Errorf("key %s: %w", k.id, ErrNoKey)
	}
	subkey, err := hkdf.Key(sha256.New, k.secret[:], salt[:], "varve "+purpose+"\x00"+string(context), SecretBytes)
	if err != nil {
		return nil, fmt.Errorf("derive a subkey of key %s: %w", k.id, err)
	}
	defer clear(subkey)
	return aes.NewCipher(subkey)
}

// Erase overwrites the secret. The key derives nothing any more.
func (k *Key) Erase() {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.secret[:])
	k.erased = true
}

// String names the key without its secret.
func (k *Key) String() string { return "key " + k.id.String() }

// Format prints the name whatever the verb.
func (k *Key) Format(s fmt.State, _ rune) { io.WriteString(s, k.String()) }

// LogValue is what slog prints.
func (k *Key) LogValue() slog.Value { return slog.StringValue(k.id.String()) }

// MarshalText keeps the secret out of JSON.
func (k *Key) MarshalText() ([]byte, error) { return k.id.MarshalText() }

// Ring holds the keys of one volume: those that its objects and its parents' were written under, and which one new objects
// take. The zero value is an empty ring, which stands for a volume that is not encrypted. Methods may be called concurrently.
type Ring struct {
	mu      sync.RWMutex
	keys    map[uuid.UUID]*Key
	current *Key
}

// Key gives the key of that name, or ErrNoKey. A nil ring has none.
func (r *Ring) Key(id uuid.UUID) (*Key, error) {
	if r != nil {
		r.mu.RLock()
		defer r.mu.RUnlock()
		if k := r.keys[id]; k != nil {
			return k, nil
		}
	}
	return nil, fmt.Errorf("key %s: %w", id, ErrNoKey)
}

// Current is the key for new objects; nil: they are not encrypted.
func (r *Ring) Current() *Key {
	if r == nil {
		return nil
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.current
}

// Add makes the key available for reading.
func (r *Ring) Add(k *Key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.addLocked(k)
}

// Use makes the key the one for new objects; nil: they will not be encrypted.
func (r *Ring) Use(k *Key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if k != nil {
		r.addLocked(k)
	}
	r.current = k
}

func (r *Ring) addLocked(k *Key) {
	if r.keys == nil {
		r.keys = make(map[uuid.UUID]*Key)
	}
	r.keys[k.id] = k
}

// IDs lists the keys in the ring, in no order.
func (r *Ring) IDs() []uuid.UUID {
	r.mu.RLock()
	defer r.mu.RUnlock()
	ids := make([]uuid.UUID, 0, len(r.keys))
	for id := range r.keys {
		ids = append(ids, id)
	}
	return ids
}

// Forget erases one key. If it is the current one, it stays current, so that nothing is written in clear by accident: building
// an object under it fails with ErrNoKey.
func (r *Ring) Forget(id uuid.UUID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if k := r.keys[id]; k != nil {
		k.Erase()
		delete(r.keys, id)
	}
}

// Erase forgets all keys.
func (r *Ring) Erase() {
	for _, id := range r.IDs() {
		r.Forget(id)
	}
}
