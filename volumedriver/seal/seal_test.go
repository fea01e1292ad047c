package seal

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"varve/volumedriver/vfs"
)

var (
	pool   = uuid.MustParse("11111111-2222-4333-8444-555555555555")
	volume = uuid.MustParse("6f0a4c0e-2a5e-4c1d-9a77-0f5b1c2d3e4f")
)

func newKey(t testing.TB) *Key {
	t.Helper()
	k, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newKEKT(t testing.TB) *KEK {
	t.Helper()
	k, err := NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// sameKey says whether two keys derive the same.
func sameKey(t *testing.T, a, b *Key) bool {
	t.Helper()
	x, err := a.AEAD("test", [SaltBytes]byte{1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	y, err := b.AEAD("test", [SaltBytes]byte{1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	nonce := make([]byte, nonceBytes)
	return a.ID() == b.ID() && bytes.Equal(x.Seal(nil, nonce, []byte("x"), nil), y.Seal(nil, nonce, []byte("x"), nil))
}

func TestWrap(t *testing.T) {
	key, kek, other := newKey(t), newKEKT(t), newKEKT(t)
	w, err := kek.Wrap(pool, volume, key)
	if err != nil || len(w.Wrapped) != WrappedBytes || w.KeyID != key.ID() {
		t.Fatal(w, err)
	}
	again, err := kek.Wrap(pool, volume, key)
	if err != nil || bytes.Equal(w.Wrapped, again.Wrapped) {
		t.Fatal("wrapped twice to the same bytes", err)
	}
	got, err := kek.Unwrap(pool, volume, w)
	if err != nil || !sameKey(t, got, key) {
		t.Fatal(got, err)
	}
	if _, err := other.Unwrap(pool, volume, w); !errors.Is(err, ErrWrongKey) {
		t.Errorf("another KEK: %v", err)
	}
	for name, unwrap := range map[string]func() (*Key, error){
		"vPool":  func() (*Key, error) { return kek.Unwrap(uuid.New(), volume, w) },
		"volume": func() (*Key, error) { return kek.Unwrap(pool, uuid.New(), w) },
		"id":     func() (*Key, error) { return kek.Unwrap(pool, volume, Wrapped{uuid.New(), w.Wrapped}) },
		"length": func() (*Key, error) { return kek.Unwrap(pool, volume, Wrapped{w.KeyID, w.Wrapped[:WrappedBytes-1]}) },
		"empty":  func() (*Key, error) { return kek.Unwrap(pool, volume, Wrapped{KeyID: w.KeyID}) },
	} {
		if _, err := unwrap(); !errors.Is(err, ErrWrapped) {
			t.Errorf("another %s: %v", name, err)
		}
	}
	for i := range WrappedBytes * 8 {
		b := bytes.Clone(w.Wrapped)
		b[i/8] ^= 1 << (i % 8)
		if _, err := kek.Unwrap(pool, volume, Wrapped{w.KeyID, b}); !errors.Is(err, ErrWrapped) && !errors.Is(err, ErrWrongKey) {
			t.Errorf("bit %d: %v", i, err)
		}
	}
}

// TestRotation: a new KEK opens what was wrapped by the old one, for the same volume and for a clone, and the old one no more.
func TestRotation(t *testing.T) {
	key, from, to := newKey(t), newKEKT(t), newKEKT(t)
	w, err := from.Wrap(pool, volume, key)
	if err != nil {
		t.Fatal(err)
	}
	rotated, err := Rewrap(from, to, pool, volume, w)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := from.Unwrap(pool, volume, rotated); !errors.Is(err, ErrWrongKey) {
		t.Errorf("the old KEK: %v", err)
	}
	if got, err := to.Unwrap(pool, volume, rotated); err != nil || !sameKey(t, got, key) {
		t.Error(got, err)
	}
	clone := uuid.New()
	shared, err := WrapFor(from, pool, volume, w, from, pool, clone)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := from.Unwrap(pool, clone, shared); err != nil || !sameKey(t, got, key) {
		t.Error(got, err)
	}
	if _, err := from.Unwrap(pool, volume, shared); !errors.Is(err, ErrWrapped) {
		t.Errorf("the clone's wrapped key opens as the parent's: %v", err)
	}
	if _, err := Rewrap(to, from, pool, volume, w); !errors.Is(err, ErrWrongKey) {
		t.Error(err)
	}
}

// TestSubkeys: any difference in purpose, salt or context gives another subkey.
func TestSubkeys(t *testing.T) {
	key, nonce := newKey(t), make([]byte, nonceBytes)
	seen := map[string]bool{}
	for _, purpose := range []string{"sco", "log"} {
		for _, salt := range [][SaltBytes]byte{{}, {1}} {
			for _, context := range []string{"", "a", "b"} {
				a, err := key.AEAD(purpose, salt, []byte(context))
				if err != nil {
					t.Fatal(err)
				}
				seen[string(a.Seal(nil, nonce, make([]byte, 32), nil))] = true
			}
		}
	}
	if len(seen) != 12 {
		t.Errorf("%d subkeys of 12", len(seen))
	}
}

func TestErase(t *testing.T) {
	key, kek := newKey(t), newKEKT(t)
	ring := &Ring{}
	ring.Use(key)
	if ring.Current() != key {
		t.Error("not current")
	}
	if got, err := ring.Key(key.ID()); got != key || err != nil {
		t.Error(got, err)
	}
	ring.Forget(key.ID())
	if *key.secret != [SecretBytes]byte{} {
		t.Error("the secret is still there")
	}
	if _, err := ring.Key(key.ID()); !errors.Is(err, ErrNoKey) {
		t.Error(err)
	}
	if ring.Current() != key {
		t.Error("a ring whose current key was forgotten would write in clear")
	}
	if _, err := key.AEAD("sco", [SaltBytes]byte{}, nil); !errors.Is(err, ErrNoKey) {
		t.Errorf("an erased key derives: %v", err)
	}
	if _, err := key.Log(volume, 1, [SaltBytes]byte{}); !errors.Is(err, ErrNoKey) {
		t.Errorf("an erased key derives for the log: %v", err)
	}
	if _, err := kek.Wrap(pool, volume, key); !errors.Is(err, ErrNoKey) {
		t.Errorf("an erased key was wrapped: %v", err)
	}
	var none *Ring
	if _, err := none.Key(key.ID()); !errors.Is(err, ErrNoKey) || none.Current() != nil {
		t.Error("nil ring", err)
	}
	second := newKey(t)
	ring.Add(second)
	ring.Erase()
	if len(ring.IDs()) != 0 || *second.secret != [SecretBytes]byte{} {
		t.Error("erased ring has keys")
	}
	secret := kek.secret
	kek.Erase()
	if *secret != [SecretBytes]byte{} {
		t.Error("the KEK's secret is still there")
	}
}

// TestEraseWhileDeriving: nobody derives from half-erased bytes.
func TestEraseWhileDeriving(t *testing.T) {
	for range 50 {
		key := newKey(t)
		good, err := key.AEAD("x", [SaltBytes]byte{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		nonce := make([]byte, nonceBytes)
		want := good.Seal(nil, nonce, []byte("x"), nil)
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				for {
					a, err := key.AEAD("x", [SaltBytes]byte{}, nil)
					if errors.Is(err, ErrNoKey) {
						return
					}
					if err != nil || !bytes.Equal(a.Seal(nil, nonce, []byte("x"), nil), want) {
						t.Error("another key", err)
						return
					}
				}
			})
		}
		key.Erase()
		wg.Wait()
	}
}

// TestSecretsAreNotPrinted: no way of formatting shows a secret.
func TestSecretsAreNotPrinted(t *testing.T) {
	key, kek := newKey(t), newKEKT(t)
	var b bytes.Buffer
	ring := &Ring{}
	ring.Use(key)
	for _, v := range []any{key, kek, ring, *kek, []*Key{key}, struct{ K *Key }{key}, fmt.Errorf("with %v and %v", key, kek)} {
		fmt.Fprintf(&b, "%v %+v %#v %s\n", v, v, v, v)
		j, err := json.Marshal(v)
		fmt.Fprintf(&b, "%s %v\n", j, err)
		slog.New(slog.NewTextHandler(&b, nil)).Info("x", "v", v)
		slog.New(slog.NewJSONHandler(&b, nil)).Info("x", "v", v)
	}
	text := b.String()
	for _, secret := range [][]byte{key.secret[:], kek.secret[:]} {
		for _, form := range []string{string(secret), hex.EncodeToString(secret), strings.ToUpper(hex.EncodeToString(secret)),
			fmt.Sprint(secret)[1:40], fmt.Sprintf("%#v", secret)[8:60], fmt.Sprintf("%q", secret)} {
			if strings.Contains(text, form) {
				t.Errorf("a secret was printed as %q", form)
			}
		}
		j, err := json.Marshal(secret)
		if err != nil || strings.Contains(text, strings.Trim(string(j), `"`)) {
			t.Error("a secret was printed as JSON", err)
		}
	}
}

func TestKEKFile(t *testing.T) {
	for name, files := range map[string]vfs.FS{"mem": vfs.NewMem(1), "os": vfs.OS()} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := files.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			path := dir + "/kek"
			k, err := CreateKEK(files, path)
			if err != nil {
				t.Fatal(err)
			}
			got, err := LoadKEK(files, path)
			if err != nil || got.ID() != k.ID() || *got.secret != *k.secret {
				t.Fatal(got, err)
			}
			if _, err := CreateKEK(files, path); !errors.Is(err, fs.ErrExist) {
				t.Errorf("a KEK was replaced: %v", err)
			}
			names, err := files.ReadDir(dir)
			if err != nil || len(names) != 1 {
				t.Errorf("left behind: %v %v", names, err)
			}
			if _, err := LoadKEK(files, dir+"/none"); !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
			f, err := files.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for i := range kekFileBytes - 1 { // all but the line's end
				b := make([]byte, 1)
				if _, err := f.ReadAt(b, int64(i)); err != nil {
					t.Fatal(err)
				}
				if _, err := f.WriteAt([]byte{b[0] ^ 1}, int64(i)); err != nil {
					t.Fatal(err)
				}
				if _, err := LoadKEK(files, path); !errors.Is(err, ErrWrapped) {
					t.Errorf("byte %d: %v", i, err)
				}
				if _, err := f.WriteAt(b, int64(i)); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.Truncate(int64(kekFileBytes) + 1); err != nil {
				t.Fatal(err)
			}
			if _, err := LoadKEK(files, path); !errors.Is(err, ErrWrapped) {
				t.Errorf("longer: %v", err)
			}
		})
	}
}

// TestKEKFileOthersMayRead: a KEK that everybody may read is refused.
func TestKEKFileOthersMayRead(t *testing.T) {
	path := t.TempDir() + "/kek"
	if _, err := CreateKEK(vfs.OS(), path); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Error(info, err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKEK(vfs.OS(), path); !errors.Is(err, fs.ErrPermission) {
		t.Error(err)
	}
}

func TestPassphrase(t *testing.T) {
	p, err := NewPassphrase()
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewPassphrase()
	if err != nil || bytes.Equal(p.Salt, other.Salt) {
		t.Fatal("salt", err)
	}
	p.Passes, p.MemoryKiB = 1, memoryKiBMin // a test need not be slow
	k, err := p.Open([]byte("correct horse battery staple"))
	if err != nil {
		t.Fatal(err)
	}
	p.KEK = k.ID()
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	var stored Passphrase
	if err := json.Unmarshal(b, &stored); err != nil {
		t.Fatal(err)
	}
	if again, err := stored.Open([]byte("correct horse battery staple")); err != nil || *again.secret != *k.secret {
		t.Error(err)
	}
	if _, err := stored.Open([]byte("correct horse battery stable")); !errors.Is(err, ErrWrongKey) {
		t.Error(err)
	}
	for name, change := range map[string]func(*Passphrase){
		"salt":        func(p *Passphrase) { p.Salt = p.Salt[1:] },
		"no passes":   func(p *Passphrase) { p.Passes = 0 },
		"many passes": func(p *Passphrase) { p.Passes = 1<<32 - 1 },
		"memory":      func(p *Passphrase) { p.MemoryKiB = 1<<32 - 1 },
		"too little":  func(p *Passphrase) { p.MemoryKiB = 8 },
		"lanes":       func(p *Passphrase) { p.Lanes = 255 },
	} {
		q := stored
		change(&q)
		if _, err := q.Open([]byte("x")); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := stored.Open(nil); err == nil {
		t.Error("empty passphrase accepted")
	}
}

// TestLogCipher: any part of a stretch of log is decrypted alone, and no two positions, salts, generations, logs or keys share
// a keystream.
func TestLogCipher(t *testing.T) {
	key := newKey(t)
	c, err := key.Log(volume, 7, [SaltBytes]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	plain := make([]byte, 32*LogBlockBytes)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range plain {
		plain[i] = byte(r.Uint32())
	}
	packed := make([]byte, len(plain))
	c.XOR(packed, plain, 1000)
	for range 200 {
		from := r.IntN(32)
		to := from + 1 + r.IntN(32-from)
		got := bytes.Clone(packed[from*LogBlockBytes : to*LogBlockBytes])
		c.XOR(got, got, 1000+uint64(from))
		if !bytes.Equal(got, plain[from*LogBlockBytes:to*LogBlockBytes]) {
			t.Fatalf("blocks %d to %d", from, to)
		}
	}
	seen := map[string]bool{}
	zeros := make([]byte, 16*LogBlockBytes)
	streams := 0
	for _, k := range []*Key{key, newKey(t)} {
		for _, log := range []uuid.UUID{volume, pool} {
			for _, generation := range []uint64{7, 8} {
				for _, salt := range [][SaltBytes]byte{{1}, {2}} {
					c, err := k.Log(log, generation, salt)
					if err != nil {
						t.Fatal(err)
					}
					stream := make([]byte, len(zeros))
					c.XOR(stream, zeros, 0)
					streams++
					for i := 0; i < len(stream); i += 16 {
						seen[string(stream[i:i+16])] = true
					}
				}
			}
		}
	}
	if want := streams * len(zeros) / 16; len(seen) != want {
		t.Errorf("%d of %d pieces of keystream differ", len(seen), want)
	}
}

func BenchmarkLogCipher(b *testing.B) {
	c, err := newKey(b).Log(volume, 1, [SaltBytes]byte{})
	if err != nil {
		b.Fatal(err)
	}
	p := make([]byte, LogBlockBytes)
	b.SetBytes(LogBlockBytes)
	b.ReportAllocs()
	for b.Loop() {
		c.XOR(p, p, 5)
	}
}

func BenchmarkSubkey(b *testing.B) {
	key := newKey(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := key.AEAD("sco", [SaltBytes]byte{}, nil); err != nil {
			b.Fatal(err)
		}
	}
}
