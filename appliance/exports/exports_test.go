package exports

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"

	"varve/control/node"
	"varve/control/raft"
	"varve/control/state"
	"varve/control/vdisk"
	"varve/control/vpool"
	"varve/gateway/nbd"
	"varve/gateway/nfs"
	"varve/volumedriver"
	"varve/volumedriver/backend"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/backend/local"
	"varve/volumedriver/blockio"
	"varve/volumedriver/vfs"
)

func TestMain(m *testing.M) {
	// Raft and Pebble end some of their goroutines a moment after they were closed.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/hashicorp/raft.(*raftState).goFunc.func1"))
}

// box is an appliance without gateways, on a directory.
type box struct {
	t       *testing.T
	dir     string
	raft    *raft.Node
	driver  *volumedriver.Driver
	volumes *Volumes
	pools   *Pools
	engine  *Engine
	vdisks  *vdisk.Controller
	vpools  *vpool.Controller
	nfs     *NFS
	nbd     *NBD
	lost    map[uuid.UUID]bool
	stop    func()
}

var silence = slog.New(slog.NewTextHandler(io.Discard, nil))

func openBox(t *testing.T, dir string, lost ...uuid.UUID) *box {
	t.Helper()
	b := &box{t: t, dir: dir, lost: make(map[uuid.UUID]bool)}
	for _, id := range lost {
		b.lost[id] = true
	}
	var err error
	if b.raft, err = raft.Open(raft.Config{Dir: filepath.Join(dir, "control"), Log: silence}); err != nil {
		t.Fatal(err)
	}
	b.driver, err = volumedriver.Open(volumedriver.Config{FS: vfs.OS(), Dir: dir, LogBytes: 64 << 20, SegmentBytes: 8 << 20,
		MapBudgetBytes: 8 << 20, NoPrewrite: true, Log: silence})
	if err != nil {
		t.Fatal(err)
	}
	store := b.raft.State()
	b.volumes = NewVolumes(b.raft, store, b.driver, b.raft.ID(), b.lost)
	b.pools = NewPools(b.driver, func(s state.Backend, _ vpool.Keys) (backend.Backend, error) { return local.Open(vfs.OS(), s.Dir) }, nil, nil, silence)
	b.engine = NewEngine(store, b.volumes)
	b.vpools = vpool.New(vpool.Config{Raft: b.raft, Store: store, Engine: b.pools})
	b.vdisks = vdisk.New(vdisk.Config{Raft: b.raft, Store: store, Engine: b.engine})
	b.nfs = NewNFS(b.raft, store, b.volumes, b.pools, silence)
	b.nbd = NewNBD(store, b.volumes)
	spec := state.NodeSpec{Name: "test", Role: state.RoleMaster, Version: "test"}
	if err := errors.Join(node.New(b.raft, store, b.raft.ID()).Register(t.Context(), spec), b.vpools.Start(t.Context())); err != nil {
		t.Fatal(err)
	}
	if len(store.View().VPools()) == 0 {
		if _, err := b.vpools.Create(t.Context(), vpool.Spec{Name: "default", Backend: "local://" + filepath.Join(dir, "backend")}); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := b.driver.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() { b.vdisks.Run(ctx) })
	b.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		if err := errors.Join(b.driver.Close(), b.pools.Close(), b.raft.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(b.stop)
	return b
}

// fsid is that of the only vPool.
func (b *box) fsid() uint64 { return b.nfs.Exports()[0].FSID }

func (b *box) file(name string, size *int64) nfs.Attr {
	b.t.Helper()
	a, created, err := b.nfs.Create(b.t.Context(), b.fsid(), state.RootIno, name, nfs.CreateSpec{Kind: nfs.Regular, Mode: 0o640, UID: 7, Size: size})
	if err != nil || !created {
		b.t.Fatalf("create %s: created %v, %v", name, created, err)
	}
	return a
}

func (b *box) attr(ino uint64) nfs.Attr {
	b.t.Helper()
	a, err := b.nfs.Attr(b.t.Context(), b.fsid(), ino, 0)
	if err != nil {
		b.t.Fatal(err)
	}
	return a
}

func (b *box) write(ino uint64, p []byte, off int64) {
	b.t.Helper()
	f, release, err := b.nfs.Open(b.t.Context(), b.fsid(), ino)
	if err != nil {
		b.t.Fatal(err)
	}
	defer release()
	if err := f.Write(b.t.Context(), p, off, blockio.Extend|blockio.FUA); err != nil {
		b.t.Fatal(err)
	}
}

func pointer[T any](v T) *T { return &v }

func TestAttributesComeFromStateAndEngineAsOne(t *testing.T) {
	b := openBox(t, t.TempDir())
	made := b.file("disk1.raw", pointer(int64(1<<30)))
	if made.Size != 1<<30 || made.Used != 0 || made.Mode != 0o640 || made.UID != 7 || made.Kind != nfs.Regular || made.FSID != b.fsid() {
		t.Errorf("new file %+v", made)
	}
	// Opening it to read changes nothing that a client sees.
	f, release, err := b.nfs.Open(t.Context(), b.fsid(), made.Inode)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Read(t.Context(), make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	release()
	if got := b.attr(made.Inode); got != made {
		t.Errorf("after a read %+v, before %+v", got, made)
	}
	b.write(made.Inode, bytes.Repeat([]byte{1}, 8192), 1<<30)
	grown := b.attr(made.Inode)
	if grown.Size != 1<<30+8192 || grown.Used != 8192 || !grown.Mtime.After(made.Mtime) || grown.Ctime.Before(grown.Mtime) {
		t.Errorf("after a write beyond the end %+v", grown)
	}
	if l, err := b.nfs.Lookup(t.Context(), b.fsid(), state.RootIno, "disk1.raw"); err != nil || l != grown {
		t.Errorf("lookup says %+v, attr %+v (%v)", l, grown, err)
	}
	entries, eof, err := b.nfs.ReadDir(t.Context(), b.fsid(), state.RootIno, 0, 10)
	if err != nil || !eof || len(entries) != 1 || entries[0].Attr != grown {
		t.Errorf("readdir says %+v (%v)", entries, err)
	}
}

func TestSetAttrReachesWhoeverOwnsTheAttribute(t *testing.T) {
	b := openBox(t, t.TempDir())
	a := b.file("f", nil)
	b.write(a.Inode, []byte("hello"), 0)
	old := time.Date(2001, 2, 3, 4, 5, 6, 789, time.UTC)
	got, err := b.nfs.SetAttr(t.Context(), b.fsid(), a.Inode, nfs.SetAttr{Mode: pointer(uint32(0o600)), Size: pointer(int64(3)), Mtime: &old})
	if err != nil {
		t.Fatal(err)
	}
	if got.Mode != 0o600 || got.Size != 3 || !got.Mtime.Equal(old) || !got.Ctime.After(a.Ctime) {
		t.Errorf("after setattr %+v", got)
	}
	if _, err := b.nfs.SetAttr(t.Context(), b.fsid(), a.Inode, nfs.SetAttr{Mode: pointer(uint32(0)), Guard: &old}); !errors.Is(err, nfs.ErrNotSync) {
		t.Errorf("stale guard: %v", err)
	}
	if _, err := b.nfs.SetAttr(t.Context(), b.fsid(), a.Inode, nfs.SetAttr{Mode: pointer(uint32(0o400)), Guard: &got.Ctime}); err != nil {
		t.Errorf("true guard: %v", err)
	}
	if _, err := b.nfs.SetAttr(t.Context(), b.fsid(), state.RootIno, nfs.SetAttr{Size: pointer(int64(0))}); !errors.Is(err, nfs.ErrIsDir) {
		t.Errorf("size of a directory: %v", err)
	}
	if _, err := b.nfs.SetAttr(t.Context(), b.fsid(), a.Inode, nfs.SetAttr{Size: pointer(int64(-1))}); !errors.Is(err, nfs.ErrTooBig) {
		t.Errorf("negative size: %v", err)
	}
	if _, err := b.nfs.SetAttr(t.Context(), b.fsid(), 999, nfs.SetAttr{}); !errors.Is(err, nfs.ErrStale) {
		t.Errorf("unknown inode: %v", err)
	}
	// A size and an mtime that were set survive a restart.
	b.stop()
	again := openBox(t, b.dir)
	if after := again.attr(a.Inode); after.Size != 3 || !after.Mtime.Equal(old) || after.Mode != 0o400 {
		t.Errorf("after a restart %+v", after)
	}
}

func TestExclusiveCreateSucceedsAgainWithItsVerifierOnly(t *testing.T) {
	b := openBox(t, t.TempDir())
	create := func(verf byte) (nfs.Attr, bool, error) {
		return b.nfs.Create(t.Context(), b.fsid(), state.RootIno, "x", nfs.CreateSpec{Kind: nfs.Regular, Exclusive: true, Verf: [8]byte{verf}})
	}
	first, created, err := create(1)
	if err != nil || !created {
		t.Fatal(created, err)
	}
	if again, created, err := create(1); err != nil || created || again.Inode != first.Inode {
		t.Errorf("same verifier: %+v %v %v", again, created, err)
	}
	if _, _, err := create(2); !errors.Is(err, nfs.ErrExist) {
		t.Errorf("other verifier: %v", err)
	}
	guarded := nfs.CreateSpec{Kind: nfs.Regular, Guarded: true}
	if _, _, err := b.nfs.Create(t.Context(), b.fsid(), state.RootIno, "x", guarded); !errors.Is(err, nfs.ErrExist) {
		t.Errorf("guarded: %v", err)
	}
	if _, _, err := b.nfs.Create(t.Context(), b.fsid(), 999, "x", guarded); !errors.Is(err, nfs.ErrStale) {
		t.Errorf("in a directory that is gone: %v", err)
	}
	if _, _, err := b.nfs.Create(t.Context(), b.fsid(), first.Inode, "x", guarded); !errors.Is(err, nfs.ErrNotDir) {
		t.Errorf("in a file: %v", err)
	}
	if _, _, err := b.nfs.Create(t.Context(), b.fsid(), state.RootIno, "p", nfs.CreateSpec{Kind: nfs.FIFO}); !errors.Is(err, nfs.ErrNotSupported) {
		t.Errorf("a FIFO: %v", err)
	}
}

func TestRenameOverAFileFreesTheOldVolume(t *testing.T) {
	b := openBox(t, t.TempDir())
	keep, gone := b.file("a.raw", pointer(int64(8192))), b.file("b.raw", pointer(int64(8192)))
	b.write(keep.Inode, []byte("keep"), 0)
	b.write(gone.Inode, []byte("gone"), 0)
	view := b.raft.State().View()
	old, err := view.Inode(b.fsid(), gone.Inode)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.nfs.Rename(t.Context(), b.fsid(), state.RootIno, "a.raw", state.RootIno, "b.raw"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.nfs.Attr(t.Context(), b.fsid(), gone.Inode, gone.Generation); !errors.Is(err, nfs.ErrStale) {
		t.Errorf("handle of the replaced file: %v", err)
	}
	if l, err := b.nfs.Lookup(t.Context(), b.fsid(), state.RootIno, "b.raw"); err != nil || l.Inode != keep.Inode {
		t.Errorf("new name leads to %+v (%v)", l, err)
	}
	eventually(t, "the replaced volume is deleted", func() bool {
		_, known := b.driver.Stat(old.Volume)
		doomed, _ := b.raft.State().Doomed()
		return !known && len(doomed) == 0
	})
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestVolumeIsActivatedOncePerProcess(t *testing.T) {
	b := openBox(t, t.TempDir())
	d, err := b.vdisks.Create(t.Context(), "default/d", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			v, release, err := b.volumes.Open(t.Context(), d.Volume.ID)
			if err != nil {
				t.Error(err)
				return
			}
			defer release()
			if v.ID() != d.Volume.ID {
				t.Errorf("opened %s", v.ID())
			}
		})
	}
	wg.Wait()
	epoch := func(b *box) uint64 {
		v, err := b.raft.State().View().Volume(d.Volume.ID)
		if err != nil {
			t.Fatal(err)
		}
		return v.Epoch
	}
	if e := epoch(b); e != 1 {
		t.Errorf("epoch %d after 32 openings", e)
	}
	if n := b.volumes.Users(d.Volume.ID); n != 0 {
		t.Errorf("%d users after all left", n)
	}
	b.stop()
	b = openBox(t, b.dir)
	if _, release, err := b.volumes.Open(t.Context(), d.Volume.ID); err != nil {
		t.Error(err)
	} else {
		release()
	}
	if i, _ := b.volumes.Info(d.Volume.ID); epoch(b) != 2 || i.Epoch != 2 {
		t.Errorf("after a restart: state has epoch %d, engine %d", epoch(b), i.Epoch)
	}
}

func TestLostVolumeIsRefusedAndItsNameKept(t *testing.T) {
	b := openBox(t, t.TempDir())
	lost, err := b.vdisks.Create(t.Context(), "default/lost", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.vdisks.Create(t.Context(), "default/kept", 1<<20); err != nil {
		t.Fatal(err)
	}
	b.stop()
	b = openBox(t, b.dir, lost.Volume.ID)
	if _, _, err := b.volumes.Open(t.Context(), lost.Volume.ID); !errors.Is(err, ErrLost) || b.volumes.Lost() != 1 {
		t.Errorf("lost volume: %v, %d are lost", err, b.volumes.Lost())
	}
	if _, known := b.driver.Stat(lost.Volume.ID); known {
		t.Error("the engine began it again")
	}
	if _, release, err := b.nbd.Open(t.Context(), "default/kept", nbd.Peer{Local: true}); err != nil {
		t.Errorf("another volume: %v", err)
	} else {
		release()
	}
	if err := b.vdisks.Delete(t.Context(), "default/lost", false); err != nil || b.volumes.Lost() != 0 {
		t.Errorf("giving it up: %v, %d are lost", err, b.volumes.Lost())
	}
}

func TestOpenAgainstDeleteLeavesNoEngineState(t *testing.T) {
	b := openBox(t, t.TempDir())
	var ids []uuid.UUID
	var wg sync.WaitGroup
	for i := range 24 {
		name := fmt.Sprintf("default/d%d", i)
		d, err := b.vdisks.Create(t.Context(), name, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, d.Volume.ID)
		for range 3 {
			wg.Go(func() {
				v, release, err := b.volumes.Open(t.Context(), d.Volume.ID)
				if errors.Is(err, state.ErrNotFound) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				defer release()
				if err := v.Write(t.Context(), make([]byte, 4096), 0, 0); err != nil && !errors.Is(err, blockio.ErrClosed) {
					t.Error(err)
				}
			})
		}
		wg.Go(func() {
			if err := b.vdisks.Delete(t.Context(), name, true); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	eventually(t, "every doomed volume is deleted", func() bool {
		doomed, _ := b.raft.State().Doomed()
		return len(doomed) == 0
	})
	for _, id := range ids {
		if _, known := b.driver.Stat(id); known {
			t.Errorf("the engine still knows deleted volume %s", id)
		}
		if _, _, err := b.volumes.Open(t.Context(), id); !errors.Is(err, state.ErrNotFound) {
			t.Errorf("opening deleted volume %s: %v", id, err)
		}
	}
}

func TestNBDShowsDisksToThoseWhoMayMount(t *testing.T) {
	b := openBox(t, t.TempDir())
	for _, name := range []string{"default/vm/root", "default/a"} {
		if _, err := b.vdisks.Create(t.Context(), name, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	b.file("notes.txt", nil)
	from := func(ip string) nbd.Peer { return nbd.Peer{Addr: &net.TCPAddr{IP: net.ParseIP(ip), Port: 1}} }
	names := func(p nbd.Peer) string {
		list, err := b.nbd.List(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(list)
	}
	const both = "[{default/a } {default/vm/root }]"
	for _, p := range []nbd.Peer{from("127.0.0.1"), from("::ffff:10.1.2.3"), {Local: true}} {
		if got := names(p); got != both {
			t.Errorf("%v sees %s", p, got)
		}
	}
	if got := names(from("8.8.8.8")); got != "[]" {
		t.Errorf("a stranger sees %s", got)
	}
	for name, p := range map[string]nbd.Peer{
		"default/a": from("8.8.8.8"), "default/none": from("127.0.0.1"), "a": from("127.0.0.1"), "": from("127.0.0.1"),
		"default/notes.txt": from("127.0.0.1"), "other/a": from("127.0.0.1"), "default/vm": from("127.0.0.1"),
	} {
		if _, _, err := b.nbd.Open(t.Context(), name, p); !errors.Is(err, nbd.ErrUnknownExport) {
			t.Errorf("open %q by %v: %v", name, p.Addr, err)
		}
	}
	d, release, err := b.nbd.Open(t.Context(), "default/vm/root", from("127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Write(t.Context(), []byte("boot"), 0, blockio.FUA); err != nil {
		t.Fatal(err)
	}
	got, err := b.vdisks.Get(t.Context(), "default/vm/root")
	if err != nil || got.Clients != 1 {
		t.Errorf("attached: %d clients, %v", got.Clients, err)
	}
	if err := b.vdisks.Delete(t.Context(), "default/vm/root", false); !errors.Is(err, state.ErrConflict) {
		t.Errorf("deleting an attached disk: %v", err)
	}
	release()
	if err := b.vdisks.Delete(t.Context(), "default/vm/root", false); err != nil {
		t.Errorf("deleting it after the client left: %v", err)
	}
}

func TestOneDiskOverBothGateways(t *testing.T) {
	b := openBox(t, t.TempDir())
	a := b.file("shared.raw", pointer(int64(1<<20)))
	b.write(a.Inode, []byte("from nfs"), 4090)
	d, release, err := b.nbd.Open(t.Context(), "default/shared", nbd.Peer{Local: true})
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	p := make([]byte, 8)
	if err := d.Read(t.Context(), p, 4090); err != nil || string(p) != "from nfs" {
		t.Errorf("over NBD: %q %v", p, err)
	}
	before := b.attr(a.Inode)
	if err := d.Write(t.Context(), []byte("from nbd"), 4090, 0); err != nil {
		t.Fatal(err)
	}
	f, done, err := b.nfs.Open(t.Context(), b.fsid(), a.Inode)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	if err := f.Read(t.Context(), p, 4090); err != nil || string(p) != "from nbd" {
		t.Errorf("over NFS: %q %v", p, err)
	}
	if after := b.attr(a.Inode); !after.Mtime.After(before.Mtime) {
		t.Errorf("a write over NBD leaves mtime at %s", after.Mtime)
	}
	if e, err := b.vdisks.Explain(t.Context(), "default/shared", 4096); err != nil || e.State != "log" || e.LBA != 1 || e.Seq == 0 {
		t.Errorf("explain: %+v %v", e, err)
	}
}

func TestSpaceIsThatOfTheBackend(t *testing.T) {
	b := openBox(t, t.TempDir())
	total, free, avail, files, ffree, err := b.nfs.Space(t.Context(), b.fsid())
	if err != nil || total == 0 || free > total || avail > free || files != state.InodesMax || ffree != files-1 {
		t.Errorf("space %d %d %d, files %d %d, %v", total, free, avail, files, ffree, err)
	}
	if _, _, _, _, _, err := b.nfs.Space(t.Context(), 12345); !errors.Is(err, nfs.ErrStale) {
		t.Errorf("space of an unknown vPool: %v", err)
	}
}

// TestBackendAway: a store without the vPool's claim is not used, and keeps nobody from starting.
func TestBackendAway(t *testing.T) {
	ctx := context.Background()
	d, err := volumedriver.Open(volumedriver.Config{FS: vfs.NewMem(1), Dir: "/d", LogBytes: 16 << 20, SegmentBytes: 4 << 20, NoPrewrite: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	away := errors.New("not mounted")
	p := NewPools(d, func(state.Backend, vpool.Keys) (backend.Backend, error) { return nil, away }, nil, nil, slog.New(slog.DiscardHandler))
	defer p.Close()
	pool := state.VPool{ID: uuid.New(), Name: "fast"}
	if err := p.AddPool(ctx, pool); err != nil {
		t.Fatalf("a backend that is away stops the start: %v", err)
	}
	if h := d.PoolHealth(pool.ID); h.Err == "" {
		t.Error("the vPool's state does not say that its backend is away")
	}
	p.open = func(state.Backend, vpool.Keys) (backend.Backend, error) { return backendtest.NewMem(), nil }
	if err := p.AddPool(ctx, pool); err != nil {
		t.Fatal(err)
	}
	if h := d.PoolHealth(pool.ID); h.Err != "" {
		t.Errorf("the backend is back, yet %q", h.Err)
	}
}
