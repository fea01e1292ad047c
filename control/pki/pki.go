// Package pki keeps the cluster's internal certificate authority, this node's server certificate and its node certificate.
//
//	DIR/ca.key      the authority's key: on masters alone
//	DIR/ca.crt      its certificate: what clients pin, and what a join token names by hash
//	DIR/server.pem  the server's key and certificate in one file, so that they always belong together
//	DIR/node.pem    the same for the node port
//
// ECDSA P-256. The server's certificate lives 397 days, is renewed at two thirds of that without a restart, and is made anew
// when it does not cover a host name any more. The node's lives 90 days and names node and cluster:
//
//	DNS NODE-UUID, URI varve://CLUSTER-UUID/NODE-UUID        for both ends of a connection
//
// A node without the authority's key has its requests signed by one with it (Config.Sign, cluster's RPC); keys never travel
// for that. Both certificates are renewed by Renew; until it has worked the old ones stay in use.
package pki

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/control/durable"
)

const (
	caLife     = 10 * 365 * 24 * time.Hour
	serverLife = 397 * 24 * time.Hour
	nodeLife   = 90 * 24 * time.Hour
	skew       = time.Hour // a client's clock may be behind
)

// hostsEvery is how often it is looked whether the host is reached by others than the certificate names, and the file is read that
// another process may have renewed.
const hostsEvery = 5 * time.Second

// Config says where the files are and whom the certificate names.
type Config struct {
	Dir  string
	Name string // of the cluster, in the authority's subject
	// Hosts gives the names and addresses that the server's certificate is for, as they are now: LocalHosts. The first 64 count.
	Hosts func() []string
	Now   func() time.Time
	// Cluster and Node are for the node's certificate; without them there is none.
	Cluster, Node uuid.UUID
	// Sign has a request signed by a node that has the authority's key, for one that has not.
	Sign func(ctx context.Context, r Request) (der []byte, err error)
}

// Server holds the authority and the present certificates.
type Server struct {
	cfg Config
	ca  *x509.Certificate

	// mu guards what is below.
	mu    sync.Mutex
	caKey *ecdsa.PrivateKey // nil on a node that has it not
	cert  *tls.Certificate
	node  *tls.Certificate

	hosts  []string // as of looked
	looked time.Time
	asked  []string  // whom cert was made for, if it was here
	read   time.Time // when its file was
}

// Open loads the files or makes them in a directory that has none.
func Open(cfg Config) (*Server, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if err := durable.MakeDir(cfg.Dir); err != nil {
		return nil, fmt.Errorf("make certificate directory: %w", err)
	}
	s := &Server{cfg: cfg}
	if err := s.loadCA(); err != nil {
		return nil, err
	}
	if err := s.loadServer(); err != nil {
		return nil, err
	}
	if cfg.Node != uuid.Nil {
		if err := s.loadNode(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// CAFile is the path of the authority's certificate.
func (s *Server) CAFile() string { return filepath.Join(s.cfg.Dir, "ca.crt") }

// Pool holds the authority alone, for a client of this cluster.
func (s *Server) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(s.ca)
	return p
}

// TLS is a server's configuration: TLS 1.2 with AEAD or later.
func (s *Server) TLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.certificate() },
	}
}

// certificate returns the present certificate, renewed if it is due. A renewal that fails leaves the old one in use.
func (s *Server) certificate() (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.due(s.cert.Leaf) {
		return s.cert, nil
	}
	if s.caKey == nil { // then Renew does it, here or in the process that has the node port
		if now := s.cfg.Now(); now.Sub(s.read).Abs() >= hostsEvery {
			s.read = now
			if cert, ok := s.load(serverFile); ok {
				s.cert = cert
			}
		}
		return s.cert, nil
	}
	cert, err := s.issue()
	if err != nil {
		if s.cfg.Now().Before(s.cert.Leaf.NotAfter) {
			return s.cert, nil
		}
		return nil, err
	}
	s.cert = cert
	return cert, nil
}

func (s *Server) due(leaf *x509.Certificate) bool {
	life := leaf.NotAfter.Sub(leaf.NotBefore)
	if now := s.cfg.Now(); now.After(leaf.NotBefore.Add(life/3*2)) || now.Before(leaf.NotBefore) {
		return true
	}
	hosts := s.hostsNow()
	if slices.Equal(hosts, s.asked) {
		return false // also if a name among them is none that a certificate can have
	}
	for _, h := range hosts {
		if leaf.VerifyHostname(h) != nil {
			return true
		}
	}
	return false
}

// hostsNow gives whom the certificate should name. mu is held, or nobody else knows s yet.
func (s *Server) hostsNow() []string {
	if now := s.cfg.Now(); s.hosts == nil || now.Sub(s.looked).Abs() >= hostsEvery {
		s.hosts, s.looked = s.cfg.Hosts(), now
		s.hosts = s.hosts[:min(len(s.hosts), hostsMax)]
	}
	return s.hosts
}

func (s *Server) loadCA() error {
	key, keyErr := os.ReadFile(filepath.Join(s.cfg.Dir, "ca.key"))
	crt, crtErr := os.ReadFile(s.CAFile())
	switch {
	case errors.Is(crtErr, fs.ErrNotExist):
		return s.makeCA() // the key alone is what a crash in makeCA leaves; nobody has pinned it
	case errors.Is(keyErr, fs.ErrNotExist) && crtErr == nil && s.cfg.Sign != nil:
		ca, err := parseCert(crt)
		if err != nil || !ca.IsCA {
			return fmt.Errorf("ca.crt is not an authority's certificate: %w", err)
		}
		s.ca = ca
		return nil
	case keyErr != nil || crtErr != nil:
		return fmt.Errorf("load certificate authority (restore it, or remove ca.crt to make a new one): %w", errors.Join(keyErr, crtErr))
	}
	caKey, err := parseKey(key)
	if err != nil {
		return fmt.Errorf("ca.key: %w", err)
	}
	ca, err := parseCert(crt)
	if err != nil {
		return fmt.Errorf("ca.crt: %w", err)
	}
	if !caKey.PublicKey.Equal(ca.PublicKey) || !ca.IsCA {
		return errors.New("ca.key and ca.crt do not belong together")
	}
	s.ca, s.caKey = ca, caKey
	return nil
}

func (s *Server) makeCA() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make authority key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return err
	}
	now := s.cfg.Now()
	t := &x509.Certificate{SerialNumber: serial,
		Subject:   pkix.Name{Organization: []string{"Varve"}, CommonName: "Varve CA " + s.cfg.Name},
		NotBefore: now.Add(-skew), NotAfter: now.Add(caLife), IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return fmt.Errorf("make authority certificate: %w", err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return err
	}
	if err := durable.Replace(s.cfg.Dir, "ca.key", keyPEM, 0o600); err != nil {
		return err
	}
	if err := durable.Replace(s.cfg.Dir, "ca.crt", encodeCert(der), 0o644); err != nil {
		return err
	}
	if s.ca, err = x509.ParseCertificate(der); err != nil {
		return fmt.Errorf("parse authority certificate: %w", err)
	}
	s.caKey = key
	return nil
}

// load gives a pair of the last run if the authority has signed it.
func (s *Server) load(file string) (*tls.Certificate, bool) {
	b, err := os.ReadFile(filepath.Join(s.cfg.Dir, file))
	if err != nil {
		return nil, false
	}
	cert, err := tls.X509KeyPair(b, b)
	if err != nil || cert.Leaf.CheckSignatureFrom(s.ca) != nil {
		return nil, false
	}
	return &cert, true
}

// loadServer takes the certificate of the last run if it still serves, else makes one.
func (s *Server) loadServer() error {
	cert, ok := s.load(serverFile)
	if ok && (!s.due(cert.Leaf) || s.caKey == nil) {
		s.cert = cert
		return nil
	}
	cert, err := s.issue()
	s.cert = cert
	return err
}

func (s *Server) issue() (*tls.Certificate, error) {
	if s.caKey == nil {
		return nil, errors.New("server.pem is missing and this node has no authority's key to make one: join the cluster again")
	}
	hosts := s.hostsNow()
	key, r, err := NewRequest(ForServer, s.cfg.Node, hosts)
	if err != nil {
		return nil, err
	}
	der, err := s.signLocked(r)
	if err != nil {
		return nil, err
	}
	cert, err := s.keep(serverFile, key, der)
	if err == nil {
		s.asked = hosts
	}
	return cert, err
}

// keep writes a pair and loads it.
func (s *Server) keep(file string, key *ecdsa.PrivateKey, der []byte) (*tls.Certificate, error) {
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	both := append(keyPEM, encodeCert(der)...)
	if err := durable.Replace(s.cfg.Dir, file, both, 0o600); err != nil {
		return nil, err
	}
	cert, err := tls.X509KeyPair(both, both)
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", file, err)
	}
	return &cert, nil
}

// LocalHosts are the names and addresses under which clients reach this host.
func LocalHosts() []string {
	hosts := []string{"localhost", "127.0.0.1", "::1"}
	if name, err := os.Hostname(); err == nil && name != "localhost" {
		hosts = append(hosts, name)
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return hosts
	}
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && !ip.IP.IsLoopback() && !ip.IP.IsLinkLocalUnicast() {
			hosts = append(hosts, ip.IP.String())
		}
	}
	return hosts
}

func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make certificate serial: %w", err)
	}
	return n, nil
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func parseKey(b []byte) (*ecdsa.PrivateKey, error) {
	block, rest := pem.Decode(b)
	if block == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("not one PEM block")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("a %T, not ECDSA", key)
	}
	return ec, nil
}

func parseCert(b []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(b)
	if block == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("not one PEM block")
	}
	return x509.ParseCertificate(block.Bytes)
}
