// Package hypervisor talks to hypervisors: vSphere (vCenter or a single ESXi) and libvirt. It knows no state; package pmachine
// does.
//
//	h, err := hypervisor.Dial(ctx, hypervisor.Endpoint{Kind, Address, …})
//	inv, err := h.Inventory(ctx)               // hosts, what they have mounted by NFS, VMs with their disks
//	h.Mount(ctx, hostRef, Mount{…}) · h.Unmount(ctx, hostRef, name)
//	h.Close()
//
// # Whom it talks to
//
// What goes there are credentials that own every VM, so the other end is always known: by the system's authorities, by a CA
// that was given, or by the SHA-256 of its certificate; a CertificateError has that of the one that was met. Neither redirects
// nor proxies of the environment are followed. libvirt over TCP without TLS has to be asked for by name of Insecure, and unix
// sockets must be called as libvirt's are. The answers are not trusted: their sizes and counts are bounded, packets of libvirt
// before they are read.
package hypervisor

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"path"
	"strings"

	"varve/control/state"
	"varve/control/vmachine/vmconfig"
)

// Limits of what a hypervisor may tell.
const (
	hostsMax       = state.PMachineHostsMax
	mountsMax      = state.PMachineMountsMax
	machinesMax    = 20_000
	answerBytesMax = 256 << 20
	packetBytesMax = 32 << 20
)

// Endpoint is the way to a hypervisor.
type Endpoint struct {
	Kind, Address, User string
	// Thumbprint is the SHA-256 of the certificate to trust, CA in PEM who signs it.
	Thumbprint, CA string
	Credentials    Credentials
}

// Credentials are what proves who calls. They have no printed form.
type Credentials struct {
	Password    string `json:"password,omitempty"`
	Certificate string `json:"certificate,omitempty"`
	Key         string `json:"key,omitempty"`
	// Insecure allows libvirt over plain TCP.
	Insecure bool `json:"insecure,omitempty"`
}

// String keeps them out of messages.
func (Credentials) String() string { return "[credentials]" }

// GoString keeps them out of %#v.
func (Credentials) GoString() string { return "[credentials]" }

// Host of a hypervisor.
type Host struct{ Ref, Name, Address, State, Version string }

// Mount is an NFS export that a host has as a datastore.
type Mount struct {
	Host                       string // Ref
	Name, Server, Export, Path string
	Usable, ReadOnly           bool
}

// Machine is a VM.
type Machine struct {
	UUID, Name, Host, Power, Format, Guest string
	// Config is "datastore/path" of its describing file, "" where it is on none.
	Config string
	VCPUs  int
	Memory int64
	Disks  []vmconfig.Disk
}

// Inventory is all that a hypervisor tells.
type Inventory struct {
	Version  string
	Hosts    []Host
	Mounts   []Mount
	Machines []Machine
}

// Hypervisor is a session with one.
type Hypervisor interface {
	Inventory(ctx context.Context) (Inventory, error)
	// Mount makes a datastore of an NFS export; already is true where there was the very same.
	Mount(ctx context.Context, m Mount) (already bool, err error)
	// Unmount takes it away; none is no error.
	Unmount(ctx context.Context, host, name string) error
	Close()
}

// ErrAddress: the address is none of its kind.
var ErrAddress = errors.New("not an address of a hypervisor")

// CertificateError: the certificate that was met is not one to trust. It may be trusted by its thumbprint.
type CertificateError struct {
	Thumbprint string
	Pinned     bool // another one was given
	Err        error
}

func (e *CertificateError) Error() string {
	if e.Pinned {
		return "its certificate has thumbprint " + e.Thumbprint + ", which is not the one that is trusted"
	}
	return "its certificate is signed by nobody known; its SHA-256 thumbprint is " + e.Thumbprint
}

func (e *CertificateError) Unwrap() error { return e.Err }

// Dial begins a session. ctx bounds the dialling and, with libvirt, the session.
func Dial(ctx context.Context, e Endpoint) (Hypervisor, error) {
	if err := Check(e); err != nil {
		return nil, err
	}
	if e.Kind == state.KindVSphere {
		return dialVSphere(ctx, e)
	}
	return dialLibvirt(ctx, e)
}

// sockets are the names that libvirt's daemons give their sockets.
var sockets = []string{"libvirt-sock", "virtqemud-sock", "virtstoraged-sock", "virtproxyd-sock"}

// Check refuses an endpoint that cannot be one.
func Check(e Endpoint) error {
	u, err := url.Parse(e.Address)
	if err != nil || u.User != nil || u.Fragment != "" {
		return fmt.Errorf("%.80q: %w", e.Address, ErrAddress)
	}
	if _, err := tlsConfig(e, ""); err != nil {
		return err
	}
	switch e.Kind {
	case state.KindVSphere:
		if u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Path != "" && u.Path != "/" && u.Path != "/sdk" {
			return fmt.Errorf("%.80q is not https://host: %w", e.Address, ErrAddress)
		}
		return nil
	case state.KindLibvirt:
	default:
		return fmt.Errorf("kind %.20q: %w", e.Kind, ErrAddress)
	}
	driver, transport, _ := strings.Cut(u.Scheme, "+")
	socket := u.Query().Get("socket")
	switch {
	case driver != "qemu" && driver != "xen" && driver != "test" && driver != "ch" && driver != "bhyve", len(u.Path) < 2:
	case transport == "unix" && u.Host == "" && path.IsAbs(socket) && path.Clean(socket) == socket && known(path.Base(socket)):
		return nil
	case transport == "tls" && u.Host != "" && u.RawQuery == "":
		return nil
	case transport == "tcp" && u.Host != "" && u.RawQuery == "" && e.Credentials.Insecure:
		return nil
	case transport == "tcp" && !e.Credentials.Insecure:
		return fmt.Errorf("qemu+tcp neither encrypts nor asks who calls; use qemu+tls, or allow it: %w", ErrAddress)
	}
	return fmt.Errorf("%.80q is none of qemu+tls://host/system, qemu+tcp://host/system, qemu+unix:///system?socket=/run/libvirt/libvirt-sock: %w",
		e.Address, ErrAddress)
}

func known(name string) bool {
	for _, s := range sockets {
		if s == name {
			return true
		}
	}
	return false
}

// thumbprint is how a pin is compared: lower-case hex without colons.
func thumbprint(s string) string {
	return strings.ToLower(strings.NewReplacer(":", "", " ", "").Replace(s))
}

// tlsConfig says whom to trust.
func tlsConfig(e Endpoint, host string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host}
	if e.CA != "" {
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM([]byte(e.CA)) {
			return nil, fmt.Errorf("the certificate authority is not PEM: %w", ErrAddress)
		}
	}
	pin := thumbprint(e.Thumbprint)
	if raw, err := hex.DecodeString(pin); pin != "" && (err != nil || len(raw) != sha256.Size) {
		return nil, fmt.Errorf("the thumbprint is not a SHA-256 in hex: %w", ErrAddress)
	}
	if e.Credentials.Certificate != "" {
		pair, err := tls.X509KeyPair([]byte(e.Credentials.Certificate), []byte(e.Credentials.Key))
		if err != nil {
			return nil, fmt.Errorf("the client certificate and its key do not belong together: %w", ErrAddress)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	// The check is done here, for its error to tell the thumbprint, and for a pin to stand in for it.
	c.InsecureSkipVerify = true
	roots := c.RootCAs
	c.VerifyConnection = func(s tls.ConnectionState) error {
		leaf := s.PeerCertificates[0]
		sum := sha256.Sum256(leaf.Raw)
		met := hex.EncodeToString(sum[:])
		if pin != "" {
			if met != pin {
				return &CertificateError{Thumbprint: met, Pinned: true}
			}
			return nil
		}
		o := x509.VerifyOptions{Roots: roots, DNSName: host, Intermediates: x509.NewCertPool()}
		for _, c := range s.PeerCertificates[1:] {
			o.Intermediates.AddCert(c)
		}
		if _, err := leaf.Verify(o); err != nil {
			return &CertificateError{Thumbprint: met, Err: err}
		}
		return nil
	}
	return c, nil
}

// clip makes text of a hypervisor fit a row.
func clip(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "\uFFFD"))
	for len(s) > most {
		s = strings.ToValidUTF8(s[:most], "")
	}
	return s
}
