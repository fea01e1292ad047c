package server

import (
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"time"

	"varve/control/vpool"
)

// Off switches a listener off.
const Off = "off"

// NodeDefault is the node port where none was asked for: 7443, or none if that is taken.
const NodeDefault = "default"

// Config of an appliance. Data is required; zero values elsewhere take the defaults named.
type Config struct {
	Data string
	// Unit is which part of the appliance this process is; all of it by default.
	Unit string

	NBD     string // ":10809"; "off" for none
	NFS     string // ":2049"
	HTTPS   string // ":8443"
	Node    string // ":7443" if it is free; the node port
	Portmap string // off; host:111 to be found by showmount, ESXi and Proxmox VE

	NBDTLS string // off, optional or required

	LogBytes int64 // 4 GiB, or an eighth of the disk if that is less
	MapBytes int64 // 256 MiB
	SCOBytes int64 // 16 MiB

	// The read cache of vPools whose backend is remote; it takes nothing while there is none. Below 0: none.
	CacheDir   string // Data/cache
	CacheBytes int64  // on the disk; an eighth of it
	CacheRAM   int64  // 256 MiB

	DrainTime time.Duration

	// S3 is where a fresh appliance keeps its vPool default; in a rebuild, the bucket to rebuild from. Without a URL it is a
	// directory below Data.
	S3 S3

	// UpdateKeys is a file with the public keys that a bundle has to be signed by to be taken; none of them without a name.
	UpdateKeys string

	Version string
	// Settings are the flags that it was started with, as text, for the check against the cluster's configuration.
	Settings map[string]string
	Log      *slog.Logger
	// ControlLog is for raft; nil is Log.
	ControlLog *slog.Logger
}

// S3 names a bucket and what opens it.
type S3 struct {
	URL         string // s3://bucket/prefix?endpoint=…&region=…
	Keys        vpool.Keys
	CA          string // PEM
	AllowUnsafe bool
}

// Sizes that a Config may name.
const (
	segmentBytes = 64 << 20
	logBytesMin  = 4 * segmentBytes
	logBytesDef  = 4 << 30
	logBytesMax  = 1 << 40
	mapBytesMin  = 8 << 20
	mapBytesDef  = 256 << 20
	scoBytesMin  = 1 << 20
	scoBytesDef  = 16 << 20
	cacheMin     = 64 << 20
	cacheDef     = 64 << 30
	cacheRAMMin  = 1 << 20
	cacheRAMDef  = 256 << 20
)

// Names of files below Data.
const (
	apiSocketName = "varve.sock"
	nbdSocketName = "nbd.sock"
	lockName      = "lock"
	tokenName     = "admin.token"
	tlsName       = "tls"
	logName       = "log"
	mapName       = "map"
	ledgerName    = "ledger.json"
	controlName   = "control"
	backendName   = "backend"
	cacheName     = "cache"
)

// APISocket is where the appliance on a data directory answers the CLI.
func APISocket(data string) string { return filepath.Join(data, apiSocketName) }

// NBDSocket is where it serves NBD to local programs.
func NBDSocket(data string) string { return filepath.Join(data, nbdSocketName) }

// TokenFile holds the administrator's token of an appliance.
func TokenFile(data string) string { return filepath.Join(data, tokenName) }

// UsageError is a Config that makes no sense.
type UsageError struct{ Why, Remedy string }

func (e *UsageError) Error() string { return e.Why + "; " + e.Remedy }

// Check says what makes no sense, as Serve would, and touches nothing.
func (c Config) Check() error {
	_, err := c.withDefaults()
	return err
}

func (c Config) withDefaults() (Config, error) {
	if c.Data == "" {
		return c, &UsageError{"no data directory is named", "give --data DIR"}
	}
	data, err := filepath.Abs(c.Data)
	if err != nil {
		return c, err
	}
	c.Data = data
	for _, a := range []struct {
		flag  string
		value *string
		def   string
	}{{"nbd", &c.NBD, ":10809"}, {"nfs", &c.NFS, ":2049"}, {"https", &c.HTTPS, ":8443"}, {"portmap", &c.Portmap, Off}, {"node", &c.Node, NodeDefault}} {
		if *a.value == "" {
			*a.value = a.def
		}
		if *a.value == Off || *a.value == NodeDefault {
			continue
		}
		if _, _, err := net.SplitHostPort(*a.value); err != nil {
			return c, &UsageError{fmt.Sprintf("--%s %q is no address", a.flag, *a.value), "give HOST:PORT, :PORT or off"}
		}
	}
	if c.NFS == Off && c.Portmap != Off {
		return c, &UsageError{"--portmap needs --nfs", "switch both on or both off"}
	}
	if c.NBDTLS == "" {
		c.NBDTLS = Off
	}
	if c.NBDTLS != Off && c.NBDTLS != "optional" && c.NBDTLS != "required" {
		return c, &UsageError{fmt.Sprintf("--nbd-tls %q is unknown", c.NBDTLS), "give off, optional or required"}
	}
	for _, s := range []struct {
		flag          string
		value         *int64
		def, min, max int64
	}{
		{"log-size", &c.LogBytes, 0, logBytesMin, logBytesMax},
		{"map-size", &c.MapBytes, mapBytesDef, mapBytesMin, logBytesMax},
		{"sco-size", &c.SCOBytes, scoBytesDef, scoBytesMin, scoBytesDef},
	} {
		if *s.value == 0 {
			*s.value = s.def
		}
		if *s.value != 0 && (*s.value < s.min || *s.value > s.max) {
			return c, &UsageError{fmt.Sprintf("--%s %d is out of range", s.flag, *s.value),
				fmt.Sprintf("give %d to %d bytes", s.min, s.max)}
		}
	}
	if c.CacheDir == "" {
		c.CacheDir = filepath.Join(c.Data, cacheName)
	}
	if c.CacheBytes > 0 && c.CacheBytes < cacheMin {
		return c, &UsageError{fmt.Sprintf("--cache-bytes %d is too little", c.CacheBytes), fmt.Sprintf("give at least %d, or 0 for none", cacheMin)}
	}
	if c.CacheRAM == 0 {
		c.CacheRAM = cacheRAMDef
	}
	if c.CacheRAM > 0 && c.CacheRAM < cacheRAMMin {
		return c, &UsageError{fmt.Sprintf("--cache-ram %d is too little", c.CacheRAM), fmt.Sprintf("give at least %d, or 0 for none", cacheRAMMin)}
	}
	if c.DrainTime == 0 {
		c.DrainTime = 30 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.ControlLog == nil {
		c.ControlLog = c.Log
	}
	return c, nil
}

// logBytes is the log's size where none was asked for: as a new appliance may share a small disk with its backend.
func logBytes(diskTotal uint64) int64 {
	n := int64(min(diskTotal/8, logBytesDef)) / segmentBytes * segmentBytes
	return max(n, logBytesMin)
}

// cacheBytes is the read cache's size on the disk where none was asked for.
func cacheBytes(diskTotal, diskFree uint64) int64 {
	n := int64(min(diskTotal/8, diskFree/2, cacheDef))
	if n < cacheMin {
		return 0
	}
	return n
}
