package update

import (
	"archive/tar"
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"varve/control/durable"
)

// Manifest says what a bundle holds.
type Manifest struct {
	Format  int       `json:"format"`
	Product string    `json:"product"`
	Version string    `json:"version"`
	Built   time.Time `json:"built"`
	// LevelMin and LevelMax are the data levels that it can run on.
	LevelMin int  `json:"level_min"`
	LevelMax int  `json:"level_max"`
	Floor    int  `json:"floor"`
	Root     File `json:"root"`
}

// File of a bundle.
type File struct {
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// Limits and names.
const (
	bundleFormat     = 1
	product          = "varve"
	manifestFile     = "manifest.json"
	signatureFile    = "manifest.sig"
	rootFile         = "root"
	signedPrefix     = "varve update manifest 1\n"
	manifestBytesMax = 64 << 10
	signaturesMax    = 8
	keysMax          = 8
	versionBytesMax  = 100
	rootBytesMax     = 16 << 30
)

func (m Manifest) check() error {
	sum, err := hex.DecodeString(m.Root.SHA256)
	switch {
	case m.Format != bundleFormat:
		return refused("the bundle is of format %d, this version knows %d", m.Format, bundleFormat)
	case m.Product != product:
		return refused("it is an update of %q", m.Product)
	case m.Version == "" || len(m.Version) > versionBytesMax || strings.ContainsFunc(m.Version, func(r rune) bool { return r <= ' ' || r > '~' }):
		return refused("its version is %q", m.Version)
	case m.Root.Size <= 0 || m.Root.Size > rootBytesMax || err != nil || len(sum) != sha256.Size:
		return refused("its manifest names no system")
	case m.LevelMin < 0 || m.LevelMax < m.LevelMin || m.Floor < 0:
		return refused("its manifest makes no sense")
	}
	return nil
}

// Root is the system in a bundle, as it is read. Whole says whether all of it has been read and was right.
type Root struct {
	r    io.Reader
	sum  hash.Hash
	want File
	n    int64
}

// Read implements io.Reader.
func (r *Root) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.n += int64(n)
	r.sum.Write(p[:n])
	return n, err
}

// Whole returns nil if what has been read is what the manifest says.
func (r *Root) Whole() error {
	if r.n != r.want.Size || hex.EncodeToString(r.sum.Sum(nil)) != r.want.SHA256 {
		return fmt.Errorf("%w: the system in it is not the one of its manifest", ErrDamaged)
	}
	return nil
}

// OpenBundle checks a bundle's signature and gives its manifest and the system, which is checked by its own Whole once it has
// been read.
func OpenBundle(r io.Reader, keys []ed25519.PublicKey) (Manifest, *Root, error) {
	t := tar.NewReader(r)
	manifest, err := entry(t, manifestFile, manifestBytesMax)
	if err != nil {
		return Manifest{}, nil, err
	}
	signatures, err := entry(t, signatureFile, signaturesMax*ed25519.SignatureSize)
	if err != nil {
		return Manifest{}, nil, err
	}
	if len(keys) == 0 {
		return Manifest{}, nil, refused("this appliance trusts no key: its image was built without UPDATE_KEYS")
	}
	if !signed(manifest, signatures, keys) {
		return Manifest{}, nil, refused("none of the keys that this appliance trusts has signed it")
	}
	var m Manifest
	if err := json.Unmarshal(manifest, &m); err != nil {
		return m, nil, fmt.Errorf("%w: manifest: %w", ErrDamaged, err)
	}
	if err := m.check(); err != nil {
		return m, nil, err
	}
	h, err := t.Next()
	if err != nil || h.Name != rootFile || h.Typeflag != tar.TypeReg || h.Size != m.Root.Size {
		return m, nil, fmt.Errorf("%w: the system of %d bytes is not where it should be", ErrDamaged, m.Root.Size)
	}
	return m, &Root{r: t, sum: sha256.New(), want: m.Root}, nil
}

func entry(t *tar.Reader, name string, most int64) ([]byte, error) {
	h, err := t.Next()
	if err != nil || h.Name != name || h.Typeflag != tar.TypeReg || h.Size > most || h.Size < 0 {
		return nil, fmt.Errorf("%w: it is not an update bundle: no %s", ErrDamaged, name)
	}
	b := make([]byte, h.Size)
	if _, err := io.ReadFull(t, b); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrDamaged, name, err)
	}
	return b, nil
}

func signed(manifest, signatures []byte, keys []ed25519.PublicKey) bool {
	text := append([]byte(signedPrefix), manifest...)
	for len(signatures) >= ed25519.SignatureSize {
		for _, k := range keys[:min(len(keys), keysMax)] {
			if ed25519.Verify(k, text, signatures[:ed25519.SignatureSize]) {
				return true
			}
		}
		signatures = signatures[ed25519.SignatureSize:]
	}
	return false
}

// Pack writes a bundle. Root and its size and hash are filled in from the system; the same input gives the same bytes.
func Pack(w io.Writer, m Manifest, system io.ReadSeeker, keys ...ed25519.PrivateKey) (Manifest, error) {
	sum, n, err := hashOf(system)
	if err != nil {
		return m, fmt.Errorf("read the system: %w", err)
	}
	if _, err := system.Seek(0, io.SeekStart); err != nil {
		return m, fmt.Errorf("read the system: %w", err)
	}
	m.Format, m.Product, m.Root = bundleFormat, product, File{n, sum}
	m.Built = m.Built.UTC().Truncate(time.Second)
	if err := m.check(); err != nil {
		return m, err
	}
	manifest, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return m, fmt.Errorf("encode manifest: %w", err)
	}
	var sigs bytes.Buffer
	for _, k := range keys {
		sigs.Write(ed25519.Sign(k, append([]byte(signedPrefix), manifest...)))
	}
	t := tar.NewWriter(w)
	put := func(name string, size int64, r io.Reader) error {
		if err := t.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size, ModTime: m.Built, Format: tar.FormatUSTAR}); err != nil {
			return err
		}
		_, err := io.CopyN(t, r, size)
		return err
	}
	err = put(manifestFile, int64(len(manifest)), bytes.NewReader(manifest))
	if err == nil {
		err = put(signatureFile, int64(sigs.Len()), &sigs)
	}
	if err == nil {
		err = put(rootFile, n, system)
	}
	if err == nil {
		err = t.Close()
	}
	if err != nil {
		return m, fmt.Errorf("write bundle: %w", err)
	}
	return m, nil
}

func hashOf(r io.Reader) (sum string, n int64, err error) {
	h := sha256.New()
	n, err = io.Copy(h, r)
	return hex.EncodeToString(h.Sum(nil)), n, err
}

// counted tells how far reading is.
type counted struct {
	r           io.Reader
	done, total int64
	progress    func(done, total int64)
}

// Read implements io.Reader.
func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.done += int64(n)
	if c.progress != nil && n > 0 {
		c.progress(c.done, c.total)
	}
	return n, err
}

// NewKey makes a key pair: the private key for its owner, the public one for the appliances' list.
func NewKey() (private, public string, err error) {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", "", err
	}
	return base64.StdEncoding.EncodeToString(key.Seed()), base64.StdEncoding.EncodeToString(pub), nil
}

// ParsePrivateKey reads what NewKey made.
func ParsePrivateKey(text string) (ed25519.PrivateKey, error) {
	seed, err := base64.StdEncoding.DecodeString(strings.TrimSpace(text))
	if err != nil || len(seed) != ed25519.SeedSize {
		return nil, errors.New("not a signing key")
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

// ParseKeys reads a list of trusted keys: one in base64 a line, # begins a comment.
func ParseKeys(text string) ([]ed25519.PublicKey, error) {
	var keys []ed25519.PublicKey
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		k, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(k) != ed25519.PublicKeySize {
			return nil, fmt.Errorf("key %d is not a public key", len(keys)+1)
		}
		if keys = append(keys, k); len(keys) > keysMax {
			return nil, fmt.Errorf("more than %d keys", keysMax)
		}
	}
	return keys, nil
}

// ReadKeys reads the list of trusted keys in a file. Without the file nothing is trusted.
func ReadKeys(path string) ([]ed25519.PublicKey, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return ParseKeys(string(b))
}

// Holding is a bundle in a node's directory.
type Holding struct {
	Manifest
	SHA256 string // of the bundle
	Size   int64
}

const (
	takePart = "take.part"
	// roomLeft stays free on the disk: guests' data is there too.
	roomLeft = 1 << 30
)

// Take copies a bundle into dir, where the agent and other nodes find it, and removes those of before. Its signature is checked before
// the rest is read, its content before it gets its name: what is wrong leaves nothing.
func Take(dir string, in io.Reader, keys []ed25519.PublicKey) (h Holding, err error) {
	if err := durable.MakeDir(dir); err != nil {
		return h, err
	}
	path := filepath.Join(dir, takePart)
	out, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o644)
	if err != nil {
		return h, err
	}
	defer func() {
		err = errors.Join(err, out.Close())
		if err != nil {
			if e := os.Remove(path); !errors.Is(e, fs.ErrNotExist) {
				err = errors.Join(err, e)
			}
		}
	}()
	sum := sha256.New()
	copied := &counted{r: io.TeeReader(in, io.MultiWriter(out, sum))}
	var root *Root
	if h.Manifest, root, err = OpenBundle(copied, keys); err != nil {
		return h, err
	}
	if err := hasRoom(dir, h.Root.Size); err != nil {
		return h, err
	}
	if _, err := io.Copy(io.Discard, root); errors.Is(err, io.ErrUnexpectedEOF) {
		return h, fmt.Errorf("%w: it ends too early", ErrDamaged)
	} else if err != nil {
		return h, fmt.Errorf("read the bundle: %w", err)
	}
	if err := root.Whole(); err != nil {
		return h, err
	}
	if _, err := io.Copy(io.Discard, io.LimitReader(copied, trailerMax)); err != nil { // the archive's end
		return h, fmt.Errorf("read the bundle: %w", err)
	}
	if n, _ := in.Read(make([]byte, 1)); n > 0 {
		return h, fmt.Errorf("%w: more follows after its end", ErrDamaged)
	}
	h.SHA256, h.Size = hex.EncodeToString(sum.Sum(nil)), copied.done
	if err := out.Sync(); err != nil {
		return h, err
	}
	return h, Keep(dir, takePart, h.SHA256)
}

// trailerMax is what may follow the last file: the archive's end, and what fills its last record.
const trailerMax = 64 << 10

func hasRoom(dir string, need int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("room in %s: %w", dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < need+roomLeft {
		return fmt.Errorf("%w: %d bytes are free for a bundle of %d, and %d have to stay", unix.ENOSPC, free, need, roomLeft)
	}
	return nil
}

// Keep gives a complete file its name as the bundle with that SHA-256. Older ones make room: one is enough.
func Keep(dir, name, sum string) error {
	old, err := filepath.Glob(filepath.Join(dir, BundleName("*")))
	if err != nil {
		return err
	}
	for _, o := range old {
		if filepath.Base(o) == BundleName(sum) {
			continue
		}
		if err := os.Remove(o); err != nil {
			return err
		}
	}
	if err := os.Rename(filepath.Join(dir, name), filepath.Join(dir, BundleName(sum))); err != nil {
		return err
	}
	return durable.SyncDir(dir)
}

// Held lists the bundles in dir. They were checked when they came; each node checks again before it uses one.
func Held(dir string) ([]Holding, error) {
	all, err := filepath.Glob(filepath.Join(dir, BundleName("*")))
	if err != nil {
		return nil, err
	}
	var out []Holding
	for _, path := range all {
		h, err := look(path)
		if err != nil {
			return out, fmt.Errorf("bundle %s: %w", filepath.Base(path), err)
		}
		out = append(out, h)
	}
	return out, nil
}

func look(path string) (h Holding, err error) {
	f, err := os.Open(path)
	if err != nil {
		return h, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return h, err
	}
	h.Size, h.SHA256 = info.Size(), strings.TrimSuffix(filepath.Base(path), bundleSuffix)
	b, err := entry(tar.NewReader(f), manifestFile, manifestBytesMax)
	if err == nil {
		err = json.Unmarshal(b, &h.Manifest)
	}
	return h, err
}
