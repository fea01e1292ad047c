package state

import "fmt"

// Limits of remembered answers.
const (
	AnswersMax     = 16_384
	AnswerBytesMax = 8 << 10
	AnswersKept    = Time(24 * 3600 * 1e9)
)

const tAnswer = "answer"

// Answer is what a request with an Idempotency-Key was answered, so that the same request again is answered the same and not done
// twice. Status 0 says that it began and that its end is not known.
type Answer struct {
	// Key is the SHA-256 of the caller and its key, Request that of the request.
	Key      [32]byte `json:"key"`
	Request  [32]byte `json:"request"`
	Status   int      `json:"status,omitempty"`
	Body     string   `json:"body,omitempty"`
	Location string   `json:"location,omitempty"`
	ETag     string   `json:"etag,omitempty"`
	At       Time     `json:"at"`
	Rev      uint64   `json:"rev"`
}

// BeginAnswer takes a key, which must be free: ErrExist if it is not.
type BeginAnswer struct {
	Key     [32]byte `json:"key"`
	Request [32]byte `json:"request"`
}

func (*BeginAnswer) kind() (string, int) { return "begin_answer", 1 }

func (c *BeginAnswer) check() error { return nil }

func (c *BeginAnswer) apply(t *tx) (Result, error) {
	var old []*Answer
	n := 0
	rows(&t.View, tAnswer, byID, nil, func(a *Answer) bool {
		if n++; a.At+AnswersKept <= t.at && len(old) < expiredSweptAtOne {
			old = append(old, a)
		}
		return true
	})
	for _, a := range old {
		t.del(tAnswer, a)
	}
	if _, ok := t.Answer(c.Key); ok {
		return Result{}, &Error{Err: ErrExist, Object: "idempotency key"}
	}
	if n-len(old) >= AnswersMax {
		return Result{}, &Error{Err: ErrNoSpace, Object: "idempotency keys", Detail: fmt.Sprintf("%d are kept for a day", AnswersMax),
			Remedy: "send the request without a key"}
	}
	t.put(tAnswer, &Answer{Key: c.Key, Request: c.Request, At: t.at, Rev: t.index})
	return Result{}, nil
}

// EndAnswer keeps the answer; with Status 0 it gives the key back, as nothing was done.
type EndAnswer struct {
	Key      [32]byte `json:"key"`
	Status   int      `json:"status"`
	Body     string   `json:"body,omitempty"`
	Location string   `json:"location,omitempty"`
	ETag     string   `json:"etag,omitempty"`
}

func (*EndAnswer) kind() (string, int) { return "end_answer", 1 }

func (c *EndAnswer) check() error {
	if len(c.Body) > AnswerBytesMax || len(c.Location) > TargetBytesMax || len(c.ETag) > NameBytesMax {
		return invalid("idempotency key", "the answer is too long")
	}
	return nil
}

func (c *EndAnswer) apply(t *tx) (Result, error) {
	a, ok := t.Answer(c.Key)
	if !ok {
		return Result{}, missing("idempotency key")
	}
	if c.Status == 0 {
		t.del(tAnswer, &a)
		return Result{}, nil
	}
	a.Status, a.Body, a.Location, a.ETag, a.Rev = c.Status, c.Body, c.Location, c.ETag, t.index
	t.put(tAnswer, &a)
	return Result{}, nil
}

// Answer returns what is remembered of a key.
func (v *View) Answer(key [32]byte) (Answer, bool) {
	a, ok := first[Answer](v, tAnswer, byID, key[:])
	if !ok {
		return Answer{}, false
	}
	return *a, true
}

func answerTable(frame byte) object {
	o := rowObject[Answer](frame, tAnswer, map[string]index{byID: always(func(a *Answer) []byte { return a.Key[:] })})
	o.commands = []func() Command{command[BeginAnswer], command[EndAnswer]}
	return o
}
