package nbd

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// authority is a CA that makes certificates for 127.0.0.1.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

var testAuthority = sync.OnceValues(newAuthority)

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template("ca", true), template("ca", true), &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	a := &authority{cert: cert, key: key, pool: x509.NewCertPool()}
	a.pool.AddCert(cert)
	return a, nil
}

func template(name string, ca bool) *x509.Certificate {
	t := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
	}
	if ca {
		t.IsCA, t.BasicConstraintsValid, t.KeyUsage = true, true, x509.KeyUsageCertSign
	}
	return t
}

func (a *authority) issue(t testing.TB, name string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template(name, false), a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func ca(t testing.TB) *authority {
	t.Helper()
	a, err := testAuthority()
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func serverTLS(t testing.TB) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{ca(t).issue(t, "server")}}
}

// startTLS does STARTTLS and the handshake. The client goes on inside.
func (c *client) startTLS(certs ...tls.Certificate) error {
	c.t.Helper()
	c.option(optStartTLS, nil)
	c.expect(optStartTLS, protocol.NEGOTIATION_TYPE_REPLY_ACK)
	tc := tls.Client(c.c, &tls.Config{RootCAs: ca(c.t).pool, ServerName: "127.0.0.1", Certificates: certs})
	if err := tc.Handshake(); err != nil {
		return err
	}
	c.c = tc
	return nil
}

// TestTLSRequired: before STARTTLS nothing is told, after it everything works, in bursts and in bulk.
func TestTLSRequired(t *testing.T) {
	m := newMemory(64 << 20)
	e := newExports(map[string]Device{"d": m})
	_, addr, _ := listen(t, "tcp", Config{Exports: e, TLS: TLSRequired, TLSConfig: serverTLS(t)})
	c := hello(t, addr)
	for _, id := range []uint32{protocol.NEGOTIATION_ID_OPTION_LIST, protocol.NEGOTIATION_ID_OPTION_INFO, protocol.NEGOTIATION_ID_OPTION_GO,
		optStructuredReply, optListMetaContext, optSetMetaContext, 0x1234} {
		c.option(id, cat(str("d"), be(uint16(0))))
		c.expect(id, repErrTLSReqd)
	}
	if e.openNow() != 0 || len(e.opened) != 0 {
		t.Fatal("an export was opened in the clear")
	}
	if err := c.startTLS(); err != nil {
		t.Fatal(err)
	}
	c.option(optStartTLS, nil)
	c.expect(optStartTLS, repErrInvalid)
	c.option(optStructuredReply, nil)
	c.expect(optStructuredReply, protocol.NEGOTIATION_TYPE_REPLY_ACK)
	c.option(protocol.NEGOTIATION_ID_OPTION_GO, cat(str("d"), be(uint16(0))))
	c.exportInfo(c.expect(protocol.NEGOTIATION_ID_OPTION_GO, protocol.NEGOTIATION_TYPE_REPLY_INFO))
	c.expect(protocol.NEGOTIATION_ID_OPTION_GO, protocol.NEGOTIATION_TYPE_REPLY_ACK)
	data := pattern(3, 9<<20)
	c.pwrite(4096, data)
	if !bytes.Equal(c.pread(4096, 9<<20), data) {
		t.Fatal("data differ")
	}
	var burst []byte
	for i := range uint64(64) {
		burst = append(burst, rawRequest(cmdWrite, 0, i, i*4096, 4096, pattern(i, 4096))...)
	}
	c.send(burst)
	seen := map[uint64]bool{}
	for range 64 {
		a, err := readAnswer(c.c, func(uint64) int { return 0 })
		if err != nil || a.errno != 0 || seen[a.cookie] {
			t.Fatalf("%+v %v", a, err)
		}
		seen[a.cookie] = true
	}
	c.request(cmdDisc, 0, 0, 0, 0, nil)
	c.closed()

	c = hello(t, addr)
	c.option(optExportName, []byte("d"))
	c.closed()
	c = hello(t, addr)
	c.option(protocol.NEGOTIATION_ID_OPTION_ABORT, nil)
	c.expect(protocol.NEGOTIATION_ID_OPTION_ABORT, protocol.NEGOTIATION_TYPE_REPLY_ACK)
	c.closed()
}

// TestTLSForgetsPlaintext: structured replies and contexts negotiated in the clear are gone after STARTTLS.
func TestTLSForgetsPlaintext(t *testing.T) {
	_, addr, _ := listen(t, "tcp", Config{Exports: newExports(map[string]Device{"d": newMemory(1 << 20)}), TLS: TLSOptional, TLSConfig: serverTLS(t)})
	c := hello(t, addr)
	c.option(optStructuredReply, nil)
	c.expect(optStructuredReply, protocol.NEGOTIATION_TYPE_REPLY_ACK)
	c.option(optSetMetaContext, cat(str("d"), be(uint32(1)), str(allocationContext)))
	c.expect(optSetMetaContext, repMetaContext)
	c.expect(optSetMetaContext, protocol.NEGOTIATION_TYPE_REPLY_ACK)
	if err := c.startTLS(); err != nil {
		t.Fatal(err)
	}
	c.option(optSetMetaContext, cat(str("d"), be(uint32(1)), str(allocationContext)))
	c.expect(optSetMetaContext, repErrInvalid)
	c.option(protocol.NEGOTIATION_ID_OPTION_GO, cat(str("d"), be(uint16(0))))
	c.exportInfo(c.expect(protocol.NEGOTIATION_ID_OPTION_GO, protocol.NEGOTIATION_TYPE_REPLY_INFO))
	c.expect(protocol.NEGOTIATION_ID_OPTION_GO, protocol.NEGOTIATION_TYPE_REPLY_ACK)
	if c.flags&flagSendDF != 0 {
		t.Fatal("structured replies survived STARTTLS")
	}
	c.request(cmdRead, 0, 5, 0, 4, nil)
	if got := c.read(16); !bytes.Equal(got[:4], be(protocol.TRANSMISSION_MAGIC_REPLY)) {
		t.Fatalf("not a simple reply: %x", got)
	}
}

// TestTLSInjection is CVE-2021-3716: options sent in the clear behind STARTTLS must not be taken for the client's.
func TestTLSInjection(t *testing.T) {
	_, addr, _ := listen(t, "tcp", Config{Exports: goldenExports(), TLS: TLSOptional, TLSConfig: serverTLS(t)})
	c := hello(t, addr)
	c.send(cat([]byte("IHAVEOPT"), be(optStartTLS), be(uint32(0)), []byte("IHAVEOPT"), be(optStructuredReply), be(uint32(0))))
	c.closed()
}

// TestTLSClientCertificates: the CA decides who comes in, the certificate names them, and the name reaches Exports.
func TestTLSClientCertificates(t *testing.T) {
	e := newExports(map[string]Device{"d": newMemory(1 << 20)})
	_, addr, _ := listen(t, "tcp", Config{Exports: e, TLS: TLSRequired, TLSConfig: serverTLS(t), ClientCAs: ca(t).pool})
	c := hello(t, addr)
	if err := c.startTLS(ca(t).issue(t, "host-7")); err != nil {
		t.Fatal(err)
	}
	c.option(protocol.NEGOTIATION_ID_OPTION_INFO, cat(str("d"), be(uint16(0))))
	c.expect(protocol.NEGOTIATION_ID_OPTION_INFO, protocol.NEGOTIATION_TYPE_REPLY_INFO)
	if len(e.peers) != 1 || !e.peers[0].TLS || e.peers[0].Identity != "host-7" {
		t.Fatalf("peers %+v", e.peers)
	}
	stranger, err := newAuthority()
	if err != nil {
		t.Fatal(err)
	}
	for _, certs := range [][]tls.Certificate{nil, {stranger.issue(t, "host-7")}} {
		c = hello(t, addr)
		if err := c.startTLS(certs...); err != nil {
			continue
		}
		// TLS 1.3 tells the client only with its first read
		c.option(protocol.NEGOTIATION_ID_OPTION_LIST, nil)
		if _, err := c.c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
			t.Fatalf("client without a good certificate is served: %v", err)
		}
	}
}

func TestTLSIdentify(t *testing.T) {
	e := newExports(map[string]Device{"d": newMemory(1 << 20)})
	refuse := errors.New("not on the list")
	_, addr, _ := listen(t, "tcp", Config{Exports: e, TLS: TLSOptional, TLSConfig: serverTLS(t), ClientCAs: ca(t).pool,
		Identify: func(s tls.ConnectionState) (string, error) {
			if s.PeerCertificates[0].Subject.CommonName == "bad" {
				return "", refuse
			}
			return "vm:" + s.PeerCertificates[0].Subject.CommonName, nil
		}})
	c := hello(t, addr)
	if err := c.startTLS(ca(t).issue(t, "one")); err != nil {
		t.Fatal(err)
	}
	c.option(protocol.NEGOTIATION_ID_OPTION_INFO, cat(str("d"), be(uint16(0))))
	c.expect(protocol.NEGOTIATION_ID_OPTION_INFO, protocol.NEGOTIATION_TYPE_REPLY_INFO)
	if id := e.peers[0].Identity; id != "vm:one" {
		t.Fatalf("identity %q", id)
	}
	c = hello(t, addr)
	if err := c.startTLS(ca(t).issue(t, "bad")); err == nil {
		c.closed()
	}
}

// TestTLSExports: an export that wants TLS is not listed in the clear and says why when it is named.
func TestTLSExports(t *testing.T) {
	e := newExports(map[string]Device{"open": newMemory(1 << 20), "sealed": newMemory(1 << 20)})
	e.refuse["sealed"] = ErrTLSRequired
	_, addr, _ := listen(t, "tcp", Config{Exports: e, TLS: TLSOptional, TLSConfig: serverTLS(t)})
	c := hello(t, addr)
	if names := list(c); !slices.Equal(names, []string{"open"}) {
		t.Fatalf("listed in the clear: %v", names)
	}
	c.option(protocol.NEGOTIATION_ID_OPTION_GO, cat(str("sealed"), be(uint16(0))))
	c.expect(protocol.NEGOTIATION_ID_OPTION_GO, repErrTLSReqd)
	if err := c.startTLS(); err != nil {
		t.Fatal(err)
	}
	if names := list(c); !slices.Equal(names, []string{"open", "sealed"}) {
		t.Fatalf("listed under TLS: %v", names)
	}
}

// TestTLSPeerVanishes cuts a client's TLS session off after every few bytes it sends: the server lets go each time.
func TestTLSPeerVanishes(t *testing.T) {
	e := newExports(map[string]Device{"d": newMemory(1 << 20)})
	s, addr, _ := listen(t, "tcp", Config{Exports: e, TLS: TLSRequired, TLSConfig: serverTLS(t)})
	for limit := 0; limit < 3000; limit += 97 {
		c := hello(t, addr)
		cut := &cutConn{Conn: c.c, left: limit + 16}
		c.option(optStartTLS, nil)
		c.expect(optStartTLS, protocol.NEGOTIATION_TYPE_REPLY_ACK)
		cut.left = limit
		tc := tls.Client(cut, &tls.Config{RootCAs: ca(t).pool, ServerName: "127.0.0.1"})
		if tc.Handshake() == nil {
			// as far as the limit lets it, into transmission
			tc.Write(cat([]byte("IHAVEOPT"), be(protocol.NEGOTIATION_ID_OPTION_GO), be(uint32(7)), str("d"), be(uint16(0))))
			tc.Write(rawRequest(cmdWrite, 0, 1, 0, 4096, make([]byte, 4096)))
		}
		cut.Close()
	}
	waitFor(t, "end of all connections", func() bool { return s.accepted.Load() == 0 && e.openNow() == 0 })
}

// cutConn breaks after left bytes have been written.
type cutConn struct {
	net.Conn
	left int
}

func (c *cutConn) Write(p []byte) (int, error) {
	if len(p) > c.left {
		n, _ := c.Conn.Write(p[:c.left])
		c.left = 0
		c.Conn.Close()
		return n, os.ErrClosed
	}
	c.left -= len(p)
	return c.Conn.Write(p)
}
