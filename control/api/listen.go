package api

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// ListenUnix opens the socket at path for this user alone. One left behind by a killed process is replaced: the data
// directory's lock says that no other process serves it. The listener's Close removes the file.
func ListenUnix(path string) (net.Listener, error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	defer dir.Close()
	// A socket's address has 108 bytes; through the directory's descriptor any path fits.
	name := filepath.Base(path)
	short := fmt.Sprintf("/proc/self/fd/%d/%s.new", dir.Fd(), name)
	if err := os.Remove(path + ".new"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: short, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	ln.SetUnlinkOnClose(false)
	// Nobody can connect under the final name before the mode is right.
	err = os.Chmod(path+".new", 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), ln.Close())
	}
	return &unixListener{UnixListener: ln, path: path}, nil
}

type unixListener struct {
	*net.UnixListener
	path string
}

func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

func (l *unixListener) Close() error {
	err := l.UnixListener.Close()
	if rerr := os.Remove(l.path); err == nil && !errors.Is(rerr, fs.ErrNotExist) {
		err = rerr
	}
	return err
}

// peer is who is at the other end of a connection.
type peer struct {
	unix  bool
	uid   uint32
	known bool // uid is the kernel's word
}

type peerKey struct{}

func withPeer(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if capped, ok := c.(*cappedConn); ok {
		c = capped.Conn
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	p := peer{unix: true}
	if raw, err := u.SyscallConn(); err == nil {
		err = raw.Control(func(fd uintptr) {
			if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
				p.uid, p.known = cred.Uid, true
			}
		})
		p.known = p.known && err == nil
	}
	return context.WithValue(ctx, peerKey{}, p)
}

func ownUser() uint32 { return uint32(os.Geteuid()) }

// cappedListener closes connections beyond a total and beyond a number per address as soon as they are accepted.
type cappedListener struct {
	net.Listener
	total, each int

	// mu guards open and by.
	mu   sync.Mutex
	open int
	by   map[string]int
}

func newCappedListener(ln net.Listener, total, each int) *cappedListener {
	return &cappedListener{Listener: ln, total: total, each: each, by: make(map[string]int)}
}

// Accept implements net.Listener.
func (l *cappedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if from, ok := l.enter(c); ok {
			return &cappedConn{Conn: c, leave: sync.OnceFunc(func() { l.leave(from) })}, nil
		}
		c.Close() // over the cap: the client sees a closed connection, there is nothing to report
	}
}

// enter counts a connection. On a unix socket, whose peers are trusted, only the total counts.
func (l *cappedListener) enter(c net.Conn) (from string, ok bool) {
	if tcp, isTCP := c.RemoteAddr().(*net.TCPAddr); isTCP {
		from = tcp.IP.String()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open >= l.total || from != "" && l.by[from] >= l.each {
		return "", false
	}
	l.open++
	l.by[from]++
	return from, true
}

func (l *cappedListener) leave(from string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open--
	if l.by[from]--; l.by[from] == 0 {
		delete(l.by, from)
	}
}

type cappedConn struct {
	net.Conn
	leave func()
}

func (c *cappedConn) Close() error {
	c.leave()
	return c.Conn.Close()
}
