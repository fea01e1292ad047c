package nbdclient

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// DefaultPort is the port of NBD where a URI names none.
const DefaultPort = "10809"

// Target says where an export is.
type Target struct {
	// Network is "tcp" or "unix", Address what net.Dial takes for it.
	Network, Address string
	// Export is the export's name; empty means the server's default export.
	Export string
	// TLS makes the client ask for STARTTLS with this configuration.
	TLS *tls.Config
}

// IsURI says whether s is one of the NBD URI schemes that ParseURI takes.
func IsURI(s string) bool {
	scheme, _, ok := strings.Cut(s, "://")
	if !ok {
		return false
	}
	switch scheme {
	case "nbd", "nbds", "nbd+unix", "nbds+unix":
		return true
	}
	return false
}

// ParseURI reads an NBD URI (NBD project, doc/uri.md): nbd://host[:port]/export, nbds:// for TLS, and
// nbd+unix:///export?socket=PATH. TLS is verified against the system's certificates unless the caller changes Target.TLS.
func ParseURI(s string) (Target, error) {
	u, err := url.Parse(s)
	if err != nil {
		return Target{}, fmt.Errorf("read NBD URI: %w", err)
	}
	t := Target{Export: strings.TrimPrefix(u.Path, "/")}
	scheme, unix := strings.CutSuffix(u.Scheme, "+unix")
	switch scheme {
	case "nbd":
	case "nbds":
		t.TLS = &tls.Config{ServerName: u.Hostname(), MinVersion: tls.VersionTLS12}
	default:
		return Target{}, fmt.Errorf("read NBD URI %q: the scheme is none of nbd, nbds, nbd+unix, nbds+unix", s)
	}
	if unix {
		t.Network, t.Address = "unix", u.Query().Get("socket")
		if t.Address == "" {
			return Target{}, fmt.Errorf("read NBD URI %q: ?socket=PATH is missing", s)
		}
		return t, nil
	}
	if u.Hostname() == "" {
		return Target{}, fmt.Errorf("read NBD URI %q: the host is missing", s)
	}
	port := u.Port()
	if port == "" {
		port = DefaultPort
	}
	t.Network, t.Address = "tcp", net.JoinHostPort(u.Hostname(), port)
	return t, nil
}

// socketPathMax is the longest path that fits in a unix socket's address.
const socketPathMax = 107

func (t Target) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	if t.Network != "unix" || len(t.Address) <= socketPathMax {
		return d.DialContext(ctx, t.Network, t.Address)
	}
	dir, err := os.Open(filepath.Dir(t.Address)) // through its descriptor any path fits
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return d.DialContext(ctx, t.Network, fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(t.Address)))
}

// URI gives the target as a URI for other programs. It is only for targets without TLS.
func (t Target) URI() (string, error) {
	if t.TLS != nil {
		return "", errors.New("a TLS target has no URI that carries its certificates")
	}
	if t.Network == "unix" && len(t.Address) > socketPathMax {
		return "", fmt.Errorf("the path of its socket has %d characters, other programs take %d", len(t.Address), socketPathMax)
	}
	if t.Network == "unix" {
		q := url.Values{"socket": {t.Address}}
		return (&url.URL{Scheme: "nbd+unix", Path: "/" + t.Export, RawQuery: q.Encode()}).String(), nil
	}
	return (&url.URL{Scheme: "nbd", Host: t.Address, Path: "/" + t.Export}).String(), nil
}

func (t Target) String() string {
	return fmt.Sprintf("export %q at %s", t.Export, t.Address)
}
