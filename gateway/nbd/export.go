package nbd

import (
	"context"
	"errors"
	"net"

	"varve/volumedriver/blockio"
)

// Device is an opened export: the part of a volume that block requests need. The Try methods, Kick and the Completer
// they are given follow package blockio's contract; the rest may block and must end early when ctx does.
type Device interface {
	Size() int64
	ReadOnly() bool

	TryRead(p []byte, off int64) error
	TryWrite(p []byte, off int64, f blockio.Flags, c blockio.Completer, tag uint64) error
	TryZero(off, n int64, f blockio.Flags, c blockio.Completer, tag uint64) error
	TryFlush(c blockio.Completer, tag uint64) error
	Kick()
	// KickSync is Kick that also does what has to reach the disk on the caller's goroutine, where it can. KickAhead is Kick for
	// writes that a flush is going to follow.
	KickSync()
	KickAhead()
	// FlushInline flushes on the caller's goroutine. It covers what every connection has been told is written.
	FlushInline() error

	Read(ctx context.Context, p []byte, off int64) error
	Write(ctx context.Context, p []byte, off int64, f blockio.Flags) error
	Zero(ctx context.Context, off, n int64, f blockio.Flags) error
	Flush(ctx context.Context) error
	// Extents describes a prefix of [off, off+n) in at most max runs, at least one.
	Extents(ctx context.Context, off, n int64, max int) ([]blockio.Extent, error)
}

// Differ is what a Device may also be: it knows what has changed since its snapshots. Clients ask for the metadata context
// "varve:changed/SNAPSHOT", whose status is 1 where something may have changed, so that a backup reads only that.
type Differ interface {
	// Since says whether there is such a snapshot.
	Since(snapshot string) bool
	// Changed describes a prefix of [off, off+n) in at most max runs, at least one; Hole means that nothing has changed.
	Changed(ctx context.Context, snapshot string, off, n int64, max int) ([]blockio.Extent, error)
}

// Describer is what a Device may also be: its text is sent to clients that ask for NBD_INFO_DESCRIPTION.
type Describer interface {
	Description() string
}

// Peer is the client, as far as it is known.
type Peer struct {
	// Addr is the remote address; Local says that it came over a unix socket.
	Addr  net.Addr
	Local bool
	// TLS says that the connection is encrypted; Identity is then who Config.Identify said it is.
	TLS      bool
	Identity string
}

// ExportInfo is one line of a client's list of exports.
type ExportInfo struct {
	Name        string
	Description string
}

// Exports says what there is to attach, and to whom. Both methods are called before a client may do anything with an
// export, so they decide who may see it.
type Exports interface {
	// Open attaches the export called name. The release function is called once, when the connection is over and
	// nothing more will be asked of the Device.
	Open(ctx context.Context, name string, peer Peer) (Device, func(), error)
	// List returns what peer may see.
	List(ctx context.Context, peer Peer) ([]ExportInfo, error)
}

// Errors of Exports that become a status of their own. Any other is logged and told to the client as an unknown export.
var (
	// ErrUnknownExport: there is no export of that name, or this peer is not to know that there is one.
	ErrUnknownExport = errors.New("unknown export")
	// ErrNotAllowed: the export exists and this peer may not have it.
	ErrNotAllowed = errors.New("export not allowed")
	// ErrTLSRequired: the export is served over TLS only.
	ErrTLSRequired = errors.New("export requires TLS")
)

// errnoOf maps the error of a request to the number in its reply. It is the only place that does.
func errnoOf(err error, cmd uint16) uint32 {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, blockio.ErrNoSpace):
		return errnoNoSpace
	case errors.Is(err, blockio.ErrBeyondEnd):
		return beyondEnd(cmd)
	case errors.Is(err, blockio.ErrReadOnly):
		return errnoPerm
	case errors.Is(err, blockio.ErrClosed):
		return errnoShutdown
	}
	return errnoIO
}

// beyondEnd is the answer to a range that ends beyond the export: a full disk to who adds data, else a mistake.
func beyondEnd(cmd uint16) uint32 {
	if cmd == cmdWrite || cmd == cmdWriteZeroes {
		return errnoNoSpace
	}
	return errnoInval
}
