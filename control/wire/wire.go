// Package wire is how control's own processes and nodes call each other: HTTP with JSON answers, over connections whose other
// end is known (mutual TLS between nodes, a unix socket inside one). Refusals of the state arrive as what they were.
//
//	200 the answer · 409 {refusal} · 421 {leader}: not the leader · 503 {detail}: unavailable, the outcome may be unknown
package wire

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/google/uuid"

	"varve/control/raft"
	"varve/control/state"
)

// codes are the sentinels of state on the wire.
var codes = map[string]error{
	"not_found": state.ErrNotFound, "exists": state.ErrExist, "not_empty": state.ErrNotEmpty, "is_dir": state.ErrIsDir,
	"not_dir": state.ErrNotDir, "conflict": state.ErrConflict, "invalid": state.ErrInvalid, "name_too_long": state.ErrNameTooLong,
	"other_vpool": state.ErrXDev, "loop": state.ErrLoop, "no_space": state.ErrNoSpace, "forgotten": state.ErrForgotten,
}

// Refusal is a *state.Error.
type Refusal struct {
	Code   string   `json:"code"`
	Object string   `json:"object,omitempty"`
	Detail string   `json:"detail,omitempty"`
	Remedy string   `json:"remedy,omitempty"`
	Field  string   `json:"field,omitempty"`
	By     []string `json:"by,omitempty"`
	Rev    uint64   `json:"rev,omitempty"`
}

func packRefusal(err error) *Refusal {
	if err == nil {
		return nil
	}
	e, ok := errors.AsType[*state.Error](err)
	if !ok {
		return &Refusal{Code: "invalid", Object: "command", Detail: err.Error()}
	}
	r := &Refusal{Code: "invalid", Object: e.Object, Detail: e.Detail, Remedy: e.Remedy, Field: e.Field, By: e.By, Rev: e.Rev}
	for code, sentinel := range codes {
		if errors.Is(e.Err, sentinel) {
			r.Code = code
		}
	}
	return r
}

func (r *Refusal) unpack() error {
	if r == nil {
		return nil
	}
	sentinel := codes[r.Code]
	if sentinel == nil {
		sentinel = state.ErrInvalid
	}
	return &state.Error{Err: sentinel, Object: r.Object, Detail: r.Detail, Remedy: r.Remedy, Field: r.Field, By: r.By, Rev: r.Rev}
}

// Outcome is a raft.Outcome.
type Outcome struct {
	Index   uint64       `json:"index"`
	Term    uint64       `json:"term,omitempty"`
	Result  state.Result `json:"result"`
	Refusal *Refusal     `json:"refusal,omitempty"`
}

// Pack makes an outcome ready for the wire.
func Pack(o raft.Outcome) Outcome {
	return Outcome{Index: o.Index, Term: o.Term, Result: o.Result, Refusal: packRefusal(o.Refusal)}
}

// Unpack is Pack's reverse.
func (o Outcome) Unpack() raft.Outcome {
	return raft.Outcome{Index: o.Index, Term: o.Term, Result: o.Result, Refusal: o.Refusal.unpack()}
}

type problem struct {
	Leader  uuid.UUID `json:"leader,omitzero"`
	Refusal *Refusal  `json:"refusal,omitempty"`
	Detail  string    `json:"detail,omitempty"`
}

// Serve reads a body of at most limit bytes, calls f and writes its answer, or its error.
func Serve(w http.ResponseWriter, r *http.Request, limit int64, f func(ctx context.Context, body []byte) (any, error)) {
	body, err := io.ReadAll(io.LimitReader(r.Body, limit+1))
	if err == nil && int64(len(body)) > limit {
		err = &state.Error{Err: state.ErrInvalid, Object: "call", Detail: fmt.Sprintf("more than %d bytes", limit)}
	}
	var answer any
	if err == nil {
		answer, err = f(r.Context(), body)
	}
	status := http.StatusOK
	if err != nil {
		var p problem
		notLeader, leader := errors.AsType[*raft.NotLeaderError](err)
		_, refused := errors.AsType[*state.Error](err)
		switch {
		case leader:
			status, p.Leader = http.StatusMisdirectedRequest, notLeader.Leader
		case refused:
			status, p.Refusal = http.StatusConflict, packRefusal(err)
		default:
			status, p.Detail = http.StatusServiceUnavailable, err.Error()
		}
		answer = p
	}
	b, err := json.Marshal(answer)
	if err != nil {
		http.Error(w, "encode answer", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(b) // the other end sees a short answer if this fails
}

// Read reads what Serve wrote, of at most limit bytes.
func Read(res *http.Response, limit int64, answer any) error {
	b, err := io.ReadAll(io.LimitReader(res.Body, limit+1))
	if err != nil {
		return fmt.Errorf("%w: read answer: %w", raft.ErrUnavailable, err)
	}
	if int64(len(b)) > limit {
		return fmt.Errorf("%w: answer of more than %d bytes", raft.ErrUnavailable, limit)
	}
	if res.StatusCode == http.StatusOK {
		if answer == nil {
			return nil
		}
		if err := json.Unmarshal(b, answer); err != nil {
			return fmt.Errorf("%w: decode answer: %w", raft.ErrUnavailable, err)
		}
		return nil
	}
	var p problem
	if err := json.Unmarshal(b, &p); err != nil {
		return fmt.Errorf("%w: status %d", raft.ErrUnavailable, res.StatusCode)
	}
	switch {
	case res.StatusCode == http.StatusMisdirectedRequest:
		return &raft.NotLeaderError{Leader: p.Leader}
	case p.Refusal != nil:
		return p.Refusal.unpack()
	}
	return fmt.Errorf("%w: %s", raft.ErrUnavailable, p.Detail)
}

const answerBytesMax = 16 << 20

// Call calls a process of this node. body is what the call takes; answer is decoded into.
func Call(ctx context.Context, client *http.Client, name string, body []byte, answer any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://local/call/"+name, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("call %s: %w", name, err)
	}
	res, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("%w: call %s: %w", raft.ErrUnavailable, name, err)
	}
	defer res.Body.Close()
	if err := Read(res, answerBytesMax, answer); err != nil {
		return fmt.Errorf("call %s: %w", name, err)
	}
	return nil
}
