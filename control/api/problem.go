package api

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"strconv"

	"github.com/labstack/echo/v4"

	v1 "varve/control/api/customer"
	"varve/control/auth"
	"varve/control/raft"
	"varve/control/state"
)

// meanings is the one place where errors become statuses. The first match counts.
var meanings = []struct {
	err    error
	status int
	code   string
	title  string
}{
	{state.ErrNotFound, http.StatusNotFound, "not_found", "Not found"},
	{state.ErrExist, http.StatusConflict, "exists", "Exists already"},
	{state.ErrNotEmpty, http.StatusConflict, "not_empty", "Not empty"},
	{state.ErrConflict, http.StatusConflict, "conflict", "Conflict"},
	{state.ErrNoSpace, http.StatusInsufficientStorage, "no_space", "No space left"},
	{state.ErrInvalid, http.StatusBadRequest, "invalid", "Invalid"},
	{state.ErrNameTooLong, http.StatusBadRequest, "invalid", "Name too long"},
	{state.ErrIsDir, http.StatusBadRequest, "invalid", "Is a directory"},
	{state.ErrNotDir, http.StatusBadRequest, "invalid", "Not a directory"},
	{state.ErrXDev, http.StatusBadRequest, "invalid", "On another vPool"},
	{state.ErrLoop, http.StatusBadRequest, "invalid", "Moved into itself"},
	{auth.ErrUnauthenticated, http.StatusUnauthorized, "unauthenticated", "Not signed in"},
	{auth.ErrCodeNeeded, http.StatusUnauthorized, "code_needed", "A second factor is needed"},
	{auth.ErrNoOIDC, http.StatusNotFound, "not_found", "Not found"},
	{auth.ErrForbidden, http.StatusForbidden, "forbidden", "Not allowed"},
	{raft.ErrUnavailable, http.StatusServiceUnavailable, "unavailable", "Unavailable"},
	{context.Canceled, http.StatusServiceUnavailable, "unavailable", "Cancelled"},
	{context.DeadlineExceeded, http.StatusServiceUnavailable, "unavailable", "Timed out"},
}

// problem says what an error means to a client.
func problem(err error) *v1.Problem {
	if p, ok := errors.AsType[*v1.Problem](err); ok {
		made := *p
		return &made
	}
	if he, ok := errors.AsType[*echo.HTTPError](err); ok {
		return fromHTTP(he)
	}
	p := &v1.Problem{Status: http.StatusInternalServerError, Code: "internal", Title: "Failed", Detail: err.Error(),
		Remedy: "see the appliance's log for this request id"}
	for _, m := range meanings {
		if errors.Is(err, m.err) {
			p.Status, p.Code, p.Title, p.Remedy = m.status, m.code, m.title, ""
			break
		}
	}
	if e, ok := errors.AsType[*state.Error](err); ok {
		p.Object, p.By, p.Remedy, p.Rev = e.Object, e.By, e.Remedy, e.Rev
		switch {
		case e.Field != "":
			p.Errors = []v1.FieldError{{Pointer: "/" + e.Field, Message: cmp.Or(e.Detail, p.Title)}}
		case p.Code == "exists":
			p.Errors = []v1.FieldError{{Pointer: "/name", Message: e.Object + " exists already"}}
		}
	}
	if p.Code == "conflict" && p.Rev != 0 {
		p.Status, p.Code, p.Title = http.StatusPreconditionFailed, "stale", "Changed meanwhile"
	}
	if w, ok := errors.AsType[*auth.WaitError](err); ok {
		p.Status, p.Code, p.Title = http.StatusTooManyRequests, "rate_limited", "Too many failures"
		p.Remedy = "wait " + strconv.Itoa(int(math.Ceil(w.Wait.Seconds()))) + " seconds"
	}
	if p.Code == "unauthenticated" {
		p.Detail, p.Remedy = "name, password, code, secret or token is wrong, or has ended", "try again, or ask an administrator"
	}
	if p.Code == "code_needed" {
		p.Remedy = "send the code that the authenticator app shows"
	}
	if p.Code == "unavailable" && p.Remedy == "" {
		p.Remedy = "look whether the change was made, then try again"
	}
	return p
}

// fromHTTP is a refusal of echo's own: no such route or method.
func fromHTTP(he *echo.HTTPError) *v1.Problem {
	p := &v1.Problem{Status: he.Code, Code: "invalid", Title: http.StatusText(he.Code), Detail: http.StatusText(he.Code)}
	switch he.Code {
	case http.StatusNotFound:
		p.Code, p.Detail = "not_found", "no such path"
	case http.StatusBadRequest:
		if text, ok := he.Message.(string); ok { // a parameter that the generated code could not read
			p.Detail, p.Remedy = clip(text), "see /api/docs"
		}
	case http.StatusMethodNotAllowed:
		p.Code, p.Detail = "method", "this path does not take that method"
	}
	if he.Code >= http.StatusInternalServerError {
		p.Code = "internal"
	}
	return p
}

func refuse(status int, code, detail, remedy string) *v1.Problem {
	return &v1.Problem{Status: status, Code: code, Title: http.StatusText(status), Detail: detail, Remedy: remedy}
}

// fail answers a request with its error. It is echo's error handler.
func (s *Server) fail(err error, c echo.Context) {
	if c.Response().Committed {
		s.cfg.Log.Warn("api answer broke off", "request", requestID(c), "err", err)
		return
	}
	if e, ok := errors.AsType[*effect](err); ok {
		body, err := json.Marshal(e.Effect)
		if err == nil {
			err = c.Blob(http.StatusOK, "application/effect+json", body)
		}
		if err != nil {
			s.cfg.Log.Debug("api client went away", "request", requestID(c), "err", err)
		}
		return
	}
	p := problem(err)
	p.Type, p.RequestID = "urn:varve:problem:"+p.Code, requestID(c)
	if p.Code == "internal" {
		s.cfg.Log.Error("api request failed", "request", p.RequestID, "method", c.Request().Method,
			"path", c.Request().URL.Path, "err", err)
	}
	if p.Status == http.StatusUnauthorized {
		c.Response().Header().Set("WWW-Authenticate", "Bearer")
	}
	if w, ok := errors.AsType[*auth.WaitError](err); ok {
		c.Response().Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(w.Wait.Seconds()))))
	}
	body, merr := json.Marshal(p)
	if merr == nil {
		merr = c.Blob(p.Status, "application/problem+json", body)
	}
	if merr != nil {
		s.cfg.Log.Debug("api client went away", "request", p.RequestID, "err", merr)
	}
}
