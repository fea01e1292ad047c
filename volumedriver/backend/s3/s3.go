// Package s3 keeps objects in a bucket of an S3 store, below a prefix.
//
//	BUCKET/PREFIX/v/0a1b…/3f/7-12-0    an object, under its name
//
// # A Put
//
//	PUT key  If-None-Match: *  x-amz-checksum-crc32c: CRC  x-amz-meta-varve-put: ID     ID is random, one for the whole call
//	200, with our checksum or confirmed by HEAD    done
//	412, or 409 to the end                         HEAD: has it our ID and size? then it was ours and its reply was lost, else ErrExist
//	200 with <Error>, 5xx, 429, time-out, reset    unknown: the same bytes go to the same name again, a few times
//	anything else                                  refused: the error says what the operator has to do
//
// Repeating is safe inside one call, because whatever attempt lands has the same bytes. After a failed call the object may
// still appear later. That is the contract of package backend, and its users take a new name for the next try.
//
// # What is lost without If-None-Match
//
// The probe (Probe) lets 16 writers race for one name. A store that lets more than one win ignores the condition. The names
// that the volume driver uses contain epoch, sequence and attempt, so one owner never gives a name twice, and a fenced owner
// writes under its old epoch: nothing is overwritten in normal service. What is lost is the last line of defence: an owner
// whose disk was set back to an earlier state (a restored snapshot of the appliance's VM, a second copy of its data directory)
// would hand out the same names again and silently replace objects that others rely on, where a sound store refuses. Such
// a store is taken only if the operator says so.
//
// # Budgets
//
// Reads, uploads, scrub (with all deletes) and replication each have their own connections and their own limit of requests
// under way, so a burst of one cannot take what another needs. HTTP/1.1 only: on one HTTP/2 connection uploads would
// delay reads.
//
// # Trying again
//
// Capped exponential backoff with full jitter; 503 and 429 begin slower. Who waits for a store that is away goes on as soon as
// anybody has reached it. Each attempt has a deadline that grows with its size. Calls
// that only ask end after a few attempts. Open and ReadAt go on for Patience, also after a refusal, since a guest waits and
// credentials may be about to be changed: an error here is a disk error there.
//
// Answers are bounded before they are read. A redirect is refused; no request leaves for another host than the endpoint.
package s3

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/minio/minio-go/v7/pkg/s3utils"

	"varve/volumedriver/backend"
)

// Config of a Store. Endpoint, Bucket and Credentials are required.
type Config struct {
	Endpoint string // http://host[:port] or https://host[:port]
	Region   string // "us-east-1"
	Bucket   string
	Prefix   string // without slashes at its ends; empty for the whole bucket
	CA       []byte // PEM of the only authorities to trust; nil for those of the system

	Credentials Credentials

	Patience time.Duration // how long Open and ReadAt go on trying, a minute
	Attempt  time.Duration // limit of one attempt, to which its size adds, 15 s
	Backoff  time.Duration // the longest wait between attempts, 2 s

	// Requests under way at a time: 64, 8, 4, 4.
	Reads, Uploads, Scrubs, Replications int

	Log *slog.Logger
}

// Credentials of an S3 user. They have no printed form.
type Credentials struct{ AccessKey, SecretKey string }

// String keeps the keys out of logs and messages.
func (Credentials) String() string { return "[credentials]" }

// GoString keeps the keys out of %#v.
func (Credentials) GoString() string { return "[credentials]" }

// LogValue keeps the keys out of slog.
func (Credentials) LogValue() slog.Value { return slog.StringValue("[credentials]") }

const (
	patienceDef  = time.Minute
	attemptDef   = 15 * time.Second
	backoffDef   = 2 * time.Second
	regionDef    = "us-east-1"
	prefixMax    = 512
	caBytesMax   = 64 << 10
	bytesPerWait = 1 << 20 // an attempt gets a second more for each
	keyBytesMax  = 1024    // of S3
)

func (c Config) withDefaults() (Config, *url.URL, error) {
	u, err := url.Parse(c.Endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" ||
		u.Fragment != "" || u.User != nil {
		return c, nil, refused("endpoint is not http://host[:port] or https://host[:port]", "give the address of the S3 service alone")
	}
	if err := s3utils.CheckValidBucketNameStrict(c.Bucket); err != nil {
		return c, nil, refused("bucket name: "+err.Error(), "use the name of a bucket: 3 to 63 of a-z, 0-9, '.' and '-'")
	}
	if len(c.Prefix) > prefixMax || strings.Trim(c.Prefix, "/") != c.Prefix || strings.Contains(c.Prefix, "//") ||
		s3utils.CheckValidObjectNamePrefix(c.Prefix) != nil {
		return c, nil, refused("prefix is not one", fmt.Sprintf("use up to %d bytes without slashes at the ends", prefixMax))
	}
	if c.Credentials.AccessKey == "" || c.Credentials.SecretKey == "" {
		return c, nil, refused("no credentials", "give an access key and a secret key")
	}
	if c.Region == "" {
		c.Region = regionDef
	}
	for _, d := range []struct {
		value *time.Duration
		def   time.Duration
	}{{&c.Patience, patienceDef}, {&c.Attempt, attemptDef}, {&c.Backoff, backoffDef}} {
		if *d.value <= 0 {
			*d.value = d.def
		}
	}
	for _, n := range []struct {
		value *int
		def   int
	}{{&c.Reads, 64}, {&c.Uploads, 8}, {&c.Scrubs, 4}, {&c.Replications, 4}} {
		if *n.value <= 0 {
			*n.value = n.def
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, u, nil
}

// Store is a backend in a bucket.
type Store struct {
	cfg    Config
	prefix string // of every key: "" or "PREFIX/"
	secure bool
	keys   *keyring
	lanes  [lanes]*lane

	stop   context.Context // ends with Close
	cancel context.CancelFunc
	life   sync.RWMutex // held shared while a call begins, alone by Close
	closed bool
	calls  sync.WaitGroup

	back              atomic.Pointer[comeback] // nil while the store answers
	retries, refusals atomic.Int64
}

// Open wires a Store. It asks the service nothing.
func Open(cfg Config) (*Store, error) {
	cfg, u, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("open S3 backend: %w", err)
	}
	s := &Store{cfg: cfg, secure: u.Scheme == "https", keys: newKeyring(cfg.Credentials)}
	if cfg.Prefix != "" {
		s.prefix = cfg.Prefix + "/"
	}
	trust := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(cfg.CA) > 0 {
		trust.RootCAs = x509.NewCertPool()
		if len(cfg.CA) > caBytesMax || !trust.RootCAs.AppendCertsFromPEM(cfg.CA) {
			return nil, fmt.Errorf("open S3 backend: %w", refused("CA certificate is no PEM", "give a file of BEGIN CERTIFICATE blocks"))
		}
	}
	s.stop, s.cancel = context.WithCancel(context.Background())
	creds := credentials.New(s.keys)
	for i, n := range [lanes]int{laneRead: cfg.Reads, laneUpload: cfg.Uploads, laneScrub: cfg.Scrubs, laneReplication: cfg.Replications} {
		l := newLane(u, trust, n)
		l.core, err = minio.NewCore(u.Host, &minio.Options{Creds: creds, Secure: s.secure, Transport: l, Region: cfg.Region,
			BucketLookup: minio.BucketLookupPath, MaxRetries: 1})
		if err != nil {
			return nil, fmt.Errorf("open S3 backend %s: %w", cfg.Endpoint, err)
		}
		s.lanes[i] = l
	}
	return s, nil
}

// SetCredentials has all further requests use other credentials.
func (s *Store) SetCredentials(c Credentials) { s.keys.set(c) }

// begin lets a call run until end; its context ends with Close.
func (s *Store) begin(ctx context.Context) (context.Context, func(), error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	s.life.RLock()
	defer s.life.RUnlock()
	if s.closed {
		return nil, nil, fmt.Errorf("S3 backend %s/%s: %w", s.cfg.Endpoint, s.cfg.Bucket, fs.ErrClosed)
	}
	s.calls.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	drop := context.AfterFunc(s.stop, func() { cancel(fs.ErrClosed) })
	return ctx, func() {
		drop()
		cancel(nil)
		s.calls.Done()
	}, nil
}

// Distant implements what backend.Distant asks.
func (s *Store) Distant() bool { return true }

// Close ends what is under way, and the connections.
func (s *Store) Close() error {
	s.life.Lock()
	if s.closed {
		s.life.Unlock()
		return nil
	}
	s.closed = true
	s.life.Unlock()
	s.cancel()
	s.calls.Wait()
	for _, l := range s.lanes {
		l.transport.CloseIdleConnections()
	}
	return nil
}

// Space knows no limit: a bucket has none that can be asked for.
func (s *Store) Space(ctx context.Context) (total, available uint64, err error) {
	_, end, err := s.begin(ctx)
	if err != nil {
		return 0, 0, err
	}
	end()
	return 0, 0, nil
}

// key is where an object is in the bucket.
func (s *Store) key(name string) (string, error) {
	if err := backend.CheckName(name); err != nil {
		return "", err
	}
	if len(s.prefix)+len(name) > keyBytesMax {
		return "", fmt.Errorf("object %s: key of %d bytes, more than %d", name, len(s.prefix)+len(name), keyBytesMax)
	}
	return s.prefix + name, nil
}

// Stats are counters since Open.
type Stats struct {
	Reads, Uploads, Scrubs, Replications LaneStats
	Retries                              int64 // attempts after the first of a call
	Refusals                             int64 // calls that ended with a definite refusal
}

// LaneStats count the requests of one budget.
type LaneStats struct {
	Requests, Failed int64
	Waiting, Active  int64
	Sent, Received   int64 // bytes of bodies
}

// Stats counts.
func (s *Store) Stats() Stats {
	return Stats{Reads: s.lanes[laneRead].stats(), Uploads: s.lanes[laneUpload].stats(), Scrubs: s.lanes[laneScrub].stats(),
		Replications: s.lanes[laneReplication].stats(), Retries: s.retries.Load(), Refusals: s.refusals.Load()}
}

// keyring hands the credentials in force to every request.
type keyring struct {
	mu      sync.Mutex
	current Credentials
	changed bool
}

func newKeyring(c Credentials) *keyring { return &keyring{current: c, changed: true} }

func (k *keyring) set(c Credentials) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.current, k.changed = c, true
}

// RetrieveWithCredContext implements credentials.Provider.
func (k *keyring) RetrieveWithCredContext(*credentials.CredContext) (credentials.Value, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.changed = false
	return credentials.Value{AccessKeyID: k.current.AccessKey, SecretAccessKey: k.current.SecretKey, SignerType: credentials.SignatureV4}, nil
}

// Retrieve implements credentials.Provider.
func (k *keyring) Retrieve() (credentials.Value, error) { return k.RetrieveWithCredContext(nil) }

// IsExpired implements credentials.Provider.
func (k *keyring) IsExpired() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.changed
}

var (
	_ backend.Backend      = (*Store)(nil)
	_ backend.BatchDeleter = (*Store)(nil)
)
