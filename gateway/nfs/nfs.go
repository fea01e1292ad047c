// Package nfs serves NFS version 3 and MOUNT version 3 (RFC 1813) over TCP, both on one port, to hypervisors that keep
// disk files on a vPool. It holds no storage and no policy: names, inodes and the bytes of files are a Namespace's.
//
// # A burst
//
// One reader goroutine per connection takes all calls that have arrived, and only then looks at what they came to:
//
//	for {
//		read what the socket has
//		for each whole record {
//			run its procedure:
//			    answered         the reply is appended to this burst's replies  (GETATTR, LOOKUP, cached READ, …)
//			    submitted        TryWrite or TryFlush took it; Done will tell    (WRITE, COMMIT)
//			    would have to wait: a goroutine of its own runs it and replies   (READ from a device, CREATE, …)
//		}
//		Kick each file submitted to       // often all of them are Done in here
//		append the replies of what is Done, and send everything with one write that does not wait
//	}
//
// So sixteen writes cost one read, one log write and one reply. Calls that wait hold up nobody: replies go out in the order
// of their ends. What completes while the reader waits for the client is answered by who completed it (Settle), or, where that
// would keep others waiting, by the connection's sender goroutine, which also writes what the socket did not take; a client that
// does not read its replies is no longer read from.
//
// A connection that is hardly ever at rest waits in the read itself and not in the runtime's poller (package seat), and one whose
// calls only wait for syncs has its reader sync (kick): then one thread does all between the client's call and the disk.
//
// # What is promised
//
//   - WRITE FILE_SYNC or DATA_SYNC is answered FILE_SYNC once the file said that it is durable; UNSTABLE is answered
//     UNSTABLE with the verifier read before the data was handed over; COMMIT is a flush. No error is answered for a write
//     that may still be applied: then the connection is closed without a word, and clients send it again.
//   - Attributes come from Namespace.Attr alone, for every reply. wcc_data holds attributes from before a change only
//     when no other change through this server ran meanwhile (wcc.go).
//   - Handles are the same on every node and over restarts (handle.go). On every call the handle is verified, the client's
//     address is looked up in the export's allow list, and the user is squashed and checked against mode, owner and group.
//     AUTH_SYS users are the client's claim: the allow list is the protection, no more.
//   - A retransmitted call that must not run twice is answered by its first reply (replay.go).
//
// # Who answers
//
// MKDIR, SYMLINK, MKNOD and READLINK run in willscott/go-nfs (forward.go). Everything else is answered here, also REMOVE,
// RMDIR and RENAME: go-nfs has one handler for the first two, turns NOTEMPTY into IO, and gives attributes in a form that
// makes Linux take every entry for another file system, so that what would be left of its work is a call into the
// Namespace. Memory is bounded before a client is known to be allowed: 16 KiB for a record, 30 s to speak.
package nfs
