package nfs

import (
	"context"
	"errors"

	"varve/volumedriver/blockio"
)

// Status is nfsstat3.
type Status uint32

// RFC 1813 section 2.6.
const (
	StatusOK          Status = 0
	StatusPerm        Status = 1
	StatusNoEnt       Status = 2
	StatusIO          Status = 5
	StatusAcces       Status = 13
	StatusExist       Status = 17
	StatusXDev        Status = 18
	StatusNotDir      Status = 20
	StatusIsDir       Status = 21
	StatusInval       Status = 22
	StatusFBig        Status = 27
	StatusNoSpc       Status = 28
	StatusROFS        Status = 30
	StatusMLink       Status = 31
	StatusNameTooLong Status = 63
	StatusNotEmpty    Status = 66
	StatusDQuot       Status = 69
	StatusStale       Status = 70
	StatusBadHandle   Status = 10001
	StatusNotSync     Status = 10002
	StatusNotSupp     Status = 10004
	StatusTooSmall    Status = 10005
	StatusServerFault Status = 10006
	StatusBadType     Status = 10007
)

var statusOf = []struct {
	err    error
	status Status
}{
	{ErrNotFound, StatusNoEnt},
	{ErrStale, StatusStale},
	{ErrExist, StatusExist},
	{ErrNotDir, StatusNotDir},
	{ErrIsDir, StatusIsDir},
	{ErrNotEmpty, StatusNotEmpty},
	{ErrInvalid, StatusInval},
	{ErrPermission, StatusPerm},
	{ErrReadOnly, StatusROFS},
	{ErrNotSupported, StatusNotSupp},
	{ErrNotSync, StatusNotSync},
	{ErrTooBig, StatusFBig},
	{ErrQuota, StatusDQuot},
	{ErrLinks, StatusMLink},
	{blockio.ErrNoSpace, StatusNoSpc},
	{blockio.ErrReadOnly, StatusROFS},
	{blockio.ErrBeyondEnd, StatusFBig},
	{blockio.ErrClosed, StatusStale},
}

// toStatus is the one place where errors become a status.
func toStatus(err error) Status {
	if err == nil {
		return StatusOK
	}
	for _, s := range statusOf {
		if errors.Is(err, s.err) {
			return s.status
		}
	}
	return StatusIO
}

// unknownOutcome tells errors after which nobody knows whether the request was or will be applied, so that no answer is
// right and the connection must be closed.
func unknownOutcome(err error) bool {
	return err != nil && (errors.Is(err, blockio.ErrFenced) || errors.Is(err, context.Canceled) ||
		errors.Is(err, context.DeadlineExceeded))
}
