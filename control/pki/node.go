package pki

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/control/durable"
)

const (
	serverFile = "server.pem"
	nodeFile   = "node.pem"
	scheme     = "varve"
	hostsMax   = 64
	// RequestBytesMax bounds a signing request.
	RequestBytesMax = 16 << 10
)

// Purpose of a certificate.
type Purpose string

// Purposes: the node port, and HTTPS and NBD.
const (
	ForNode   Purpose = "node"
	ForServer Purpose = "server"
)

// Request asks for a certificate. Hosts are those of a server's.
type Request struct {
	Purpose Purpose   `json:"purpose"`
	Node    uuid.UUID `json:"node"`
	CSR     []byte    `json:"csr"` // DER
}

// NewRequest makes a key and the request for its certificate.
func NewRequest(p Purpose, node uuid.UUID, hosts []string) (*ecdsa.PrivateKey, Request, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, Request{}, fmt.Errorf("make key: %w", err)
	}
	t := &x509.CertificateRequest{Subject: pkix.Name{Organization: []string{"Varve"}, CommonName: "varve"}}
	for _, h := range hosts[:min(len(hosts), hostsMax)] {
		if ip := net.ParseIP(h); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, t, key)
	if err != nil {
		return nil, Request{}, fmt.Errorf("make signing request: %w", err)
	}
	return key, Request{Purpose: p, Node: node, CSR: der}, nil
}

// KeyHash is the SHA-256 of the public key that a request is for, whose holder has signed it.
func (r Request) KeyHash() ([32]byte, error) {
	csr, err := r.parse()
	if err != nil {
		return [32]byte{}, err
	}
	return sha256.Sum256(csr.RawSubjectPublicKeyInfo), nil
}

func (r Request) parse() (*x509.CertificateRequest, error) {
	if len(r.CSR) > RequestBytesMax {
		return nil, fmt.Errorf("signing request of %d bytes", len(r.CSR))
	}
	csr, err := x509.ParseCertificateRequest(r.CSR)
	if err != nil {
		return nil, fmt.Errorf("parse signing request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("check signing request: %w", err)
	}
	if key, ok := csr.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("signing request is not for a P-256 key")
	}
	if len(csr.DNSNames)+len(csr.IPAddresses) > hostsMax {
		return nil, errors.New("signing request names too many hosts")
	}
	return csr, nil
}

// ErrNoKey: this node has not the authority's key.
var ErrNoKey = errors.New("this node has not the authority's key")

// SignRequest makes the certificate. What a node's names is the caller's word (Request.Node), never the request's.
func (s *Server) SignRequest(r Request) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.signLocked(r)
}

func (s *Server) signLocked(r Request) ([]byte, error) {
	if s.caKey == nil {
		return nil, ErrNoKey
	}
	csr, err := r.parse()
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := s.cfg.Now()
	t := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{Organization: []string{"Varve"}, CommonName: "varve"},
		NotBefore: now.Add(-skew), KeyUsage: x509.KeyUsageDigitalSignature}
	switch r.Purpose {
	case ForServer:
		t.NotAfter = now.Add(serverLife)
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		t.DNSNames, t.IPAddresses = csr.DNSNames, csr.IPAddresses
	case ForNode:
		if r.Node == uuid.Nil || s.cfg.Cluster == uuid.Nil {
			return nil, errors.New("a node's certificate needs its id and the cluster's")
		}
		t.NotAfter = now.Add(nodeLife)
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		t.DNSNames = []string{r.Node.String()}
		t.URIs = []*url.URL{{Scheme: scheme, Host: s.cfg.Cluster.String(), Path: "/" + r.Node.String()}}
	default:
		return nil, fmt.Errorf("a certificate for %q is not made here", r.Purpose)
	}
	if t.NotAfter.After(s.ca.NotAfter) {
		t.NotAfter = s.ca.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, t, s.ca, csr.PublicKey, s.caKey)
	if err != nil {
		return nil, fmt.Errorf("make certificate: %w", err)
	}
	return der, nil
}

// loadNode takes the node's certificate of the last run, or makes one.
func (s *Server) loadNode() error {
	if cert, ok := s.load(nodeFile); ok {
		if peer, err := PeerOf(cert.Leaf); err == nil && peer == (Peer{s.cfg.Cluster, s.cfg.Node}) {
			s.node = cert
			if !s.nodeDue() {
				return nil
			}
		}
	}
	if s.caKey == nil {
		if s.node != nil {
			return nil // Renew does it
		}
		return errors.New("node.pem is missing and this node has no authority's key to make one: join the cluster again")
	}
	return s.issueNode(context.Background())
}

func (s *Server) nodeDue() bool {
	leaf, now := s.node.Leaf, s.cfg.Now()
	return now.After(leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore)/3*2)) || now.Before(leaf.NotBefore)
}

func (s *Server) issueNode(ctx context.Context) error {
	key, r, err := NewRequest(ForNode, s.cfg.Node, nil)
	if err != nil {
		return err
	}
	der, err := s.signed(ctx, r)
	if err != nil {
		return fmt.Errorf("renew the node's certificate: %w", err)
	}
	cert, err := s.keep(nodeFile, key, der)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.node = cert
	s.mu.Unlock()
	return nil
}

// signed has a request signed, here or by a node that can.
func (s *Server) signed(ctx context.Context, r Request) ([]byte, error) {
	der, err := s.SignRequest(r)
	if errors.Is(err, ErrNoKey) && s.cfg.Sign != nil {
		return s.cfg.Sign(ctx, r)
	}
	return der, err
}

// Renew makes new certificates where they are due. It is called now and then; an error leaves the old ones in use.
func (s *Server) Renew(ctx context.Context) error {
	s.mu.Lock()
	nodeDue := s.node != nil && s.nodeDue()
	serverDue := s.due(s.cert.Leaf)
	s.mu.Unlock()
	var errs []error
	if nodeDue {
		errs = append(errs, s.issueNode(ctx))
	}
	if serverDue {
		errs = append(errs, s.renewServer(ctx))
	}
	return errors.Join(errs...)
}

func (s *Server) renewServer(ctx context.Context) error {
	s.mu.Lock()
	hosts := s.hostsNow()
	s.mu.Unlock()
	key, r, err := NewRequest(ForServer, s.cfg.Node, hosts)
	if err != nil {
		return err
	}
	der, err := s.signed(ctx, r)
	if err != nil {
		return fmt.Errorf("renew the server's certificate: %w", err)
	}
	cert, err := s.keep(serverFile, key, der)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.cert, s.asked = cert, hosts
	s.mu.Unlock()
	return nil
}

// NodeExpires is when the node's certificate ends.
func (s *Server) NodeExpires() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.node == nil || s.node.Leaf == nil {
		return time.Time{} // control's process has it
	}
	return s.node.Leaf.NotAfter
}

// CAHash is the SHA-256 of the authority's certificate, which a join token names.
func (s *Server) CAHash() [32]byte { return sha256.Sum256(s.ca.Raw) }

// CACert is the authority's certificate, DER.
func (s *Server) CACert() []byte { return s.ca.Raw }

// CAKey is the authority's key, PKCS 8 PEM, for a master that lacks it; ErrNoKey where it is not.
func (s *Server) CAKey() ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.caKey == nil {
		return nil, ErrNoKey
	}
	return encodeKey(s.caKey)
}

// HasCAKey says whether this node can sign.
func (s *Server) HasCAKey() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.caKey != nil
}

// TakeCAKey keeps the authority's key, which another master has sent.
func (s *Server) TakeCAKey(b []byte) error {
	key, err := parseKey(b)
	if err != nil {
		return fmt.Errorf("authority's key: %w", err)
	}
	if !key.PublicKey.Equal(s.ca.PublicKey) {
		return errors.New("authority's key does not belong to ca.crt")
	}
	if err := durable.Replace(s.cfg.Dir, "ca.key", b, 0o600); err != nil {
		return err
	}
	s.mu.Lock()
	s.caKey = key
	s.mu.Unlock()
	return nil
}

// DropCAKey forgets the key, on a node that is no master any more.
func (s *Server) DropCAKey() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.caKey == nil {
		return nil
	}
	if err := os.Remove(filepath.Join(s.cfg.Dir, "ca.key")); err != nil {
		return err
	}
	s.caKey = nil
	return durable.SyncDir(s.cfg.Dir)
}

// Peer is who a node certificate names.
type Peer struct{ Cluster, Node uuid.UUID }

// PeerOf reads it. It does not verify the certificate.
func PeerOf(leaf *x509.Certificate) (Peer, error) {
	if len(leaf.URIs) != 1 || leaf.URIs[0].Scheme != scheme {
		return Peer{}, errors.New("certificate names no node of a cluster")
	}
	cluster, err := uuid.Parse(leaf.URIs[0].Host)
	if err != nil {
		return Peer{}, fmt.Errorf("certificate's cluster: %w", err)
	}
	node, err := uuid.Parse(strings.TrimPrefix(leaf.URIs[0].Path, "/"))
	if err != nil {
		return Peer{}, fmt.Errorf("certificate's node: %w", err)
	}
	return Peer{cluster, node}, nil
}

// NodeTLS is the configuration for both ends of the node port: TLS 1.3, this node's certificate, the authority alone as root.
// Who the other end is, is the caller's to check (VerifyConnection).
func (s *Server) NodeTLS() *tls.Config {
	current := func() (*tls.Certificate, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.node, nil
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, RootCAs: s.Pool(), ClientCAs: s.Pool(), ClientAuth: tls.RequireAndVerifyClientCert, Time: s.cfg.Now,
		GetCertificate:       func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return current() },
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return current() },
	}
}

// Admitted is what a joining node gets besides the keys that it has made itself.
type Admitted struct {
	CA     []byte `json:"ca"`     // DER
	Node   []byte `json:"node"`   // DER
	Server []byte `json:"server"` // DER
}

// Install writes what a joining node needs to Open. The keys are those of its requests.
func Install(dir string, a Admitted, node, server *ecdsa.PrivateKey) error {
	if err := durable.MakeDir(dir); err != nil {
		return fmt.Errorf("make certificate directory: %w", err)
	}
	ca, err := x509.ParseCertificate(a.CA)
	if err != nil {
		return fmt.Errorf("parse authority certificate: %w", err)
	}
	s := &Server{cfg: Config{Dir: dir}, ca: ca}
	for _, c := range []struct {
		file string
		key  *ecdsa.PrivateKey
		der  []byte
	}{{nodeFile, node, a.Node}, {serverFile, server, a.Server}} {
		cert, err := s.keep(c.file, c.key, c.der)
		if err != nil {
			return err
		}
		if err := cert.Leaf.CheckSignatureFrom(ca); err != nil {
			return fmt.Errorf("%s is not signed by the cluster's authority: %w", c.file, err)
		}
	}
	return durable.Replace(dir, "ca.crt", encodeCert(a.CA), 0o644)
}
