// Package secrets keeps what must be known to the cluster and to nobody else: credentials of S3 stores, hypervisors, mail servers.
// State, and so the raft log, snapshots and backups, hold only ciphertext; the key encryption key is in a file of each node.
//
//	k, err := secrets.OpenKeys(dir)                  // dir/secrets.key, mode 0600, made if it is missing
//	s := secrets.New(raft, state, k)
//	s.Set(ctx, name, plain) · s.Get(name) (plain, error) · s.Seal(name, plain), for a command that carries it · s.Rotate(ctx)
//
// A sealed secret:
//
//	| version 1 | nonce 12 | AES-256-GCM of the secret, and its tag 16 |      additional data: "varve secret", key id, name
//
// so it can be taken for no other secret, and a wrong key is told from damage by its id, which is stored beside it and which is a
// hash of the key. Nonces are random: the limit of 2^32 secrets per key is far away.
//
// # Rotation
//
//	new key -> file, beside the old ones                         and the files of all other nodes
//	new key is the current one                                   durable before anything is sealed by it
//	every secret not sealed by it: open, seal, SetSecret at its rev     one that changed meanwhile is sealed by it already
//	keys older than the former one that no secret names -> removed from the file
//
// The former key stays for one rotation more, since a command sealed by it may be on its way. It may be cut anywhere and run again.
// A node that is away when keys are rotated stops the rotation: were this node lost next, nobody could open what it has sealed.
//
// # In a cluster
//
// A node gets the keys when it joins, in the answer to its join token. One that meets a secret sealed by a key that it has not asks the
// others (Missing, Bundle, Add). Keys go over connections between nodes only, which are encrypted and whose ends are known.
//
// A secret that is too large for raft, or a file that others can read, is refused.
package secrets

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"varve/control/durable"
	"varve/control/state"
)

const (
	fileName     = "secrets.key"
	fileBytesMax = 64 << 10
	keyBytes     = 32
	keysMax      = 64
	version      = 1
	nonceBytes   = 12
)

// key is a key encryption key. It has no printed form.
type key struct {
	id     string
	secret []byte
	aead   cipher.AEAD
}

func (k *key) String() string { return "key " + k.id }

func newKey(secret []byte) (*key, error) {
	if len(secret) != keyBytes {
		return nil, fmt.Errorf("key of %d bytes, want %d", len(secret), keyBytes)
	}
	block, err := aes.NewCipher(secret)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(append([]byte("varve secrets key id"), secret...))
	return &key{id: hex.EncodeToString(sum[:8]), secret: secret, aead: aead}, nil
}

// Keys are the key encryption keys of this node.
type Keys struct {
	dir string

	mu      sync.Mutex // guards the rest
	current *key
	all     map[string]*key
}

// file is what dir/secrets.key holds.
type file struct {
	Current string   `json:"current"`
	Keys    [][]byte `json:"keys"`
}

// OpenKeys reads the keys in dir, and makes one if there is no file.
func OpenKeys(dir string) (*Keys, error) {
	k := &Keys{dir: dir, all: make(map[string]*key)}
	path := filepath.Join(dir, fileName)
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		fresh, err := k.grow()
		if err != nil {
			return nil, err
		}
		k.current = fresh
		return k, k.save()
	}
	if err != nil {
		return nil, fmt.Errorf("key file of secrets: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 || !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s has mode %s, so others can read it: chmod 600 it, and rotate the secrets", path, info.Mode())
	}
	if info.Size() > fileBytesMax {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", path, info.Size(), fileBytesMax)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("key file of secrets: %w", err)
	}
	if err := k.load(b, true); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return k, nil
}

// load takes keys from a file or a bundle.
func (k *Keys) load(b []byte, current bool) error {
	var f file
	if err := json.Unmarshal(b, &f); err != nil {
		return errors.New("it is no key file") // the text of the error may have parts of it
	}
	if len(f.Keys)+len(k.all) > keysMax {
		return fmt.Errorf("%d keys, more than %d", len(f.Keys)+len(k.all), keysMax)
	}
	for _, secret := range f.Keys {
		one, err := newKey(secret)
		if err != nil {
			return err
		}
		if k.all[one.id] == nil {
			k.all[one.id] = one
		}
	}
	if !current {
		return nil
	}
	k.current = k.all[f.Current]
	if k.current == nil {
		return fmt.Errorf("its current key %s is not in it", f.Current)
	}
	return nil
}

// grow makes a key and adds it.
func (k *Keys) grow() (*key, error) {
	if len(k.all) >= keysMax {
		return nil, fmt.Errorf("%d keys of secrets are in use", len(k.all))
	}
	secret := make([]byte, keyBytes)
	rand.Read(secret)
	one, err := newKey(secret)
	if err != nil {
		return nil, err
	}
	k.all[one.id] = one
	return one, nil
}

func (k *Keys) encode() ([]byte, error) { return k.encodeAs(k.current) }

// encodeAs is the file with another key as the current one.
func (k *Keys) encodeAs(current *key) ([]byte, error) {
	f := file{Current: current.id}
	for _, one := range k.all {
		f.Keys = append(f.Keys, one.secret)
	}
	slices.SortFunc(f.Keys, slices.Compare)
	return json.Marshal(f)
}

// Has says whether a key is here, by its id.
func (k *Keys) Has(id string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.all[id] != nil
}

// BundleOf gives the keys in dir to a node that joins; nil where there are none yet.
func BundleOf(dir string) ([]byte, error) {
	if _, err := os.Stat(filepath.Join(dir, fileName)); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	k, err := OpenKeys(dir)
	if err != nil {
		return nil, err
	}
	return k.Bundle()
}

// Adopt makes a bundle's keys those of dir. A key that is there already stays, for what it has sealed.
func Adopt(dir string, bundle []byte) error {
	k := &Keys{dir: dir, all: make(map[string]*key)}
	if _, err := os.Stat(filepath.Join(dir, fileName)); !errors.Is(err, fs.ErrNotExist) {
		if k, err = OpenKeys(dir); err != nil {
			return err
		}
	}
	return k.Add(bundle)
}

func (k *Keys) save() error {
	b, err := k.encode()
	if err != nil {
		return err
	}
	return durable.Replace(k.dir, fileName, b, 0o600)
}

// Bundle gives the keys to another node of the cluster. It is a secret.
func (k *Keys) Bundle() ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.encode()
}

// Add takes the keys of a bundle; its current one is this node's from then on.
func (k *Keys) Add(bundle []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(bundle) > fileBytesMax {
		return fmt.Errorf("bundle of %d bytes, more than %d", len(bundle), fileBytesMax)
	}
	if err := k.load(bundle, true); err != nil {
		return fmt.Errorf("add keys of secrets: %w", err)
	}
	return k.save()
}

func aad(keyID, name string) []byte { return []byte("varve secret\x00" + keyID + "\x00" + name) }

func (k *Keys) seal(name string, plain []byte) (keyID string, sealed []byte) {
	k.mu.Lock()
	one := k.current
	k.mu.Unlock()
	sealed = make([]byte, 1+nonceBytes, 1+nonceBytes+len(plain)+one.aead.Overhead())
	sealed[0] = version
	rand.Read(sealed[1:])
	return one.id, one.aead.Seal(sealed, sealed[1:], plain, aad(one.id, name))
}

func (k *Keys) open(s state.SealedSecret) ([]byte, error) {
	k.mu.Lock()
	one := k.all[s.Key]
	k.mu.Unlock()
	object := "secret " + s.Name
	if one == nil {
		return nil, &state.Error{Err: ErrSealed, Object: object, Detail: "sealed by key " + s.Key + ", which " + filepath.Join(k.dir, fileName) + " does not hold",
			Remedy: "put that file back, or set the secret again"}
	}
	if len(s.Sealed) < 1+nonceBytes || s.Sealed[0] != version {
		return nil, &state.Error{Err: ErrSealed, Object: object, Detail: "damaged, or written by a newer version", Remedy: "set the secret again"}
	}
	plain, err := one.aead.Open(nil, s.Sealed[1:1+nonceBytes], s.Sealed[1+nonceBytes:], aad(s.Key, s.Name))
	if err != nil {
		return nil, &state.Error{Err: ErrSealed, Object: object, Detail: "damaged", Remedy: "set the secret again"}
	}
	return plain, nil
}

// ErrSealed: the secret cannot be opened here.
var ErrSealed = errors.New("secret cannot be opened")

// Proposer commits a command; control's raft node is one.
type Proposer interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}

// Store of secrets.
type Store struct {
	raft  Proposer
	state *state.Store
	keys  *Keys
	share func(ctx context.Context, bundle []byte) error
}

// New wires a store.
func New(raft Proposer, st *state.Store, keys *Keys) *Store {
	return &Store{raft: raft, state: st, keys: keys}
}

// Share says how keys get to the other nodes. It returns nil when all of them have a bundle. It is called before the store is used.
func (s *Store) Share(f func(ctx context.Context, bundle []byte) error) { s.share = f }

// Missing says whether there are secrets that no key here opens.
func (s *Store) Missing() bool {
	return slices.ContainsFunc(s.state.View().Secrets(), func(sealed state.SealedSecret) bool { return !s.keys.Has(sealed.Key) })
}

// Bundle gives the keys to another node, Add takes those of another one.
func (s *Store) Bundle() ([]byte, error) { return s.keys.Bundle() }

// Add takes the keys of a bundle; its current one is this node's from then on.
func (s *Store) Add(bundle []byte) error { return s.keys.Add(bundle) }

// Seal gives the command that keeps a secret, for those that carry it along.
func (s *Store) Seal(name string, plain []byte) *state.SetSecret {
	id, sealed := s.keys.seal(name, plain)
	return &state.SetSecret{Name: name, Key: id, Sealed: sealed}
}

// Set keeps a secret, in place of the one of that name.
func (s *Store) Set(ctx context.Context, name string, plain []byte) error {
	if _, err := s.raft.Apply(ctx, s.Seal(name, plain)); err != nil {
		return fmt.Errorf("keep secret %s: %w", name, err)
	}
	return nil
}

// Get opens a secret. state.ErrNotFound, ErrSealed.
func (s *Store) Get(name string) ([]byte, error) {
	sealed, err := s.state.View().Secret(name)
	if err != nil {
		return nil, err
	}
	return s.keys.open(sealed)
}

// Delete forgets a secret; nil if there was none.
func (s *Store) Delete(ctx context.Context, name string) error {
	if _, err := s.raft.Apply(ctx, &state.DeleteSecret{Name: name}); err != nil && !errors.Is(err, state.ErrNotFound) {
		return fmt.Errorf("forget secret %s: %w", name, err)
	}
	return nil
}

// Rotate seals every secret by a new key, and says how many. Secrets that cannot be opened here are left as they are, with an error.
func (s *Store) Rotate(ctx context.Context) (sealed int, err error) {
	k := s.keys
	k.mu.Lock()
	was := k.current
	fresh, err := k.grow()
	if err == nil {
		if err = k.save(); err != nil {
			delete(k.all, fresh.id)
		}
	}
	var bundle []byte
	if err == nil {
		bundle, err = k.encodeAs(fresh)
	}
	k.mu.Unlock()
	if err == nil && s.share != nil {
		err = s.share(ctx, bundle) // before anything is sealed by it
	}
	if err != nil {
		return 0, fmt.Errorf("rotate the key of secrets: %w", err)
	}
	k.mu.Lock()
	k.current = fresh
	if err = k.save(); err != nil {
		k.current = was
	}
	k.mu.Unlock()
	if err != nil {
		return 0, fmt.Errorf("rotate the key of secrets: %w", err)
	}
	var errs []error
	for _, old := range s.state.View().Secrets() {
		if old.Key == fresh.id {
			continue
		}
		plain, err := k.open(old)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		cmd := s.Seal(old.Name, plain)
		clear(plain)
		cmd.Rev = old.Rev
		_, err = s.raft.Apply(ctx, cmd)
		switch {
		case err == nil:
			sealed++
		case errors.Is(err, state.ErrConflict) || errors.Is(err, state.ErrNotFound): // set anew or deleted meanwhile
		default:
			return sealed, errors.Join(append(errs, fmt.Errorf("seal secret %s anew: %w", old.Name, err))...)
		}
	}
	errs = append(errs, s.forgetOld(was))
	return sealed, errors.Join(errs...)
}

// forgetOld removes the keys that seal nothing any more, but for the former one.
func (s *Store) forgetOld(former *key) error {
	used := make(map[string]bool)
	for _, sealed := range s.state.View().Secrets() {
		used[sealed.Key] = true
	}
	k := s.keys
	k.mu.Lock()
	defer k.mu.Unlock()
	gone := make(map[string]*key)
	for id, one := range k.all {
		if one != k.current && one != former && !used[id] {
			gone[id] = one
			delete(k.all, id)
		}
	}
	if len(gone) == 0 {
		return nil
	}
	if err := k.save(); err != nil {
		for id, one := range gone {
			k.all[id] = one
		}
		return fmt.Errorf("forget old keys of secrets: %w", err)
	}
	for _, one := range gone {
		clear(one.secret)
	}
	return nil
}
