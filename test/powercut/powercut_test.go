// Package powercut asks for what the NBD gateway and the volume driver promise together: what a client was told is durable
// is there after the power was cut at that very moment, whatever connection it was told on. The server is the real one,
// over a file system in memory that forgets everything that was not synced.
package powercut

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"testing"

	"github.com/google/uuid"

	"varve/gateway/nbd"
	"varve/test/nbdclient"
	"varve/volumedriver"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/vfs"
)

const (
	volumeBytes = 64 << 20
	block       = 4096
)

var spec = volumedriver.Spec{ID: uuid.MustParse("6f2c3a52-52a3-4c3f-9d0e-1f6f6f1d7c11"), Pool: uuid.MustParse("b8b1b1c5-0f0a-4a51-9a53-5f1f0b8f4e02"),
	Epoch: 1, Size: volumeBytes, PoolName: "default", Path: "/disk.raw", Kind: "disk"}

// open opens the driver over a file system, and its one volume.
func open(t *testing.T, fs vfs.FS) (*volumedriver.Driver, *volumedriver.Volume) {
	t.Helper()
	d, err := volumedriver.Open(volumedriver.Config{FS: fs, Dir: "/data", Log: slog.New(slog.DiscardHandler), LogBytes: 32 << 20,
		SegmentBytes: 4 << 20, BatchBytes: 1 << 20, SCOBytes: 4 << 20, NoPrewrite: true, Boot: func() (string, error) { return "boot", nil }})
	if err != nil {
		t.Fatal(err)
	}
	d.AddPool(spec.Pool, backendtest.NewMem())
	v, err := d.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	return d, v
}

// device is a volume as the gateway wants it.
type device struct{ *volumedriver.Volume }

func (device) ReadOnly() bool { return false }

// exports offers one volume under one name.
type exports struct{ v *volumedriver.Volume }

func (e exports) Open(_ context.Context, name string, _ nbd.Peer) (nbd.Device, func(), error) {
	if name != "disk" {
		return nil, nil, nbd.ErrUnknownExport
	}
	return device{e.v}, func() {}, nil
}

func (e exports) List(context.Context, nbd.Peer) ([]nbd.ExportInfo, error) {
	return []nbd.ExportInfo{{Name: "disk"}}, nil
}

func TestWhatWasToldDurableSurvivesAPowerCut(t *testing.T) {
	mem := vfs.NewMem(1)
	d, v := open(t, mem)
	socket := filepath.Join(t.TempDir(), "nbd.sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := nbd.New(nbd.Config{Exports: exports{v}, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server.Run(ctx, ln) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	var conns [2]*nbdclient.Client
	for i := range conns {
		if conns[i], err = nbdclient.Dial("unix", socket, "disk"); err != nil {
			t.Fatal(err)
		}
		defer conns[i].Close()
	}
	a, b := conns[0], conns[1]
	do := func(c *nbdclient.Client, kind, flags uint16, off int64, n int, p []byte) {
		t.Helper()
		if err := c.Do(kind, flags, off, n, p); err != nil {
			t.Fatal(err)
		}
	}
	// check cuts the power now and reads what a new driver finds.
	cuts := 0
	check := func(what string, off int64, want []byte) {
		t.Helper()
		cuts++
		again, v := open(t, mem.Crash(int64(cuts), 0))
		got := make([]byte, len(want))
		if err := v.Read(t.Context(), got, off); err != nil {
			t.Fatalf("%s: read after the power cut: %v", what, err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: acknowledged as durable and lost in a power cut", what)
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
	zeros := make([]byte, 2*block)
	for round := range byte(12) {
		off := int64(round) * 16 * block
		p := bytes.Repeat([]byte{round + 1}, 2*block)

		do(a, nbdclient.Write, nbdclient.FUA, off, 0, p)
		check("write with FUA", off, p)

		do(a, nbdclient.Write, 0, off+4*block, 0, p)
		do(a, nbdclient.Flush, 0, 0, 0, nil)
		check("write and flush", off+4*block, p)

		do(a, nbdclient.Write, 0, off+8*block, 0, p)
		do(b, nbdclient.Flush, 0, 0, 0, nil)
		check("write, then a flush on another connection", off+8*block, p)

		do(b, nbdclient.WriteZeroes, nbdclient.FUA, off, 2*block, nil)
		check("write zeroes with FUA", off, zeros)

		do(b, nbdclient.Trim, nbdclient.FUA, off+4*block, 2*block, nil)
		check("trim with FUA", off+4*block, zeros)

		// Less than a block is read, changed and written.
		do(a, nbdclient.Write, nbdclient.FUA, off+8*block+512, 0, zeros[:512])
		want := bytes.Clone(p)
		clear(want[512:1024])
		check("512 bytes with FUA", off+8*block, want)
	}
	fmt.Printf("» NBD over a file system that forgets what is not synced: %d power cuts right after FUA and FLUSH replies, 0 lost\n", cuts)
}
