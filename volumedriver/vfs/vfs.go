// Package vfs is the seam between the volume driver and the file system: all its file I/O goes through FS, so that a
// test can cut the power after any call, fail any call, or let a sync lie.
//
// OS is the real one. Mem is kept in memory and can be cloned as a power cut would leave it. Errors wraps either and
// fails chosen calls. What survives a cut, and so what callers must do: written bytes survive only after Sync or Datasync
// of that file; a created, renamed, linked or removed name only after SyncDir of its directory.
package vfs

import (
	"errors"
	"io"
	"io/fs"
)

// ErrWouldBlock is returned by TryReadAt when the bytes are not in memory.
var ErrWouldBlock = errors.New("read would wait for the device")

// FS is a file system. Paths are slash-separated and cleaned by the caller. Errors satisfy errors.Is with
// fs.ErrNotExist, fs.ErrExist, and with syscall.ENOSPC, EIO, EROFS where the system reports those.
type FS interface {
	// OpenFile opens a file, or makes one (flags of package os: O_CREATE, O_EXCL, O_TRUNC, O_RDONLY, O_RDWR).
	OpenFile(path string, flag int, perm fs.FileMode) (File, error)
	MkdirAll(path string, perm fs.FileMode) error
	Remove(path string) error
	// RemoveAll removes path and all below it; nil if there is nothing.
	RemoveAll(path string) error
	// Rename replaces the target atomically.
	Rename(from, to string) error
	// Link gives from a second name; fs.ErrExist if to exists.
	Link(from, to string) error
	// ReadDir lists names in lexical order.
	ReadDir(path string) ([]string, error)
	Stat(path string) (fs.FileInfo, error)
	// SyncDir makes the directory's names durable.
	SyncDir(path string) error
	// Lock takes an advisory exclusive lock that ends with the process; an error if another process holds it.
	Lock(path string) (io.Closer, error)
	// Space gives the bytes of the file system that holds path, and those still available.
	Space(path string) (total, available uint64, err error)
}

// File is an open file. Methods may be called concurrently.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// TryReadAt reads all of p if that needs no device access, else ErrWouldBlock.
	TryReadAt(p []byte, off int64) error
	// WritevAt writes the buffers one after the other at off, as one pwritev where the system has it.
	WritevAt(bufs [][]byte, off int64) (int, error)
	// Sync makes bytes and metadata durable. A failed Sync or Datasync must never be retried on the same file.
	Sync() error
	// Datasync makes bytes, and the metadata needed to read them back, durable.
	Datasync() error
	Truncate(size int64) error
	// Preallocate reserves disk space for [0,size) without changing what is read.
	Preallocate(size int64) error
	Size() (int64, error)
}

// CacheDropper is a File that can give back the memory in which the system keeps its bytes. It is a hint: bytes that are
// durable only have to be read from the device again.
type CacheDropper interface{ DropCache() }

// WriteStarter is a File that can let the device begin with bytes that were written, without waiting for it and without making
// them durable: a hint that makes the Datasync that follows shorter. An error of the device is still that Datasync's.
type WriteStarter interface{ StartWrite(off, n int64) }

// DirectWriter is a File that can write past the memory in which the system keeps files' bytes: for bytes that are written in
// bulk and not read again soon. WriteDirect does what WritevAt does; the bytes are durable after a sync, not before.
type DirectWriter interface {
	WriteDirect(bufs [][]byte, off int64) (int, error)
}
