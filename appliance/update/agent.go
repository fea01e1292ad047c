package update

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"varve/control/durable"
)

// The appliance's services have no rights over slots and restarts. They ask the agent, which runs as root when there is a request:
//
//	DIR/request.json   written by control: what to do
//	DIR/status.json    written by the agent: how far it is
//	DIR/NAME           the bundle, which control has put there; its signature is what makes it an update
//
// The request is removed when it is done, right before a restart: the agent that meets one after a power cut does it again.

// Actions of a request.
const (
	ActionApply  = "apply"
	ActionBack   = "back"
	ActionCancel = "cancel"
)

// Request to the agent. Reboot says whether it restarts the machine afterwards.
type Request struct {
	ID     string `json:"id"`
	Action string `json:"action"`
	Bundle string `json:"bundle,omitempty"`
	Reboot bool   `json:"reboot,omitempty"`
}

// States of a request.
const (
	StateRunning = "running"
	StateFailed  = "failed"
	StateDone    = "done"
)

// AgentStatus is how a request goes, with what is known of updates.
type AgentStatus struct {
	ID    string    `json:"id"`
	At    time.Time `json:"at"`
	State string    `json:"state"`
	Error string    `json:"error,omitempty"`
	Done  int64     `json:"done,omitempty"`
	Total int64     `json:"total,omitempty"`
	Now   *Status   `json:"now,omitempty"`
}

const (
	requestFile     = "request.json"
	statusFile      = "status.json"
	exchangeBytes   = 64 << 10
	progressEvery   = 2 * time.Second
	bundleSuffix    = ".varve"
	bundleBytesMax  = rootBytesMax + 1<<20
	requestIDMax    = 64
	statusErrorsMax = 2 << 10
)

// Dir is where control and agent meet, below an appliance's data.
func Dir(data string) string { return filepath.Join(data, "update") }

// BundleName is the name in Dir of the bundle with this SHA-256.
func BundleName(sha256 string) string { return sha256 + bundleSuffix }

// Ask leaves a request. One that is being worked at is in the way.
func Ask(dir string, r Request) error {
	if _, err := os.Stat(filepath.Join(dir, requestFile)); err == nil {
		return refused("another update is under way")
	}
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode update request: %w", err)
	}
	if err := durable.MakeDir(dir); err != nil {
		return err
	}
	return durable.Replace(dir, requestFile, b, 0o644)
}

// Answer is how the last request goes. The zero status means that there was none.
func Answer(dir string) (AgentStatus, error) {
	var s AgentStatus
	err := readShort(dir, statusFile, &s)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	return s, err
}

// Asked is the request that is being worked at.
func Asked(dir string) (r Request, pending bool, err error) {
	err = readShort(dir, requestFile, &r)
	if errors.Is(err, fs.ErrNotExist) {
		return r, false, nil
	}
	return r, err == nil, err
}

// readShort reads a JSON file that another user may have made: no links are followed, and it is not large.
func readShort(dir, name string, into any) error {
	f, err := openPlain(dir, name, exchangeBytes)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := json.NewDecoder(f).Decode(into); err != nil {
		return fmt.Errorf("read %s: %w", filepath.Join(dir, name), err)
	}
	return nil
}

func openPlain(dir, name string, most int64) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Size() > most) {
		err = fmt.Errorf("%s is no file of at most %d bytes", filepath.Join(dir, name), most)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Serve does the request that is there, if any. reboot restarts the machine; it is called when everything else is done.
func (c Config) Serve(ctx context.Context, dir string, reboot func(context.Context) error) error {
	r, pending, err := Asked(dir)
	if err != nil {
		return errors.Join(err, c.drop(dir)) // what cannot be read would be met for ever
	}
	if !pending {
		return nil
	}
	st := AgentStatus{ID: r.ID, State: StateRunning}
	if err := c.tell(dir, st); err != nil {
		return err
	}
	err = c.do(ctx, dir, r, st)
	if ctx.Err() != nil {
		return ctx.Err() // the request stays
	}
	if st.State = StateDone; err != nil {
		st.State, st.Error = StateFailed, err.Error()[:min(len(err.Error()), statusErrorsMax)]
	}
	if e := errors.Join(c.tell(dir, st), c.drop(dir)); e != nil || err != nil {
		return errors.Join(err, e)
	}
	if r.Reboot && r.Action != ActionCancel {
		return reboot(ctx)
	}
	return nil
}

func (c Config) do(ctx context.Context, dir string, r Request, st AgentStatus) error {
	if len(r.ID) > requestIDMax {
		return refused("the request's id is too long")
	}
	switch r.Action {
	case ActionApply:
		if r.Bundle == "" || strings.ContainsRune(r.Bundle, '/') || strings.HasPrefix(r.Bundle, ".") {
			return refused("%q is no bundle's name", clip(r.Bundle))
		}
		f, err := openPlain(dir, r.Bundle, bundleBytesMax)
		if err != nil {
			return err
		}
		defer f.Close()
		last := time.Now()
		_, err = c.Apply(ctx, f, func(done, total int64) {
			if now := time.Now(); now.Sub(last) > progressEvery {
				last, st.Done, st.Total = now, done, total
				if err := c.tell(dir, st); err != nil {
					c.Log.Warn("tell how far the update is", "err", err)
				}
			}
		})
		return err
	case ActionBack:
		_, err := c.Back()
		return err
	case ActionCancel:
		return c.Cancel()
	}
	return refused("%q is no action", clip(r.Action))
}

// tell writes the status for everybody who may see the directory.
func (c Config) tell(dir string, st AgentStatus) error {
	st.At = time.Now().UTC()
	if now, err := c.Status(); err == nil {
		st.Now = &now
	}
	b, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("encode update status: %w", err)
	}
	return durable.Replace(dir, statusFile, b, 0o644)
}

// Tell renews what the status says of the slots, after a start.
func (c Config) Tell(dir string) error {
	st, err := Answer(dir)
	if err != nil {
		st = AgentStatus{}
	}
	if st.State == StateRunning {
		return nil // the agent will
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil // it is the services' to make
	}
	return c.tell(dir, st)
}

func (c Config) drop(dir string) error {
	if err := os.Remove(filepath.Join(dir, requestFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.SyncDir(dir)
}
