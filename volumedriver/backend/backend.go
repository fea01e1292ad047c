// Package backend says what a store of immutable objects must do for the volume driver; packages below it do it.
//
// An object is created once, whole, and never changed: Put of a name that exists is refused, so that nobody, not even a
// fenced owner that wakes up late, can change what another reader relies on. After Put returned nil the object is durable.
// When Put fails with anything but ErrExist, the outcome is unknown: the object may exist now, later, or never, but never
// in part. backendtest holds the conformance suite that every backend passes.
package backend

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

var (
	// ErrExist: an object of that name is there already; Put changed nothing.
	ErrExist = errors.New("object exists")
	// ErrNotExist: there is no object of that name.
	ErrNotExist = errors.New("object does not exist")
	// ErrNoSpace: the store is full; the object was not created.
	ErrNoSpace = errors.New("backend is full")
)

// nameBytesMax is the longest name of an object.
const nameBytesMax = 200

// CheckName says what is wrong with an object's name. Every backend refuses such a name before it does anything else.
func CheckName(name string) error {
	if len(name) > nameBytesMax {
		return fmt.Errorf("object name %.20q… has %d bytes, more than %d", name, len(name), nameBytesMax)
	}
	for i := range len(name) {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '.', c == '_', c == '/', c == '-':
		default:
			return fmt.Errorf("object name %q has a byte other than a-z 0-9 . _ / -", name)
		}
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." || part == ".." {
			return fmt.Errorf("object name %q has an empty, . or .. part", name)
		}
	}
	return nil
}

// Info describes a stored object.
type Info struct {
	Name string
	Size int64
}

// Backend is a store of immutable objects. Names are slash-separated, [a-z0-9._/-], at most 200 bytes, without empty, "."
// or ".." parts; others are refused. No object's name is another's followed by a slash. All methods may be called concurrently.
// A method whose context has ended before it did anything returns the context's error.
type Backend interface {
	// Put creates the object from the concatenation of parts, durably.
	Put(ctx context.Context, name string, parts ...[]byte) error
	// Open gives access to an object's bytes. The caller closes it. ErrNotExist.
	Open(ctx context.Context, name string) (Object, error)
	// Stat: ErrNotExist.
	Stat(ctx context.Context, name string) (Info, error)
	// Delete removes the object; nil if there was none.
	Delete(ctx context.Context, name string) error
	// List returns up to max objects whose name starts with prefix, and is greater than after, in lexical order.
	List(ctx context.Context, prefix, after string, max int) ([]Info, error)
	// Space gives total and available bytes, 0, 0 if the store has no limit it knows of.
	Space(ctx context.Context) (total, available uint64, err error)
	Close() error
}

// Object reads one immutable object. Methods may be called concurrently.
type Object interface {
	// ReadAt fills p from off, or fails.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// TryReadAt fills p if that needs no wait for a device or a network, else vfs.ErrWouldBlock.
	TryReadAt(p []byte, off int64) error
	Size() int64
	Close() error
}
