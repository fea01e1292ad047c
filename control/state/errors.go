package state

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// What a caller acts upon; test with errors.Is.
var (
	ErrNotFound    = errors.New("not found")
	ErrExist       = errors.New("exists already")
	ErrNotEmpty    = errors.New("not empty")
	ErrIsDir       = errors.New("is a directory")
	ErrNotDir      = errors.New("not a directory")
	ErrConflict    = errors.New("conflict")
	ErrInvalid     = errors.New("invalid")
	ErrNameTooLong = errors.New("name too long")
	ErrXDev        = errors.New("on another vPool")
	ErrLoop        = errors.New("directory moved into itself")
	ErrNoSpace     = errors.New("limit reached")
	ErrForgotten   = errors.New("too late to repeat") // whether an earlier proposal was applied is not known any more
)

var errForgotten = &Error{Err: ErrForgotten, Object: "command", Remedy: "look whether it was done, then repeat it"}

// Error is a refusal: Err is one of the sentinels, Object what it is about, By what stands in the way.
type Error struct {
	Err    error
	Object string
	Detail string
	Remedy string
	// Field is the part of the object that is refused, by its name in the APIs; "" where it is none alone.
	Field string
	By    []string
	// Rev is the object's present rev where a stale one was given.
	Rev uint64
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Object)
	b.WriteString(": ")
	b.WriteString(e.Err.Error())
	if e.Detail != "" {
		b.WriteString(", " + e.Detail)
	}
	if len(e.By) > 0 {
		b.WriteString(": " + strings.Join(e.By, ", "))
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

func invalid(object, detail string) error {
	return &Error{Err: ErrInvalid, Object: object, Detail: detail}
}

func missing(object string) error { return &Error{Err: ErrNotFound, Object: object} }

func stale(object string, rev uint64) error {
	return &Error{Err: ErrConflict, Object: object, Detail: "changed meanwhile", Rev: rev,
		Remedy: "read it again and repeat the change"}
}

func quote(s string) string { return strconv.QuoteToGraphic(s) }

func inodeObject(fsid, ino uint64) string { return fmt.Sprintf("inode %d of fsid %016x", ino, fsid) }
