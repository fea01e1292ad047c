// Package blockio holds the words that a gateway and the volume driver share: how the end of a request is told, what
// stands behind a range of bytes, and the errors that a gateway turns into its protocol's status.
//
// # Requests without a goroutine each
//
// A gateway connection has one reader goroutine. It decodes every request that has already arrived and submits each to
// its volume with one of the Try methods, then calls Kick once and goes back to the socket:
//
//	for {
//		decode request
//		err := volume.TryWrite(payload, off, fua, conn, tag)    // or TryRead, TryFlush, TryTrim, TryZero
//		if errors.Is(err, blockio.ErrBusy) { hand it to a bounded pool, which calls WriteAt, ReadAt, Flush … }
//		if nothing more is buffered {
//			volume.Kick()      // commits what was submitted; often calls conn.Done for all of it before it returns
//			send the replies queued so far
//		}
//	}
//
// The volume driver calls Done once for each accepted request, from whichever goroutine committed or synced it, and then Settle
// once for each Completer that it told something. So a burst of sixteen writes costs one read, one log write and one reply.
package blockio

import "errors"

// BlockSize is the volume driver's unit in bytes: maps, logs and objects speak of blocks, gateways of bytes.
const BlockSize = 4096

// Flags ask for more than a plain request.
type Flags uint8

const (
	// FUA: the request ends only when it is durable.
	FUA Flags = 1 << iota
	// Extend: a write beyond the end makes the volume larger instead of failing with ErrBeyondEnd (NFS).
	Extend
)

// Completer is told the end of submitted requests. Both methods may be called from any goroutine, also from inside the
// Try method or Kick of the one that submitted; they must not block on the network and must not call the volume driver, of which Settle may only ask a volume's attributes.
// The dynamic type must be comparable, such as a pointer.
type Completer interface {
	// Done ends the request that was submitted with tag. err is nil when the request is as durable as it asked to be.
	Done(tag uint64, err error)
	// Settle follows a run of Done calls: whatever they queued should now be sent. alone: nobody else was told anything, so that it
	// keeps nobody waiting if it takes the time to do that on this goroutine.
	Settle(alone bool)
}

// Extent is a run of bytes of a volume with one allocation state.
type Extent struct {
	Length int64
	// Hole says that no storage stands behind the run; it reads as zeros.
	Hole bool
	// Zero says that the run reads as zeros.
	Zero bool
}

// Errors that gateways map to protocol status. Anything else is an I/O error (EIO, NFS3ERR_IO) of just that request.
var (
	// ErrBusy: the request would have to wait (device, backend, full log). Nothing was done; call the blocking method.
	ErrBusy = errors.New("request would block")
	// ErrNoSpace: no room, after the drain deadline. Nothing was applied.
	ErrNoSpace = errors.New("no space left")
	// ErrBeyondEnd: the range ends beyond the volume.
	ErrBeyondEnd = errors.New("beyond the end of the volume")
	// ErrReadOnly: the volume refuses writes.
	ErrReadOnly = errors.New("volume is read-only")
	// ErrFenced: this node may no longer serve the volume (failed sync, lost ownership). A gateway closes the
	// connection without answering what is in flight, since the outcome is unknown.
	ErrFenced = errors.New("volume is fenced")
	// ErrClosed: the volume is closed or deleted.
	ErrClosed = errors.New("volume is closed")
	// ErrCorrupt: no intact copy of a block was found.
	ErrCorrupt = errors.New("block is corrupt")
)
