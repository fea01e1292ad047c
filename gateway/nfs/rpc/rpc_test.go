package rpc

import (
	"bytes"
	"encoding/binary"
	"testing"

	"varve/gateway/nfs/xdr"
)

func TestCallRoundTrip(t *testing.T) {
	cred := Credentials{Flavour: FlavourSys, UID: 1, GID: 2, Machine: []byte("esx1")}
	cred.SetGroups([]uint32{3, 4, 5})
	var c Call
	if !DecodeCall(append(AppendCall(nil, 9, 100003, 3, 6, cred), "args"...), &c) {
		t.Fatal("a call does not decode")
	}
	if c.XID != 9 || c.Program != 100003 || c.Version != 3 || c.Proc != 6 || c.Auth != AuthOK || string(c.Args) != "args" ||
		c.Cred.UID != 1 || c.Cred.GID != 2 || string(c.Cred.Machine) != "esx1" || len(c.Cred.Groups()) != 3 || c.Cred.Groups()[2] != 5 {
		t.Fatalf("%+v", c)
	}
	whole := AppendCall(nil, 9, 100003, 3, 6, cred)
	for n := range whole {
		if n != 12 && DecodeCall(whole[:n], &c) {
			t.Errorf("%d bytes of a call decode", n)
		}
	}
}

func TestMachineNameTooLong(t *testing.T) {
	for n, want := range map[int]AuthStat{255: AuthOK, 256: AuthBadCred} {
		var c Call
		cred := Credentials{Flavour: FlavourSys, Machine: make([]byte, n)}
		if !DecodeCall(AppendCall(nil, 1, 2, 3, 4, cred), &c) || c.Auth != want {
			t.Errorf("machine name of %d bytes: auth %d, want %d", n, c.Auth, want)
		}
	}
	// Credentials of 400 bytes are the most there may be, also of a flavour that we refuse.
	for n, want := range map[int]bool{400: true, 401: false} {
		b := xdr.AppendOpaque(xdr.AppendUint32(AppendCall(nil, 1, 2, 3, 4, Credentials{})[:24], 6), make([]byte, n))
		if got := DecodeCall(append(b, make([]byte, 8)...), new(Call)); got != want {
			t.Errorf("credentials of %d bytes decode: %v", n, got)
		}
	}
}

// feed gives a stream to Records by chunks and returns the records.
func feed(s *Records, stream []byte, chunk func() int) (records [][]byte, err error) {
	for {
		record, ok, err := s.Next()
		if err != nil {
			return records, err
		}
		if ok {
			records = append(records, bytes.Clone(record))
			continue
		}
		if len(stream) == 0 {
			return records, nil
		}
		n := copy(s.Space(), stream[:min(max(chunk(), 1), len(stream))])
		s.Filled(n)
		stream = stream[n:]
	}
}

func TestMemoryFollowsWhatArrived(t *testing.T) {
	var s Records
	copy(s.Space(), binary.BigEndian.AppendUint32(nil, RecordBytesMax|lastBit))
	s.Filled(4)
	if _, ok, err := s.Next(); ok || err != nil {
		t.Fatal(ok, err)
	}
	if len(s.buf) > BufferBytesMin {
		t.Fatalf("%d bytes for a record of which 4 have arrived", len(s.buf))
	}
	if !s.Partial() || s.Large() {
		t.Error("a record has begun, in a small buffer")
	}
	rest := make([]byte, RecordBytesMax)
	records, err := feed(&s, rest, func() int { return 5000 })
	if err != nil || len(records) != 1 || len(records[0]) != RecordBytesMax {
		t.Fatalf("%d records, %v", len(records), err)
	}
	if len(s.buf) > 2*RecordBytesMax+BufferBytesMin || !s.Large() {
		t.Errorf("buffer of %d bytes", len(s.buf))
	}
	if s.Shrink(); s.Large() || s.Partial() {
		t.Error("buffers are kept")
	}
}

// TestBufferGrowsWithBursts: of many records that wait, one read takes many; at rest the buffer is given up.
func TestBufferGrowsWithBursts(t *testing.T) {
	var s Records
	b, start := BeginRecord(nil)
	b = EndRecord(append(b, make([]byte, 4<<10+200)...), start)
	stream := bytes.Repeat(b, 200)
	most := 0
	for len(stream) > 0 {
		n := copy(s.Space(), stream)
		s.Filled(n)
		stream = stream[n:]
		taken := 0
		for {
			_, ok, err := s.Next()
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				break
			}
			taken++
		}
		most = max(most, taken)
	}
	if most < 50 || len(s.buf) > burstBufferBytesMax || s.Partial() {
		t.Fatalf("at most %d records at once in %d bytes", most, len(s.buf))
	}
	if s.Shrink(); s.Large() {
		t.Error("buffers are kept")
	}
}

// TestEndlessLargeRecords: the buffer does not grow with the number of records.
func TestEndlessLargeRecords(t *testing.T) {
	var s Records
	b, start := BeginRecord(nil)
	b = EndRecord(append(b, make([]byte, 1<<20+100)...), start)
	for i := range 20 {
		if records, err := feed(&s, b, func() int { return 1 << 20 }); err != nil || len(records) != 1 {
			t.Fatalf("%d: %d records, %v", i, len(records), err)
		}
	}
	if len(s.buf) > 2<<20 {
		t.Errorf("buffer of %d bytes", len(s.buf))
	}
}

func FuzzRecord(f *testing.F) {
	call := AppendCall(nil, 1, 2, 3, 4, Credentials{})
	whole, start := BeginRecord(nil)
	whole = EndRecord(append(whole, call...), start)
	f.Add(append(whole, whole...), byte(7))
	f.Add([]byte{0, 0, 0, 1, 'a', 0, 0, 0, 0, 0x80, 0, 0, 1, 'b'}, byte(1))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff}, byte(1))
	f.Fuzz(func(t *testing.T, stream []byte, step byte) {
		var once, pieces Records
		a, errA := feed(&once, stream, func() int { return len(stream) })
		size := int(step)
		b, errB := feed(&pieces, stream, func() int {
			size = (size*31 + 7) % 1021
			return size
		})
		if errA != errB || len(a) != len(b) {
			t.Fatalf("in one piece %d records and %v, in many %d and %v", len(a), errA, len(b), errB)
		}
		total := 0
		for i := range a {
			if !bytes.Equal(a[i], b[i]) {
				t.Fatalf("record %d differs", i)
			}
			total += len(a[i])
			var c Call
			DecodeCall(a[i], &c)
		}
		if total > len(stream) {
			t.Fatal("records hold more than the stream")
		}
		for _, s := range []*Records{&once, &pieces} {
			if len(s.buf)+cap(s.joined) > 4*len(stream)+64<<10 {
				t.Fatalf("%d bytes of buffers for %d", len(s.buf)+cap(s.joined), len(stream))
			}
		}
	})
}
