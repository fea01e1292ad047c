// Package update puts a new system on an appliance without fear: into the slot that does not run, tried with a counter, kept when
// it is healthy, left by itself when it is not.
//
// # Bundle
//
//	tar: manifest.json, manifest.sig, root          in this order, nothing else
//	manifest.sig: ed25519 signatures of "varve update manifest 1\n" + manifest.json, 64 bytes each, one of a trusted key suffices
//	root: the system's file system image, which goes into a slot as it is; its size and SHA-256 are in the manifest
//
// The manifest also says which data levels (package state, Level) the new system can read, and its floor: a number that is raised
// when a release must not be gone back behind. A bundle below the highest floor that was ever confirmed is refused.
//
// # Slots
//
// Two slots, a and b. The boot loader keeps three values: slot, the good one; try, one to be tried or none; tries, how often. It
// takes one off tries before it boots try, and boots slot when none are left. All three lie in one disk sector and change
// together.
//
//	apply    slot=running try=-      the slot that will be written is not referred to
//	         record: other slot is unknown
//	         write other slot, sync, read it back
//	         record: other slot has version V
//	         try=other tries=3 -> reboot
//	confirm  running=try: health gate -> slot=running try=- ; or, unhealthy: try=- -> reboot into the old one
//	         running≠try: it did not come up -> try=- and the outcome is recorded
//
// After every step power may fail: what boots next is a slot that was written completely, or the one that runs now.
//
// Data formats change only when all nodes of the cluster run the new version (control/state, SetLevel), so the old slot can read
// the data for as long as it may have to.
package update

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"varve/control/durable"
)

// Slot is one of two places of a system.
type Slot string

// Slots.
const (
	SlotA Slot = "a"
	SlotB Slot = "b"
)

// Other is the other slot.
func (s Slot) Other() Slot {
	if s == SlotA {
		return SlotB
	}
	return SlotA
}

// BootState is what the boot loader goes by. Try is "" for none.
type BootState struct {
	Slot  Slot `json:"slot"`
	Try   Slot `json:"try,omitempty"`
	Tries int  `json:"tries,omitempty"`
}

// TriesMax is how often a new system may fail to confirm itself.
const TriesMax = 3

// Slots are the places and the boot loader's state. What a method has done is on the disk when it returns.
type Slots interface {
	// Running is the slot that this system was started from.
	Running() (Slot, error)
	Boot() (BootState, error)
	// SetBoot replaces the state as a whole: after a power cut it is the old one or the new one.
	SetBoot(BootState) error
	// Size is the room in a slot.
	Size(Slot) (int64, error)
	// Write fills a slot from its start with all of r.
	Write(ctx context.Context, s Slot, r io.Reader) error
	// Read gives the first n bytes of a slot, from the medium rather than from memory.
	Read(s Slot, n int64) (io.ReadCloser, error)
}

// System is what a slot holds.
type System struct {
	Version  string `json:"version"`
	LevelMax int    `json:"level_max"`
	SHA256   string `json:"sha256,omitempty"`
	Size     int64  `json:"size,omitempty"`
}

// Outcome of an update.
type Outcome struct {
	At      time.Time `json:"at"`
	Version string    `json:"version"`
	// Done: the new version was confirmed. Otherwise Why says what it failed at, and the appliance runs what it ran before.
	Done bool   `json:"done"`
	Why  string `json:"why,omitempty"`
}

// record is STATE/update.json.
type record struct {
	Slots map[Slot]System `json:"slots"`
	Floor int             `json:"floor"`
	// Trying is what has been written and not been confirmed.
	Trying *Manifest `json:"trying,omitempty"`
	Last   *Outcome  `json:"last,omitempty"`
}

const recordFile = "update.json"

// Config of updates on a machine.
type Config struct {
	State string // directory of the record
	Slots Slots
	Keys  []ed25519.PublicKey
	// Version is the one that runs, LevelMax the highest data level that it reads, Level the one of the data here.
	Version  string
	LevelMax int
	Level    int
	Log      *slog.Logger
}

// Status of updates.
type Status struct {
	Running  Slot            `json:"running"`
	Version  string          `json:"version"`
	Boot     BootState       `json:"boot"`
	Slots    map[Slot]System `json:"slots"`
	Floor    int             `json:"floor"`
	Trying   string          `json:"trying,omitempty"`
	Last     *Outcome        `json:"last,omitempty"`
	Previous string          `json:"previous,omitempty"` // what `back` would start
}

// Errors that a caller acts upon.
var (
	ErrRefused = errors.New("the update is refused")
	ErrDamaged = errors.New("the bundle is damaged")
)

func refused(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrRefused, fmt.Sprintf(format, args...))
}

func (c Config) load() (record, error) {
	r := record{Slots: make(map[Slot]System)}
	b, err := os.ReadFile(filepath.Join(c.State, recordFile))
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("read %s: %w", filepath.Join(c.State, recordFile), err)
	}
	if r.Slots == nil {
		r.Slots = make(map[Slot]System)
	}
	return r, nil
}

func (c Config) keep(r record) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encode update record: %w", err)
	}
	if err := durable.MakeDir(c.State); err != nil {
		return err
	}
	return durable.Replace(c.State, recordFile, append(b, '\n'), 0o600)
}

// Status says how things are. It changes nothing.
func (c Config) Status() (Status, error) {
	running, err := c.Slots.Running()
	if err != nil {
		return Status{}, err
	}
	boot, err := c.Slots.Boot()
	if err != nil {
		return Status{}, err
	}
	r, err := c.load()
	if err != nil {
		return Status{}, err
	}
	st := Status{Running: running, Version: c.Version, Boot: boot, Slots: r.Slots, Floor: r.Floor, Last: r.Last}
	st.Slots[running] = System{Version: c.Version, LevelMax: c.LevelMax, SHA256: r.Slots[running].SHA256, Size: r.Slots[running].Size}
	if r.Trying != nil && boot.Try != "" {
		st.Trying = r.Trying.Version
	}
	if other, ok := r.Slots[running.Other()]; ok && boot.Try == "" {
		st.Previous = other.Version
	}
	return st, nil
}

// Apply writes a bundle into the slot that does not run and has it tried at the next start. progress may be nil.
func (c Config) Apply(ctx context.Context, bundle io.Reader, progress func(done, total int64)) (Manifest, error) {
	m, root, err := OpenBundle(bundle, c.Keys)
	if err != nil {
		return m, err
	}
	r, err := c.load()
	if err != nil {
		return m, err
	}
	if err := c.fits(m, r); err != nil {
		return m, err
	}
	running, err := c.Slots.Running()
	if err != nil {
		return m, err
	}
	boot, err := c.Slots.Boot()
	if err != nil {
		return m, err
	}
	other := running.Other()
	if boot.Try == running {
		return m, refused("the system that runs is itself being tried: wait until it is confirmed")
	}
	room, err := c.Slots.Size(other)
	if err != nil {
		return m, err
	}
	if m.Root.Size > room {
		return m, refused("it needs %d bytes and slot %s has %d", m.Root.Size, other, room)
	}
	if err := c.Slots.SetBoot(BootState{Slot: running}); err != nil {
		return m, fmt.Errorf("hold slot %s: %w", running, err)
	}
	delete(r.Slots, other)
	r.Trying = nil
	r.Slots[running] = System{Version: c.Version, LevelMax: c.LevelMax, SHA256: r.Slots[running].SHA256, Size: r.Slots[running].Size}
	if err := c.keep(r); err != nil {
		return m, err
	}
	c.Log.Info("write update", "version", m.Version, "slot", other, "bytes", m.Root.Size)
	if err := c.Slots.Write(ctx, other, &counted{r: root, total: m.Root.Size, progress: progress}); err != nil {
		return m, fmt.Errorf("write slot %s: %w", other, err)
	}
	if err := root.Whole(); err != nil {
		return m, err
	}
	back, err := c.Slots.Read(other, m.Root.Size)
	if err != nil {
		return m, fmt.Errorf("read slot %s back: %w", other, err)
	}
	sum, n, err := hashOf(back)
	if err = errors.Join(err, back.Close()); err != nil {
		return m, fmt.Errorf("read slot %s back: %w", other, err)
	}
	if sum != m.Root.SHA256 || n != m.Root.Size {
		return m, fmt.Errorf("slot %s reads back differently from what was written: the disk is not to be trusted", other)
	}
	r.Slots[other] = System{Version: m.Version, LevelMax: m.LevelMax, SHA256: m.Root.SHA256, Size: m.Root.Size}
	r.Trying = &m
	if err := c.keep(r); err != nil {
		return m, err
	}
	if err := c.Slots.SetBoot(BootState{Slot: running, Try: other, Tries: TriesMax}); err != nil {
		return m, fmt.Errorf("have slot %s tried: %w", other, err)
	}
	c.Log.Info("update is written, the next start tries it", "version", m.Version, "slot", other)
	return m, nil
}

// fits refuses what this appliance's data or history forbids.
func (c Config) fits(m Manifest, r record) error {
	switch {
	case m.Floor < r.Floor:
		return refused("version %s is older than what may be gone back to (floor %d, here %d)", m.Version, m.Floor, r.Floor)
	case c.Level > m.LevelMax:
		return refused("version %s reads data up to level %d, the data here is of level %d", m.Version, m.LevelMax, c.Level)
	case c.Level < m.LevelMin:
		return refused("version %s needs data of level %d or more, here it is %d: update to a version between first", m.Version, m.LevelMin, c.Level)
	}
	return nil
}

// Back has the previous system tried at the next start.
func (c Config) Back() (System, error) {
	st, err := c.Status()
	if err != nil {
		return System{}, err
	}
	other := st.Running.Other()
	sys, known := st.Slots[other]
	switch {
	case st.Boot.Try != "":
		return sys, refused("an update is being tried")
	case !known:
		return sys, refused("slot %s holds no complete system", other)
	case c.Level > sys.LevelMax:
		return sys, refused("version %s reads data up to level %d, the data here is of level %d", sys.Version, sys.LevelMax, c.Level)
	}
	r, err := c.load()
	if err != nil {
		return sys, err
	}
	r.Trying = &Manifest{Version: sys.Version, LevelMax: sys.LevelMax, Floor: r.Floor}
	if err := c.keep(r); err != nil {
		return sys, err
	}
	return sys, c.Slots.SetBoot(BootState{Slot: st.Running, Try: other, Tries: TriesMax})
}

// Cancel forgets an update that has been written and not been started.
func (c Config) Cancel() error {
	running, err := c.Slots.Running()
	if err != nil {
		return err
	}
	boot, err := c.Slots.Boot()
	if err != nil {
		return err
	}
	if boot.Try == running {
		return refused("it runs already")
	}
	if err := c.Slots.SetBoot(BootState{Slot: running}); err != nil {
		return err
	}
	r, err := c.load()
	if err != nil {
		return err
	}
	r.Trying = nil
	return c.keep(r)
}

// Verdict is what Confirm found.
type Verdict string

// Verdicts.
const (
	Nothing  Verdict = "nothing"  // no update is being tried
	Good     Verdict = "good"     // the new system stays
	Bad      Verdict = "bad"      // it is unhealthy: restart, the old one comes
	Returned Verdict = "returned" // it did not come up: the old one runs again
)

// Confirm settles an update after a start. healthy blocks until the system is found healthy, or says why it is not.
func (c Config) Confirm(ctx context.Context, healthy func(context.Context) error) (Verdict, error) {
	running, err := c.Slots.Running()
	if err != nil {
		return Nothing, err
	}
	boot, err := c.Slots.Boot()
	if err != nil {
		return Nothing, err
	}
	r, err := c.load()
	if err != nil { // a record that does not read is no reason to leave a system that works
		c.Log.Error("record of updates", "err", err)
		r = record{Slots: make(map[Slot]System)}
	}
	out := Outcome{At: time.Now().UTC()}
	if r.Trying != nil {
		out.Version = r.Trying.Version
	}
	settle := func(v Verdict, b BootState) (Verdict, error) {
		// The loader first: the record only tells.
		if err := c.Slots.SetBoot(b); err != nil {
			return v, err
		}
		r.Trying, r.Last = nil, &out
		return v, c.keep(r)
	}
	switch {
	case boot.Try == "":
		return Nothing, nil
	case boot.Try != running && boot.Tries >= TriesMax:
		return Nothing, nil // written and not started yet
	case boot.Try != running:
		out.Why = "it did not start, or did not become healthy, " + fmt.Sprint(TriesMax-boot.Tries) + " times"
		c.Log.Error("the update did not come up, the system of before runs", "version", out.Version)
		return settle(Returned, BootState{Slot: running})
	}
	if err := healthy(ctx); err != nil {
		if ctx.Err() != nil { // stopped, not found unhealthy: the next start decides
			return Nothing, ctx.Err()
		}
		out.Why = err.Error()
		c.Log.Error("the update is not healthy, the system of before is started", "version", out.Version, "err", err)
		return settle(Bad, BootState{Slot: boot.Slot})
	}
	out.Done = true
	if r.Trying != nil {
		r.Floor = max(r.Floor, r.Trying.Floor)
	}
	sys := r.Slots[running]
	r.Slots[running] = System{Version: c.Version, LevelMax: c.LevelMax, SHA256: sys.SHA256, Size: sys.Size}
	c.Log.Info("update is confirmed", "version", c.Version, "slot", running)
	return settle(Good, BootState{Slot: running})
}
