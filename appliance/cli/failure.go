package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Exit codes: the contract with scripts.
const (
	ExitDone        = 0
	ExitFailed      = 1
	ExitUsage       = 2
	ExitNotFound    = 3
	ExitConflict    = 4
	ExitNotAllowed  = 5
	ExitUnavailable = 6
)

var codeNames = map[int]string{
	ExitFailed: "failed", ExitUsage: "usage", ExitNotFound: "not_found", ExitConflict: "conflict",
	ExitNotAllowed: "not_allowed", ExitUnavailable: "unavailable",
}

// Failure is an error as a person and a script want it: what was attempted on which object, why it ended, what helps.
type Failure struct {
	Exit         int
	What, Object string
	Why, Remedy  string
	RequestID    string
	Err          error
}

func (f *Failure) Error() string {
	head := strings.TrimSpace(f.What + " " + f.Object)
	text := f.Why
	if head != "" {
		text = head + ": " + text
	}
	if f.Remedy != "" {
		text += "; " + f.Remedy
	}
	return text
}

func (f *Failure) Unwrap() error { return f.Err }

// remedied is an error that knows what helps.
type remedied interface {
	error
	Remedy() string
}

func usage(format string, args ...any) error {
	return &Failure{Exit: ExitUsage, Why: fmt.Sprintf(format, args...), Remedy: "see varve --help"}
}

// report prints err on w and gives its exit code.
func report(w io.Writer, err error, asJSON bool) int {
	f, ok := errors.AsType[*Failure](err)
	if !ok {
		f = &Failure{Exit: ExitFailed, Why: err.Error(), Err: err}
	}
	if !asJSON {
		text := strings.ReplaceAll(f.Error(), "\n", "; ") // joined errors stand one per line
		fmt.Fprintf(w, "varve: %s\n", oneLine(text))
		return f.Exit
	}
	type body struct {
		Code      string `json:"code"`
		Exit      int    `json:"exit"`
		Message   string `json:"message"`
		Object    string `json:"object,omitempty"`
		Remedy    string `json:"remedy,omitempty"`
		RequestID string `json:"request_id,omitempty"`
	}
	message := f.Why
	if f.What != "" {
		message = strings.TrimSpace(f.What+" "+f.Object) + ": " + f.Why
	}
	b := body{Code: codeNames[f.Exit], Exit: f.Exit, Message: message, Object: f.Object, Remedy: f.Remedy, RequestID: f.RequestID}
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	if err := e.Encode(map[string]body{"error": b}); err != nil {
		return ExitFailed
	}
	return f.Exit
}

// oneLine keeps a message from others, such as an object's name, from drawing lines of its own.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
}
