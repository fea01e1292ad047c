package s3

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"time"

	"github.com/minio/minio-go/v7"

	"varve/volumedriver/backend"
)

// kind says what can be made of a failed attempt.
type kind uint8

const (
	transient   kind = iota // the outcome is unknown, or nothing happened; try again
	slow                    // the store asks for patience
	conflict                // another write of that name is under way
	exists                  // the condition of a Put does not hold
	absent                  // no such object
	full                    // no space, no quota
	refusal                 // the same request would be refused again
	closedStore             // this Store was closed
)

// Error is why the store did not do what it was asked for.
type Error struct {
	Code   string // of S3, "" if it did not come to an answer
	Status int    // of HTTP, 0 likewise
	Detail string
	remedy string
	kind   kind
	err    error
}

// Error ends with the remedy if the same request would be refused again: it is what the vPool's state tells.
func (e *Error) Error() string {
	text := e.text()
	if e.Definite() && e.remedy != "" {
		text += "; " + e.remedy
	}
	return text
}

func (e *Error) text() string {
	switch {
	case e.Code == "" && e.err != nil && e.Detail == "":
		return e.err.Error()
	case e.Code == "":
		return e.Detail
	case e.Status != 0:
		return fmt.Sprintf("%s (%d): %s", e.Code, e.Status, e.Detail)
	}
	return e.Code + ": " + e.Detail
}

// Remedy says what the operator can do, "" if nothing is known.
func (e *Error) Remedy() string { return e.remedy }

// Definite says that the same request would be refused again.
func (e *Error) Definite() bool { return e.kind == refusal || e.kind == full }

// Unwrap gives what package backend calls it, and what happened below.
func (e *Error) Unwrap() []error {
	var errs []error
	switch e.kind {
	case absent:
		errs = append(errs, backend.ErrNotExist)
	case exists:
		errs = append(errs, backend.ErrExist)
	case full:
		errs = append(errs, backend.ErrNoSpace)
	case closedStore:
		errs = append(errs, fs.ErrClosed)
	}
	if e.err != nil {
		errs = append(errs, e.err)
	}
	return errs
}

func refused(detail, remedy string) *Error {
	return &Error{Detail: detail, remedy: remedy, kind: refusal}
}

// redirectError: the store wants us elsewhere.
type redirectError struct {
	status     int
	to, region string
}

func (e *redirectError) Error() string {
	return fmt.Sprintf("redirected (%d) to %s, region %s, which is not followed", e.status, e.to, e.region)
}

// kindOf gives the kind of an error of this package; others are transient.
func kindOf(err error) kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.kind
	}
	return transient
}

const (
	keysRemedy   = "give the right keys: VARVE_S3_ACCESS_KEY and VARVE_S3_SECRET_KEY, or --credentials-file; vpool set-credentials changes them later"
	rightsRemedy = "allow this user s3:GetObject, s3:PutObject, s3:DeleteObject on the prefix and s3:ListBucket on the bucket"
	bucketRemedy = "make the bucket, or correct its name in the backend's URL"
	placeRemedy  = "correct endpoint= and region= in the backend's URL"
	trustRemedy  = "give the authority that signed the store's certificate: --ca-file FILE"
	clockRemedy  = "set the clock of this node or of the store: run NTP on both"
	spaceRemedy  = "raise the quota or add space to the store"
)

// classify makes an *Error of what minio-go or the transport returned. ctx is the call's: its end is no error of the store.
func classify(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		if cause := context.Cause(ctx); errors.Is(cause, fs.ErrClosed) {
			return &Error{kind: closedStore, Detail: "S3 backend is closed"}
		}
		return ctx.Err()
	}
	if _, ok := errors.AsType[*Error](err); ok {
		return err
	}
	if r, ok := errors.AsType[*redirectError](err); ok {
		return &Error{Detail: r.Error(), remedy: placeRemedy, kind: refusal, err: err}
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return &Error{Detail: err.Error(), remedy: trustRemedy, kind: refusal, err: err}
	}
	if d, ok := errors.AsType[*net.DNSError](err); ok {
		return &Error{Detail: d.Error(), remedy: "check the endpoint's name and this node's DNS servers", err: err}
	}
	a, ok := errors.AsType[minio.ErrorResponse](err)
	if !ok {
		return &Error{Detail: err.Error(), remedy: "check that the endpoint is up and reachable from this node", err: err}
	}
	e := &Error{Code: a.Code, Status: a.StatusCode, Detail: a.Error(), err: err}
	e.kind, e.remedy = meaning(a)
	return e
}

// meaning reads S3's codes. What is not known goes by its status.
func meaning(a minio.ErrorResponse) (kind, string) {
	switch a.Code {
	case "NoSuchKey", "NoSuchVersion":
		return absent, ""
	case "PreconditionFailed":
		return exists, ""
	case "ConditionalRequestConflict", "OperationAborted":
		return conflict, ""
	case "SlowDown", "SlowDownRead", "SlowDownWrite", "ServiceUnavailable", "TooManyRequests", "RequestLimitExceeded", "ThrottlingException", "Throttling":
		return slow, ""
	case "NoSuchBucket":
		return refusal, bucketRemedy
	case "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "InvalidSecurity", "NotSignedUp", "Unauthorized",
		"XAdminUserNotFound":
		return refusal, keysRemedy
	case "AccessDenied", "AllAccessDisabled", "AccountProblem", "XMinioAdminUserNotAllowed":
		return refusal, rightsRemedy
	case "RequestTimeTooSkewed", "RequestExpired":
		return refusal, clockRemedy
	case "AuthorizationHeaderMalformed", "InvalidRegion", "PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException":
		remedy := placeRemedy
		if a.Region != "" {
			remedy += ": the bucket is in region " + a.Region
		}
		return refusal, remedy
	case "QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "StorageFull":
		return full, spaceRemedy
	case "BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody", "RequestTimeout":
		return transient, "" // the network, or a proxy on it, changed or lost the body
	}
	switch {
	case a.StatusCode == http.StatusNotFound:
		return refusal, placeRemedy // only NoSuchKey says that an object is not there
	case a.StatusCode == http.StatusPreconditionFailed:
		return exists, ""
	case a.StatusCode == http.StatusConflict:
		return conflict, ""
	case a.StatusCode == http.StatusTooManyRequests || a.StatusCode == http.StatusServiceUnavailable:
		return slow, ""
	case a.StatusCode == http.StatusInsufficientStorage:
		return full, spaceRemedy
	case a.StatusCode == http.StatusUnauthorized || a.StatusCode == http.StatusForbidden:
		return refusal, keysRemedy
	case a.StatusCode == http.StatusRequestTimeout || a.StatusCode >= 500 || a.StatusCode == 0:
		return transient, ""
	}
	return refusal, "look up the store's error code, and whether it speaks S3 with path-style addresses"
}

// addSkew says in a refusal for the clock how far the clocks are apart. date is the store's at now.
func (e *Error) addSkew(date *string, now time.Time) {
	if date == nil || e.Code != "RequestTimeTooSkewed" && e.Code != "RequestExpired" {
		return
	}
	at, err := http.ParseTime(*date)
	if err != nil {
		return
	}
	apart, side := now.Sub(at).Round(time.Second), "ahead of"
	if apart < 0 {
		apart, side = -apart, "behind"
	}
	e.Detail += fmt.Sprintf("; this node's clock is %s %s the store's", apart, side)
}
