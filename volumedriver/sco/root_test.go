package sco

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"pgregory.net/rapid"

	"varve/volumedriver/seal"
)

func TestRoot(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		id := func(label string) uuid.UUID {
			b := rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, label)
			b[0] |= 1 // never the zero UUID
			return uuid.UUID(b)
		}
		r := &Root{Volume: volume, Epoch: rapid.Uint64().Draw(t, "epoch"), N: rapid.Uint64().Draw(t, "n"), Pool: volume,
			PoolName: rapid.String().Draw(t, "pool"), Path: rapid.String().Draw(t, "path"), Kind: "disk",
			Size: rapid.Int64Min(0).Draw(t, "size"), Mode: 0o644, Created: rapid.Int64().Draw(t, "created"), BlockSize: 4096,
			Template: rapid.Bool().Draw(t, "template"), AtLog: rapid.Uint64().Draw(t, "at"),
			Options: json.RawMessage(rapid.SampledFrom([]string{`{}`, `{"codec":"s2"}`, `{"limits":[1,2]}`}).Draw(t, "options"))}
		for range rapid.IntRange(0, 5).Draw(t, "snapshots") {
			r.Snapshots = append(r.Snapshots, RootSnapshot{ID: id("id"), Name: rapid.StringN(1, 50, MaxSnapshotNameBytes).Draw(t, "name"),
				Seq: rapid.Uint64().Draw(t, "seq"), Created: rapid.Int64().Draw(t, "created"), Size: rapid.Int64Min(0).Draw(t, "size"),
				Consistent: rapid.Bool().Draw(t, "c"), Automatic: rapid.Bool().Draw(t, "a"), Sticky: rapid.Bool().Draw(t, "s"),
				Labels: map[string]string{rapid.String().Draw(t, "label"): rapid.String().Draw(t, "value")}})
		}
		if rapid.Bool().Draw(t, "clone") {
			r.Parent = &RootParent{id("parent"), id("snapshot"), rapid.Uint64().Draw(t, "seq"), rapid.Uint64().Draw(t, "base")}
		}
		from := uint64(0)
		for range rapid.IntRange(0, 4).Draw(t, "spans") {
			from += rapid.Uint64Range(1, 1<<40).Draw(t, "from")
			r.Spans = append(r.Spans, RootSpan{from, rapid.Uint64().Draw(t, "epoch"), id("volume")})
		}
		for range rapid.IntRange(0, 3).Draw(t, "keys") {
			r.Keys = append(r.Keys, seal.Wrapped{KeyID: id("key"),
				Wrapped: rapid.SliceOfN(rapid.Byte(), seal.WrappedBytes, seal.WrappedBytes).Draw(t, "wrapped")})
		}
		b, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseRoot(b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(r, got); diff != "" {
			t.Fatal(diff)
		}
		bit := rapid.IntRange(0, len(b)*8-1).Draw(t, "bit")
		b[bit/8] ^= 1 << (bit % 8)
		if _, err := ParseRoot(b); err == nil {
			t.Fatalf("bit %d not noticed", bit)
		}
	})
}

func TestRootRefuses(t *testing.T) {
	for name, r := range map[string]*Root{
		"too large":          {Volume: volume, Path: string(bytes.Repeat([]byte("x"), MaxRootBytes))},
		"no volume":          {},
		"negative size":      {Volume: volume, Size: -1},
		"snapshot unnamed":   {Volume: volume, Snapshots: []RootSnapshot{{ID: volume}}},
		"snapshot long name": {Volume: volume, Snapshots: []RootSnapshot{{ID: volume, Name: string(make([]byte, 256))}}},
		"its own parent":     {Volume: volume, Parent: &RootParent{Volume: volume}},
		"spans":              {Volume: volume, Spans: []RootSpan{{2, 1, volume}, {2, 2, volume}}},
		"short key":          {Volume: volume, Keys: []seal.Wrapped{{KeyID: volume, Wrapped: make([]byte, 76)}}},
	} {
		if _, err := r.Encode(); err == nil {
			t.Errorf("%s: encoded", name)
		}
	}
}

// TestRootOf10000Snapshots tells what such a root costs.
func TestRootOf10000Snapshots(t *testing.T) {
	r := &Root{Volume: volume, Path: "vm/disk1.raw", Kind: "disk", AtLog: 1 << 40}
	for i := range 10000 {
		r.Snapshots = append(r.Snapshots, RootSnapshot{ID: uuid.New(), Name: fmt.Sprintf("hourly-%d", i), Seq: uint64(i) << 20,
			Created: time.Now().UnixNano(), Size: 1 << 40, Automatic: true, Labels: map[string]string{"policy": "hourly 24, daily 7"}})
	}
	start := time.Now()
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	encoded := time.Since(start)
	start = time.Now()
	got, err := ParseRoot(b)
	if err != nil || len(got.Snapshots) != 10000 {
		t.Fatal(err)
	}
	t.Logf("%d bytes, encoded in %v, parsed in %v", len(b), encoded, time.Since(start))
}

func FuzzParseRoot(f *testing.F) {
	b, err := (&Root{Volume: volume, Path: "a/b.raw", Kind: "disk", Size: 1, Snapshots: []RootSnapshot{{ID: volume, Name: "s", Seq: 3}},
		Parent: &RootParent{Volume: uuid.UUID{1}}, Spans: []RootSpan{{1, 1, volume}}, Options: json.RawMessage(`{"codec":"s2"}`)}).Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:rootFixedBytes])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= rootFixedBytes && len(b) <= MaxRootBytes {
			b = bytes.Clone(b)
			binary.LittleEndian.PutUint32(b[8:], uint32(len(b)-rootFixedBytes))
			binary.LittleEndian.PutUint32(b[12:], rootCRC(b[:12], b[rootFixedBytes:]))
		}
		if r, err := ParseRoot(b); err == nil {
			if _, err := r.Encode(); err != nil && len(b) < MaxRootBytes/8 {
				t.Fatal(err)
			}
		}
	})
}
