package hypervisor

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi/simulator"

	"varve/control/state"
)

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		kind, address string
		insecure, ok  bool
	}{
		{"vsphere", "https://vc.example.com", false, true},
		{"vsphere", "https://10.0.0.1:8989/sdk", false, true},
		{"vsphere", "http://vc.example.com", false, false},
		{"vsphere", "https://user:pass@vc.example.com", false, false},
		{"vsphere", "https://vc.example.com/other", false, false},
		{"vsphere", "https://vc.example.com/sdk?x=1", false, false},
		{"vsphere", "file:///etc/passwd", false, false},
		{"libvirt", "qemu+unix:///system?socket=/run/libvirt/libvirt-sock", false, true},
		{"libvirt", "test+unix:///default?socket=/run/x/libvirt-sock", false, true},
		{"libvirt", "qemu+unix:///system?socket=/run/docker.sock", false, false},
		{"libvirt", "qemu+unix:///system?socket=/run/x/../docker/libvirt-sock", false, false},
		{"libvirt", "qemu+unix:///system", false, false},
		{"libvirt", "qemu+tls://kvm1/system", false, true},
		{"libvirt", "qemu+tls://kvm1/system?no_verify=1", false, false},
		{"libvirt", "qemu+tcp://kvm1/system", false, false},
		{"libvirt", "qemu+tcp://kvm1/system", true, true},
		{"libvirt", "qemu+ssh://kvm1/system", true, false},
		{"libvirt", "esx://kvm1/", true, false},
		{"xen", "https://xen", false, false},
		{"vsphere", "::", false, false},
	} {
		err := Check(Endpoint{Kind: c.kind, Address: c.address, Credentials: Credentials{Insecure: c.insecure}})
		if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrAddress) {
			t.Errorf("%s %s: %v", c.kind, c.address, err)
		}
	}
	for _, pin := range []string{"abc", strings.Repeat("0", 63), strings.Repeat("zz", 32)} {
		if err := Check(Endpoint{Kind: "vsphere", Address: "https://a", Thumbprint: pin}); !errors.Is(err, ErrAddress) {
			t.Errorf("thumbprint %s: %v", pin, err)
		}
	}
}

// bytesConn reads from a buffer.
type bytesConn struct {
	net.Conn
	r io.Reader
}

func (b *bytesConn) Read(p []byte) (int, error) { return b.r.Read(p) }
func (b *bytesConn) Close() error               { return nil }

// Packets of a length that would harm the client are refused before they are read, however they come in.
func TestPackets(t *testing.T) {
	packet := func(length uint32, body int) []byte {
		return append(binary.BigEndian.AppendUint32(nil, length), make([]byte, body)...)
	}
	good := append(packet(28, 24), packet(100, 96)...)
	for _, chunk := range []int{1, 3, 5, 7, 1000} {
		p := &packets{Conn: &bytesConn{r: bytes.NewReader(good)}}
		var got []byte
		b := make([]byte, chunk)
		for {
			n, err := p.Read(b)
			got = append(got, b[:n]...)
			if err != nil {
				if !errors.Is(err, io.EOF) {
					t.Fatal(err)
				}
				break
			}
		}
		if !bytes.Equal(got, good) {
			t.Errorf("in chunks of %d: %d bytes of %d", chunk, len(got), len(good))
		}
	}
	for _, length := range []uint32{0, 4, 27, packetBytesMax + 1, 1 << 31, 0xffffffff} {
		p := &packets{Conn: &bytesConn{r: bytes.NewReader(packet(length, 100))}}
		_, err := io.ReadAll(p)
		if !errors.Is(err, errPacket) {
			t.Errorf("a packet of %d bytes: %v", length, err)
		}
	}
}

// Whoever is not known gets no password, and says by which thumbprint he could be known.
func TestCertificates(t *testing.T) {
	asked := 0
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { asked++; w.WriteHeader(http.StatusTeapot) }))
	defer s.Close()
	sum := sha256.Sum256(s.Certificate().Raw)
	met := hex.EncodeToString(sum[:])
	e := Endpoint{Kind: state.KindVSphere, Address: s.URL, User: "u", Credentials: Credentials{Password: "canary"}}
	_, err := Dial(t.Context(), e)
	var c *CertificateError
	if !errors.As(err, &c) || c.Thumbprint != met || c.Pinned || asked != 0 {
		t.Errorf("%v, asked %d", err, asked)
	}
	e.Thumbprint = strings.Repeat("ab", 32)
	if _, err = Dial(t.Context(), e); !errors.As(err, &c) || !c.Pinned || c.Thumbprint != met || asked != 0 {
		t.Errorf("%v, asked %d", err, asked)
	}
	var colons []string
	for i := 0; i < len(met); i += 2 {
		colons = append(colons, strings.ToUpper(met[i:i+2]))
	}
	e.Thumbprint = strings.Join(colons, ":")
	if _, err = Dial(t.Context(), e); err == nil || asked == 0 || errors.As(err, &c) && c.Pinned {
		t.Errorf("with its thumbprint: %v, asked %d", err, asked)
	}
	if strings.Contains(err.Error(), "canary") {
		t.Errorf("the password is in an error: %v", err)
	}
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	other := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the redirect was followed") }))
	defer other.Close()
	s := httptest.NewTLSServer(http.RedirectHandler(other.URL, http.StatusTemporaryRedirect))
	defer s.Close()
	sum := sha256.Sum256(s.Certificate().Raw)
	_, err := Dial(t.Context(), Endpoint{Kind: state.KindVSphere, Address: s.URL, Thumbprint: hex.EncodeToString(sum[:])})
	if err == nil {
		t.Error("no error")
	}
}

// vcsim serves govmomi's simulator of a vCenter with three hosts in a cluster.
func vcsim(t *testing.T) Endpoint {
	t.Helper()
	dir := t.TempDir() // the simulator wants the datastore's name to be a directory
	if err := os.Mkdir(filepath.Join(dir, "default"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	m := simulator.VPX()
	m.Host, m.ClusterHost, m.Machine = 0, 3, 2
	t.Cleanup(m.Remove)
	if err := m.Create(); err != nil {
		t.Fatal(err)
	}
	m.Service.TLS = &tls.Config{}
	m.Service.Listen = &url.URL{Host: "127.0.0.1:0", User: url.UserPassword("admin", "canary-password")}
	s := m.Service.NewServer()
	t.Cleanup(s.Close)
	sum := sha256.Sum256(s.Certificate().Raw)
	return Endpoint{Kind: state.KindVSphere, Address: "https://" + s.URL.Host, User: "admin", Thumbprint: hex.EncodeToString(sum[:]),
		Credentials: Credentials{Password: "canary-password"}}
}

func TestVSphere(t *testing.T) {
	e := vcsim(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	h, err := Dial(ctx, e)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	inv, err := h.Inventory(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(inv.Hosts) != 3 || len(inv.Machines) == 0 || len(inv.Mounts) != 0 || !strings.Contains(inv.Version, "vCenter") {
		t.Fatalf("%+v", inv)
	}
	for _, host := range inv.Hosts {
		if already, err := h.Mount(ctx, Mount{Host: host.Ref, Name: "default", Server: "192.0.2.7", Export: "/default"}); err != nil || already {
			t.Fatalf("%s: %v %v", host.Name, already, err)
		}
	}
	if already, err := h.Mount(ctx, Mount{Host: inv.Hosts[0].Ref, Name: "default", Server: "192.0.2.7", Export: "/default"}); err != nil || !already {
		t.Errorf("a second time: %v %v", already, err)
	}
	if _, err := h.Mount(ctx, Mount{Host: inv.Hosts[0].Ref, Name: "default", Server: "192.0.2.8", Export: "/default"}); err == nil {
		t.Error("another share under the same name")
	}
	if inv, err = h.Inventory(ctx); err != nil || len(inv.Mounts) != 3 {
		t.Fatalf("%+v %v", inv.Mounts, err)
	}
	for _, m := range inv.Mounts {
		if m.Server != "192.0.2.7" || m.Export != "/default" || m.Name != "default" || !m.Usable || m.ReadOnly || m.Path != "/vmfs/volumes/default" {
			t.Errorf("%+v", m)
		}
	}
	for _, m := range inv.Machines {
		if m.UUID == "" || m.Power != state.PowerRunning || m.Config == "" || len(m.Disks) == 0 || m.Host == "" || m.Format != state.FormatVMX {
			t.Errorf("%+v", m)
		}
	}
	e.Credentials.Password = "wrong canary"
	if _, err := Dial(ctx, e); err == nil || strings.Contains(err.Error(), "canary") {
		t.Errorf("a wrong password: %v", err)
	}
}
