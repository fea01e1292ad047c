package seal

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"

	"github.com/google/uuid"
	"golang.org/x/crypto/argon2"

	"varve/volumedriver/vfs"
)

// KEK is the key encryption key of a vPool.
type KEK struct {
	id     uuid.UUID
	aead   cipher.AEAD
	secret *[SecretBytes]byte // see Key
}

// Wrapped is a volume's key as it lies in a root.
type Wrapped struct {
	KeyID   uuid.UUID `json:"key_id"`
	Wrapped []byte    `json:"wrapped"`
}

// NewKEK makes a KEK from random bytes.
func NewKEK() (*KEK, error) {
	secret := new([SecretBytes]byte)
	if _, err := rand.Read(secret[:]); err != nil {
		return nil, fmt.Errorf("make a key encryption key: %w", err)
	}
	return newKEK(secret)
}

// KEKFrom makes a KEK from a secret of SecretBytes that is kept elsewhere; the caller may clear its copy.
func KEKFrom(secret []byte) (*KEK, error) {
	if len(secret) != SecretBytes {
		return nil, fmt.Errorf("key encryption key of %d bytes, not %d", len(secret), SecretBytes)
	}
	return newKEK((*[SecretBytes]byte)(bytes.Clone(secret)))
}

// newKEK takes the secret over.
func newKEK(secret *[SecretBytes]byte) (*KEK, error) {
	id, err := hkdf.Key(sha256.New, secret[:], nil, "varve kek id", 16)
	if err != nil {
		return nil, fmt.Errorf("derive the id of a key encryption key: %w", err)
	}
	key, err := hkdf.Key(sha256.New, secret[:], nil, "varve kek", SecretBytes)
	if err != nil {
		return nil, fmt.Errorf("derive a key encryption key: %w", err)
	}
	defer clear(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return &KEK{id: uuid.UUID(id), aead: aead, secret: secret}, nil
}

// ID tells KEKs apart; it says nothing about the secret.
func (k *KEK) ID() uuid.UUID { return k.id }

// Erase overwrites the secret. Wrap and Unwrap must not be called any more.
func (k *KEK) Erase() {
	clear(k.secret[:])
	k.aead = nil
}

// String names the KEK without its secret.
func (k KEK) String() string { return "kek " + k.id.String() }

// Format prints the name whatever the verb; on a copy as well.
func (k KEK) Format(s fmt.State, _ rune) { io.WriteString(s, k.String()) }

// LogValue is what slog prints.
func (k KEK) LogValue() slog.Value { return slog.StringValue(k.id.String()) }

// MarshalText keeps the secret out of JSON.
func (k KEK) MarshalText() ([]byte, error) { return k.id.MarshalText() }

func wrapContext(pool, volume, key uuid.UUID) []byte {
	return bytes.Join([][]byte{[]byte("varve wrap"), pool[:], volume[:], key[:]}, nil)
}

// Wrap encrypts the volume's key. Each call gives other bytes.
func (k *KEK) Wrap(pool, volume uuid.UUID, key *Key) (Wrapped, error) {
	key.mu.RLock()
	defer key.mu.RUnlock()
	if key.erased {
		return Wrapped{}, fmt.Errorf("wrap %s of volume %s: %w", key, volume, ErrNoKey)
	}
	b := make([]byte, 1+16+nonceBytes, WrappedBytes)
	b[0] = wrapVersion
	copy(b[1:], k.id[:])
	nonce := b[17 : 17+nonceBytes]
	if _, err := rand.Read(nonce); err != nil {
		return Wrapped{}, fmt.Errorf("wrap %s of volume %s: %w", key, volume, err)
	}
	return Wrapped{key.id, k.aead.Seal(b, nonce, key.secret[:], wrapContext(pool, volume, key.id))}, nil
}

// Unwrap undoes Wrap: ErrWrongKey if another KEK wrapped it, ErrWrapped if it is damaged or another volume's.
func (k *KEK) Unwrap(pool, volume uuid.UUID, w Wrapped) (*Key, error) {
	id, err := w.KEK()
	if err != nil {
		return nil, fmt.Errorf("unwrap key %s of volume %s: %w", w.KeyID, volume, err)
	}
	if id != k.id {
		return nil, fmt.Errorf("unwrap key %s of volume %s, wrapped by kek %s, with %s: %w", w.KeyID, volume, id, k, ErrWrongKey)
	}
	secret, err := k.aead.Open(nil, w.Wrapped[17:17+nonceBytes], w.Wrapped[17+nonceBytes:], wrapContext(pool, volume, w.KeyID))
	if err != nil {
		return nil, fmt.Errorf("unwrap key %s of volume %s: %w", w.KeyID, volume, ErrWrapped)
	}
	return &Key{id: w.KeyID, secret: (*[SecretBytes]byte)(secret)}, nil
}

// KEK names the KEK that wrapped the key.
func (w Wrapped) KEK() (uuid.UUID, error) {
	if len(w.Wrapped) != WrappedBytes || w.Wrapped[0] != wrapVersion {
		return uuid.Nil, ErrWrapped
	}
	return uuid.UUID(w.Wrapped[1:17]), nil
}

// Rewrap wraps under to what from has wrapped.
func Rewrap(from, to *KEK, pool, volume uuid.UUID, w Wrapped) (Wrapped, error) {
	return WrapFor(from, pool, volume, w, to, pool, volume)
}

// WrapFor wraps another volume's key for a volume that shares it: a clone, or a copy in another vPool.
func WrapFor(from *KEK, pool, volume uuid.UUID, w Wrapped, to *KEK, toPool, toVolume uuid.UUID) (Wrapped, error) {
	key, err := from.Unwrap(pool, volume, w)
	if err != nil {
		return Wrapped{}, err
	}
	defer key.Erase()
	return to.Wrap(toPool, toVolume, key)
}

// A KEK file is one line: the magic, the secret in hexadecimal, and the id by which a damaged secret is noticed.
const (
	kekMagic     = "varve-kek-1"
	kekFileBytes = len(kekMagic) + 1 + 2*SecretBytes + 1 + 36 + 1
)

// CreateKEK makes a KEK and stores it in a new file that only its owner may read. fs.ErrExist if there is one.
func CreateKEK(files vfs.FS, name string) (*KEK, error) {
	k, err := NewKEK()
	if err != nil {
		return nil, err
	}
	if err := k.store(files, name); err != nil {
		return nil, fmt.Errorf("store %s in %s: %w", k, name, err)
	}
	return k, nil
}

func (k *KEK) store(files vfs.FS, name string) (err error) {
	temporary := name + "." + uuid.NewString()
	f, err := files.OpenFile(temporary, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, files.Remove(temporary)) }()
	line := fmt.Appendf(nil, "%s %x %s\n", kekMagic, k.secret[:], k.id)
	defer clear(line)
	_, err = f.WriteAt(line, 0)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := files.Link(temporary, name); err != nil { // fails if there is one, as a rename would not
		return err
	}
	return files.SyncDir(path.Dir(name))
}

// LoadKEK reads what CreateKEK has stored. It refuses a file that others may read.
func LoadKEK(files vfs.FS, name string) (*KEK, error) {
	k, err := loadKEK(files, name)
	if err != nil {
		return nil, fmt.Errorf("load a key encryption key from %s: %w", name, err)
	}
	return k, nil
}

func loadKEK(files vfs.FS, name string) (*KEK, error) {
	info, err := files.Stat(name)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("its mode is %v, others must have no access: %w", info.Mode().Perm(), fs.ErrPermission)
	}
	if info.Size() != int64(kekFileBytes) {
		return nil, fmt.Errorf("%d bytes, not %d: %w", info.Size(), kekFileBytes, ErrWrapped)
	}
	f, err := files.OpenFile(name, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	line := make([]byte, kekFileBytes)
	defer clear(line)
	if _, err := f.ReadAt(line, 0); err != nil {
		return nil, err
	}
	fields := bytes.Fields(line)
	if len(fields) != 3 || string(fields[0]) != kekMagic || len(fields[1]) != 2*SecretBytes {
		return nil, ErrWrapped
	}
	secret := new([SecretBytes]byte)
	if _, err := hex.Decode(secret[:], fields[1]); err != nil {
		return nil, ErrWrapped
	}
	k, err := newKEK(secret)
	if err != nil {
		return nil, err
	}
	if k.id.String() != string(fields[2]) {
		return nil, ErrWrapped
	}
	return k, nil
}

// Passphrase says how a KEK is made from a passphrase: argon2id (RFC 9106). It is stored in clear.
type Passphrase struct {
	Salt      []byte    `json:"salt"`
	Passes    uint32    `json:"passes"`
	MemoryKiB uint32    `json:"memory_kib"`
	Lanes     uint8     `json:"lanes"`
	KEK       uuid.UUID `json:"kek"` // what comes out; the zero UUID: not known yet
}

// Limits on what a stored Passphrase may ask for: they hold for the time and the memory of whoever opens the vPool.
const (
	passesMax    = 32
	memoryKiBMin = 8 << 10
	memoryKiBMax = 1 << 20
	lanesMax     = 16
)

// NewPassphrase gives a new salt and the second recommended parameters of RFC 9106: 3 passes over 64 MiB in 4 lanes.
func NewPassphrase() (Passphrase, error) {
	p := Passphrase{Salt: make([]byte, SaltBytes), Passes: 3, MemoryKiB: 64 << 10, Lanes: 4}
	if _, err := rand.Read(p.Salt); err != nil {
		return Passphrase{}, fmt.Errorf("make a salt: %w", err)
	}
	return p, nil
}

// Open makes the KEK. ErrWrongKey if p knows which one it must be and it is another.
func (p Passphrase) Open(passphrase []byte) (*KEK, error) {
	if len(p.Salt) != SaltBytes || p.Passes == 0 || p.Passes > passesMax || p.MemoryKiB < memoryKiBMin || p.MemoryKiB > memoryKiBMax ||
		p.Lanes == 0 || p.Lanes > lanesMax || len(passphrase) == 0 {
		return nil, errors.New("derive a key encryption key: empty passphrase, or parameters out of range")
	}
	k, err := newKEK((*[SecretBytes]byte)(argon2.IDKey(passphrase, p.Salt, p.Passes, p.MemoryKiB, p.Lanes, SecretBytes)))
	if err != nil {
		return nil, err
	}
	if p.KEK != uuid.Nil && p.KEK != k.id {
		k.Erase()
		return nil, fmt.Errorf("derive kek %s: %w", p.KEK, ErrWrongKey)
	}
	return k, nil
}
