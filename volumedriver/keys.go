package volumedriver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend"
	"varve/volumedriver/blockio"
	"varve/volumedriver/qos"
	"varve/volumedriver/sco"
	"varve/volumedriver/seal"
	"varve/volumedriver/writelog"
)

// # Compression and encryption
//
// A vPool says how the SCOs of its volumes are made, a volume may say otherwise. A volume of an encrypting vPool has a key of
// its own, wrapped by the vPool's KEK in its root here and on the backend; SCOs name the key they were made under. Deleting
// the volume forgets its wrapped keys, and with them everything that was ever written, wherever copies of it lie.
//
// Without the KEK an encrypted volume keeps what it has in the log, cannot read its SCOs, and says so; nothing is ever
// written in clear instead.

// PoolOptions say how the objects of a vPool are made. The zero value: as they are.
type PoolOptions struct {
	Codec   sco.Codec
	Encrypt bool      // new volumes get a key; needs KEK
	KEK     *seal.KEK // wraps the volumes' keys
	OldKEKs []*seal.KEK
}

// volumeOptions is what a volume says otherwise than its vPool.
type volumeOptions struct {
	Codec  string        `json:"codec,omitempty"`
	Limits *qos.Limits   `json:"limits,omitempty"`
	Rewind time.Duration `json:"rewind_ns,omitempty"` // the window; 0: none
	Husk   bool          `json:"husk,omitempty"`      // the volume is deleted; it holds snapshots for others
}

// keyrings holds the unwrapped keys of volumes.
type keyrings struct {
	mu    sync.Mutex
	pools map[uuid.UUID]PoolOptions
	rings map[uuid.UUID]*seal.Ring
}

// SetPoolOptions says how the vPool's objects are made from now on.
func (d *Driver) SetPoolOptions(pool uuid.UUID, o PoolOptions) {
	d.keyrings.mu.Lock()
	if d.keyrings.pools == nil {
		d.keyrings.pools = make(map[uuid.UUID]PoolOptions)
	}
	d.keyrings.pools[pool] = o
	d.keyrings.mu.Unlock()
	d.destager.notify()
}

func (d *Driver) poolOptions(pool uuid.UUID) PoolOptions {
	d.keyrings.mu.Lock()
	defer d.keyrings.mu.Unlock()
	return d.keyrings.pools[pool]
}

// unwrap opens a volume's keys with the vPool's KEKs. A volume without keys has an empty ring.
func (o *PoolOptions) unwrap(pool, volume uuid.UUID, keys []seal.Wrapped) (*seal.Ring, error) {
	ring := new(seal.Ring)
	for _, w := range keys {
		id, err := w.KEK()
		if err != nil {
			return nil, fmt.Errorf("key of volume %s: %w", volume, err)
		}
		at := slices.IndexFunc(append([]*seal.KEK{o.KEK}, o.OldKEKs...), func(k *seal.KEK) bool { return k != nil && k.ID() == id })
		if at < 0 {
			return nil, fmt.Errorf("volume %s is encrypted, and its vPool's key encryption key %s is not here: %w", volume, id, seal.ErrNoKey)
		}
		k, err := append([]*seal.KEK{o.KEK}, o.OldKEKs...)[at].Unwrap(pool, volume, w)
		if err != nil {
			return nil, fmt.Errorf("key of volume %s: %w", volume, err)
		}
		ring.Use(k) // the last is the one for new objects
	}
	return ring, nil
}

// ring gives a volume's keys.
func (d *Driver) ring(volume uuid.UUID) (*seal.Ring, error) {
	d.keyrings.mu.Lock()
	defer d.keyrings.mu.Unlock()
	if r := d.keyrings.rings[volume]; r != nil {
		return r, nil
	}
	r, _, ok := d.rootNow(volume)
	if !ok {
		return nil, fmt.Errorf("keys of volume %s: %w", volume, ErrUnknownVolume)
	}
	o := d.keyrings.pools[r.Pool]
	ring, err := o.unwrap(r.Pool, volume, r.Keys)
	if err == nil {
		d.keyrings.holdLocked(volume, ring)
	}
	return ring, err
}

func (k *keyrings) holdLocked(volume uuid.UUID, ring *seal.Ring) {
	if k.rings == nil {
		k.rings = make(map[uuid.UUID]*seal.Ring)
	}
	k.rings[volume] = ring
}

// forget erases a volume's keys from memory.
func (k *keyrings) forget(volume uuid.UUID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if r := k.rings[volume]; r != nil {
		r.Erase()
		delete(k.rings, volume)
	}
}

// newKey makes a key for a volume of the vPool, if the vPool encrypts.
func (d *Driver) newKey(pool, volume uuid.UUID) ([]seal.Wrapped, error) {
	o := d.poolOptions(pool)
	if !o.Encrypt {
		return nil, nil
	}
	if o.KEK == nil {
		return nil, fmt.Errorf("vPool %s encrypts, and its key encryption key is not here: %w", pool, seal.ErrNoKey)
	}
	k, err := seal.NewKey()
	if err != nil {
		return nil, err
	}
	defer k.Erase()
	w, err := o.KEK.Wrap(pool, volume, k)
	if err != nil {
		return nil, err
	}
	return []seal.Wrapped{w}, nil
}

// keySource finds the keys of a volume's objects when one is asked for.
type keySource struct {
	d      *Driver
	volume uuid.UUID
}

// Key implements sco.KeySource.
func (s keySource) Key(id uuid.UUID) (*seal.Key, error) {
	ring, err := s.d.ring(s.volume)
	if err != nil {
		return nil, err
	}
	return ring.Key(id)
}

func (d *Driver) keys(volume uuid.UUID) sco.KeySource { return keySource{d, volume} }

// sealOptions say how the objects of a volume are made now.
func (d *Driver) sealOptions(r *root) (sco.Options, error) {
	o := sco.Options{Codec: d.poolOptions(r.Pool).Codec}
	if r.Options.Codec != "" {
		c, err := sco.ParseCodec(r.Options.Codec)
		if err != nil {
			return o, err
		}
		o.Codec = c
	}
	if len(r.Keys) == 0 {
		return o, nil
	}
	ring, err := d.ring(r.ID)
	if err != nil {
		return o, err
	}
	o.Key = ring.Current()
	return o, nil
}

// waitSealOptions waits until the volume's objects can be made: until its key is here.
func (v *Volume) waitSealOptions(ctx context.Context) (o sco.Options, err error) {
	err = v.d.retry(ctx, v, func(int, backend.Backend) error {
		v.mu.RLock()
		r := v.root
		v.mu.RUnlock()
		o, err = v.d.sealOptions(&r)
		return err
	})
	return o, err
}

// SetCodec makes the volume's SCOs otherwise than its vPool says, from now on; "" for as the vPool says.
func (v *Volume) SetCodec(codec string) error {
	if codec != "" {
		if _, err := sco.ParseCodec(codec); err != nil {
			return fmt.Errorf("volume %s: %w", v.id, err)
		}
	}
	return v.editRoot(func(r *root) { r.Options.Codec = codec })
}

// logKey is the key that new records of a volume are encrypted with, and its place among the volume's keys, from 1.
type logKey struct {
	number uint16
	key    *seal.Key
}

// useKeyLocked has a record encrypted if the volume is. order is held.
func (v *Volume) useKeyLocked(r *writelog.Record) error {
	if !v.encrypted.Load() {
		return nil
	}
	if v.logKey == nil {
		v.mu.RLock()
		n := len(v.root.Keys)
		v.mu.RUnlock()
		k, err := v.keyNumber(uint16(n))
		if err != nil {
			return err
		}
		v.logKey = &logKey{uint16(n), k}
	}
	r.Key, r.SealKey = v.logKey.number, v.logKey.key
	return nil
}

// keyNumber gives one of the volume's keys, counted from 1.
func (v *Volume) keyNumber(n uint16) (*seal.Key, error) {
	v.mu.RLock()
	keys := v.root.Keys
	v.mu.RUnlock()
	if n == 0 || int(n) > len(keys) {
		return nil, fmt.Errorf("key %d of volume %s, which has %d: %w", n, v.id, len(keys), blockio.ErrCorrupt)
	}
	ring, err := v.d.ring(v.id)
	if err != nil {
		return nil, err
	}
	return ring.Key(keys[n-1].KeyID)
}

// unseal decrypts blocks read from the log, if they are encrypted, and carries their checksums over.
func (v *Volume) unseal(p []byte, crcs []uint32, loc writelog.Loc, key uint16) error {
	if key == 0 {
		return nil
	}
	k, err := v.keyNumber(key)
	if err != nil {
		return err
	}
	return v.d.wal.Unseal(p, crcs, loc, k)
}

// keysMax bounds how often a volume's key can be rotated: a record names its key in 16 bits.
const keysMax = 1<<16 - 1

// RotateKey gives an encrypted volume a new key for what is written from now on. What was written before stays under the
// old one until the scrub moves it.
func (v *Volume) RotateKey() error {
	v.mu.RLock()
	pool, has := v.root.Pool, len(v.root.Keys) > 0
	v.mu.RUnlock()
	if !has {
		return fmt.Errorf("rotate the key of volume %s: it is not encrypted: %w", v.id, seal.ErrNoKey)
	}
	keys, err := v.d.newKey(pool, v.id)
	if err != nil {
		return fmt.Errorf("rotate the key of volume %s: %w", v.id, err)
	}
	if keys == nil {
		return fmt.Errorf("rotate the key of volume %s: its vPool does not encrypt any more: %w", v.id, seal.ErrNoKey)
	}
	err = v.editRoot(func(r *root) {
		if len(r.Keys) < keysMax {
			r.Keys = append(slices.Clone(r.Keys), keys...)
		}
	})
	if err != nil {
		return err
	}
	v.d.keyrings.mu.Lock()
	delete(v.d.keyrings.rings, v.id) // unwrapped anew, with the new one
	v.d.keyrings.mu.Unlock()
	v.order.Lock()
	v.logKey = nil
	v.order.Unlock()
	return nil
}

// RewrapKeys wraps the keys of all volumes of a vPool under its present KEK; then the old ones are needed no more.
func (d *Driver) RewrapKeys(ctx context.Context, pool uuid.UUID) error {
	o := d.poolOptions(pool)
	if o.KEK == nil {
		return fmt.Errorf("rewrap the keys of vPool %s: %w", pool, seal.ErrNoKey)
	}
	for _, r := range d.rootsOf(pool) {
		if len(r.Keys) == 0 {
			continue
		}
		v, err := d.volume(ctx, r.ID)
		if errors.Is(err, ErrUnknownVolume) {
			continue
		}
		if err != nil {
			return err
		}
		var failed error
		err = v.editRoot(func(r *root) {
			keys := slices.Clone(r.Keys)
			for i, w := range keys {
				for _, k := range append([]*seal.KEK{o.KEK}, o.OldKEKs...) {
					if id, err := w.KEK(); err == nil && k.ID() == id {
						keys[i], failed = seal.Rewrap(k, o.KEK, r.Pool, r.ID, w)
						break
					}
				}
				if failed != nil {
					return
				}
			}
			r.Keys = keys
		})
		if err := errors.Join(err, failed); err != nil {
			return fmt.Errorf("rewrap the keys of volume %s: %w", r.ID, err)
		}
	}
	return nil
}

// RotateKeys gives every encrypted volume of a vPool a new key for what is written from now on; progress, which may be nil, is told
// volumes. It can be cut off and called again: some then have one more key.
func (d *Driver) RotateKeys(ctx context.Context, pool uuid.UUID, progress func(done, total int64)) error {
	roots := slices.DeleteFunc(d.rootsOf(pool), func(r root) bool { return len(r.Keys) == 0 })
	for i, r := range roots {
		if err := ctx.Err(); err != nil {
			return err
		}
		v, err := d.Volume(ctx, r.ID)
		if err == nil {
			err = v.RotateKey()
		}
		if err != nil && !errors.Is(err, ErrUnknownVolume) && !errors.Is(err, blockio.ErrClosed) { // deleted meanwhile
			return err
		}
		if progress != nil {
			progress(int64(i+1), int64(len(roots)))
		}
	}
	return d.waitRoots(ctx, pool)
}

// waitRoots waits until the backend has the root objects of all encrypted volumes of a vPool as they are now: a rebuild finds the
// volumes' keys there.
func (d *Driver) waitRoots(ctx context.Context, pool uuid.UUID) error {
	for {
		d.destager.notify()
		waits := slices.ContainsFunc(d.rootsOf(pool), func(r root) bool { return len(r.Keys) > 0 && !r.Name.Put && r.Name.Path != "" })
		if !waits {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the root objects of vPool %s: %w", pool, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// editRoot changes the volume's root durably, here at once and soon on the backend.
func (v *Volume) editRoot(edit func(*root)) error {
	v.storing.Lock()
	r := v.stored
	edit(&r)
	r.Name.N++
	r.Name.Put = false
	err := v.storeLocked(r)
	if err == nil {
		v.mu.Lock()
		v.root.Keys, v.root.Options, v.root.Template, v.root.Name = r.Keys, r.Options, r.Template, r.Name
		v.mu.Unlock()
	}
	v.storing.Unlock()
	v.d.destager.add(v)
	return err
}

// keepEdited takes over into r what only editRoot, Rename and activations change. storing is held.
func (r *root) keepEdited(stored *root) {
	r.NextSCO, r.Name, r.Epochs = stored.NextSCO, stored.Name, stored.Epochs
	r.Template, r.Keys, r.Options = stored.Template, stored.Keys, stored.Options
}

// encode is how a root object carries a volume's options.
func (o volumeOptions) encode() json.RawMessage {
	if o == (volumeOptions{}) {
		return nil
	}
	b, err := json.Marshal(o)
	if err != nil {
		panic(fmt.Sprintf("encode volume options: %v", err)) // strings
	}
	return b
}
