package pki

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func serverCert(t *testing.T, s *Server) *x509.Certificate {
	t.Helper()
	c, err := s.TLS().GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	return c.Leaf
}

func TestCertificates(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tls")
	now := time.Now()
	hosts := []string{"localhost", "127.0.0.1", "::1"}
	cfg := Config{Dir: dir, Name: "c", Hosts: func() []string { return hosts }, Now: func() time.Time { return now }}
	open := func() *Server {
		t.Helper()
		s, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	first := serverCert(t, s)
	for _, h := range hosts {
		if _, err := first.Verify(x509.VerifyOptions{DNSName: h, Roots: s.Pool()}); err != nil {
			t.Fatal(err)
		}
	}
	for file, mode := range map[string]os.FileMode{"ca.key": 0o600, "server.pem": 0o600, "ca.crt": 0o644} {
		if info, err := os.Stat(filepath.Join(dir, file)); err != nil || info.Mode().Perm() != mode {
			t.Fatal(file, info, err)
		}
	}
	if again := serverCert(t, open()); !again.Equal(first) {
		t.Fatal("a restart made a new certificate")
	}
	// A new host, a due date and a damaged file make a new one, under the same authority.
	hosts = append(hosts, "node1")
	s2 := open()
	second := serverCert(t, s2)
	if second.Equal(first) || !s2.ca.Equal(s.ca) || second.VerifyHostname("node1") != nil {
		t.Fatal("certificate does not follow the hosts")
	}
	hosts = append(slices.Clone(hosts), "192.0.2.7") // an address that came late
	now = now.Add(hostsEvery)
	if late := serverCert(t, s2); late.VerifyHostname("192.0.2.7") != nil || late.VerifyHostname("node1") != nil {
		t.Fatal("certificate does not follow the hosts without a restart")
	}
	hosts = append(slices.Clone(hosts), "no host\x00")
	now = now.Add(hostsEvery)
	if odd := serverCert(t, s2); !odd.Equal(serverCert(t, s2)) {
		t.Fatal("a name that no certificate can have makes a new one each time")
	}
	hosts = hosts[:4]
	now = now.Add(serverLife/3*2 + time.Hour)
	third := serverCert(t, s2) // without a restart
	if third.Equal(second) || !third.NotAfter.After(second.NotAfter) {
		t.Fatal("certificate was not renewed")
	}
	if err := os.Truncate(filepath.Join(dir, "server.pem"), 100); err != nil {
		t.Fatal(err)
	}
	if serverCert(t, open()).Equal(third) {
		t.Fatal("certificate came from a damaged file")
	}
	// The authority is never replaced silently: clients have pinned it.
	if err := os.Rename(filepath.Join(dir, "ca.key"), filepath.Join(dir, "x")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(cfg); err == nil {
		t.Fatal("opened without the authority's key")
	}
	other, err := Open(Config{Dir: filepath.Join(t.TempDir(), "o"), Hosts: cfg.Hosts})
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(other.cfg.Dir, "ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "ca.key"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(cfg); err == nil {
		t.Fatal("opened with a key of another authority")
	}
}

// TestFileOfAnotherProcess: a process without the authority's key serves what the one beside it has renewed.
func TestFileOfAnotherProcess(t *testing.T) {
	now := time.Now()
	hosts := []string{"127.0.0.1"}
	cfg := Config{Dir: t.TempDir(), Hosts: func() []string { return hosts }, Now: func() time.Time { return now }}
	owner, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(cfg.Dir, "ca.key")
	if err := os.Rename(key, key+".away"); err != nil {
		t.Fatal(err)
	}
	cfg.Sign = func(context.Context, Request) ([]byte, error) { return nil, errors.New("control renews it") }
	reader, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	hosts = []string{"127.0.0.1", "192.0.2.7"}
	now = now.Add(hostsEvery)
	if c := serverCert(t, reader); c.VerifyHostname("192.0.2.7") == nil {
		t.Fatal("it has no key to make one")
	}
	if err := owner.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	now = now.Add(hostsEvery)
	if !serverCert(t, reader).Equal(serverCert(t, owner)) || serverCert(t, reader).VerifyHostname("192.0.2.7") != nil {
		t.Fatal("the certificate that the other process has made is not served")
	}
}

func TestHandshake(t *testing.T) {
	s, err := Open(Config{Dir: t.TempDir(), Hosts: func() []string { return []string{"127.0.0.1"} }})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		conf *tls.Config
		ok   bool
	}{
		"pinned": {&tls.Config{RootCAs: s.Pool(), ServerName: "127.0.0.1"}, true},
		"1.2":    {&tls.Config{RootCAs: s.Pool(), ServerName: "127.0.0.1", MaxVersion: tls.VersionTLS12}, true},
		"1.1":    {&tls.Config{RootCAs: s.Pool(), ServerName: "127.0.0.1", MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, false},
		"cbc": {&tls.Config{RootCAs: s.Pool(), ServerName: "127.0.0.1", MaxVersion: tls.VersionTLS12,
			CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}}, false},
		"other name": {&tls.Config{RootCAs: s.Pool(), ServerName: "192.0.2.1"}, false},
		"no CA":      {&tls.Config{ServerName: "127.0.0.1"}, false},
	} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			a, err := ln.Accept()
			if err == nil {
				err = errors.Join(tls.Server(a, s.TLS()).Handshake(), a.Close())
			}
			done <- err
		}()
		b, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		err = tls.Client(b, c.conf).Handshake()
		b.Close()
		if served := <-done; c.ok && served != nil {
			t.Errorf("%s: server: %v", name, served)
		}
		ln.Close()
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLocalHosts(t *testing.T) {
	if h := LocalHosts(); len(h) < 3 || h[0] != "localhost" {
		t.Fatal(h)
	}
}
