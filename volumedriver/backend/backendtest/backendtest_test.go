package backendtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"testing"
	"time"

	"varve/volumedriver/backend"
	"varve/volumedriver/vfs"
)

func TestMem(t *testing.T) {
	Run(t, func(*testing.T) backend.Backend { return NewMem() })
}

func TestFaultPassesOn(t *testing.T) {
	Run(t, func(*testing.T) backend.Backend { return NewFault(NewMem()) })
}

func TestFaultSpoils(t *testing.T) {
	ctx := t.Context()
	m := NewMem()
	f := NewFault(m)
	check(t, f.Put(ctx, "a/x", []byte("bytes")))

	nth := f.Add(Spoil{Op: OpPut, Prefix: "a/", From: 2, Times: 1})
	for i, want := range []error{nil, ErrInjected, nil} {
		if err := f.Put(ctx, fmt.Sprintf("a/%d", i)); !errors.Is(err, want) {
			t.Errorf("put %d: %v", i, err)
		}
	}
	check(t, f.Put(ctx, "b/1"))
	if nth.Seen() != 3 || nth.Fired() != 1 || !slices.Equal(m.Names(), []string{"a/0", "a/2", "a/x", "b/1"}) {
		t.Errorf("seen %d, fired %d, there are %v", nth.Seen(), nth.Fired(), m.Names())
	}
	nth.Remove()

	lost := f.Add(Spoil{Op: OpPut | OpDelete, Lost: true, Err: io.ErrUnexpectedEOF})
	applied := 0
	for i := range 100 {
		name := fmt.Sprintf("lost/%d", i)
		if err := f.Put(ctx, name); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Error(err)
		}
		if _, err := m.Stat(ctx, name); err == nil {
			applied++
		}
	}
	if applied < 25 || applied > 75 {
		t.Errorf("%d of 100 puts with lost replies were applied", applied)
	}
	lost.Remove()

	o, err := f.Open(ctx, "a/x")
	check(t, err)
	p := make([]byte, 5)
	flip := f.Add(Spoil{Op: OpRead | OpTryRead, Flip: true})
	check(t, o.ReadAt(ctx, p, 0))
	if string(p) == "bytes" {
		t.Error("the bytes read are right")
	}
	check(t, o.TryReadAt(p, 0))
	if string(p) == "bytes" {
		t.Error("the bytes tried are right")
	}
	flip.Remove()
	check(t, o.ReadAt(ctx, p, 0))
	if string(p) != "bytes" {
		t.Error("the bytes read are wrong")
	}

	slow := f.Add(Spoil{Op: OpRead | OpTryRead, Delay: time.Hour})
	if err := o.TryReadAt(p, 0); !errors.Is(err, vfs.ErrWouldBlock) {
		t.Errorf("tried read of a slow backend: %v", err)
	}
	short, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	if err := o.ReadAt(short, p, 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("read of a slow backend: %v", err)
	}
	slow.Remove()

	f.SetFull(true)
	if err := f.Put(ctx, "full"); !errors.Is(err, backend.ErrNoSpace) {
		t.Errorf("put to a full backend: %v", err)
	}
	check(t, f.Delete(ctx, "b/1"))
	f.SetFull(false)
	f.SetDown(true)
	if err := errors.Join(o.ReadAt(ctx, p, 0)); !errors.Is(err, ErrDown) {
		t.Errorf("read while down: %v", err)
	}
	if err := f.Put(ctx, "down"); !errors.Is(err, ErrDown) {
		t.Errorf("put while down: %v", err)
	}
	f.SetDown(false)
	check(t, f.Put(ctx, "down"))
	check(t, o.Close())
}

func TestFaultIsDeterministic(t *testing.T) {
	run := func() (failed []int) {
		f := NewFault(NewMem())
		f.Seed(7)
		f.Add(Spoil{Op: OpStat, Rate: 0.3})
		for i := range 100 {
			if _, err := f.Stat(t.Context(), "x"); errors.Is(err, ErrInjected) {
				failed = append(failed, i)
			}
		}
		return failed
	}
	a, b := run(), run()
	if !slices.Equal(a, b) || len(a) < 15 || len(a) > 45 {
		t.Errorf("failed calls %v, then %v", a, b)
	}
}

func TestMemCorruptAndClone(t *testing.T) {
	m := NewMem()
	check(t, m.Put(t.Context(), "x", []byte("right")))
	c := m.Clone()
	m.Corrupt("x", func(p []byte) []byte { return p[:2] })
	wantObject(t, m, "x", []byte("ri"))
	wantObject(t, c, "x", []byte("right"))
	check(t, m.Close())
	if err := m.Put(t.Context(), "y"); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("put after close: %v", err)
	}
	check(t, m.Reopen().Put(t.Context(), "y"))
}
