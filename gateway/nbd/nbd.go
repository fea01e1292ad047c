// Package nbd serves volumes as NBD exports: fixed newstyle negotiation with TLS, then a pipelined transmission phase
// with structured replies and block status. It holds no storage and no policy: Exports says what there is and to whom,
// a Device does the I/O. The protocol is doc/proto.md of github.com/NetworkBlockDevice/nbd; section names below are its.
//
// # A connection
//
// One goroutine reads, one writer goroutine stands by. The reader takes all requests that have arrived (a burst), submits
// each without blocking, and then sends what became of them with one write:
//
//	for {
//		for each complete request in the input buffer {
//			READ:                TryRead into the buffer of this burst's replies
//			WRITE, TRIM, ZEROES, FLUSH:  take a slot; TryWrite, TryZero, TryFlush with the slot as tag
//			ErrBusy:             a worker goroutine calls the blocking twin
//		}
//		Kick()                       // Done is called for most of it before this returns
//		send: one write that does not block; the writer takes what the socket did not
//		read the socket, or wait for it
//	}
//
// Replies carry the request's cookie and need no order. Done, workers and the reader all queue them in the outbox;
// whoever queued one sends, unless another is sending (it will look again) or the reader is in a burst (it sends at the end).
// So sixteen requests in one segment cost one read, one commit and one write, and a request served from memory costs
// neither a goroutine nor an allocation. A connection that is hardly ever at rest waits in the read itself and not in the
// runtime's poller, which halves what waiting costs: package seat.
//
// Lock order: conn.mu is the only lock of a connection and is never held while a Device is called, because a
// Device may call Done while it holds locks of its own.
//
// # What stops whom
//
// A client that sends too much waits: the reader stops at InFlight requests, at queuedMax unsent reply bytes, and when
// payload memory is used up. It stops nobody else, since no other goroutine ever waits for its socket: the
// committer's Done and Settle only try. Memory, worst case:
//
//	handshake     < 64 KiB each, 256 of them
//	idle          the connection itself: its input buffer goes back to the pool while nothing is there to read
//	busy          input 256 KiB, replies not yet taken by the client up to three buffers of 256 KiB
//	payloads      of long requests and of those that wait: PayloadBytes for the node; at most outstandingMax of one
//	              connection (or one request); whoever holds some and stands still while others wait is cut off
//
// # What an error means
//
// A reply with an error is definite: nothing was applied. When the outcome is unknown (blockio.ErrFenced) the
// connection is closed and nothing in flight is answered. An I/O error ends just the request that met it.
//
// # TLS
//
// STARTTLS with x509 only. It forgets what was negotiated before it, and plaintext sent ahead of our answer to it ends
// the connection (CVE-2021-3716). Exports are opened by INFO, GO, EXPORT_NAME and the metadata context options, never
// before, and each names its export anew: nothing of an INFO is carried to a GO.
package nbd
