package vmachine

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/control/enginetest"
	"varve/control/node"
	"varve/control/state"
	"varve/control/vdisk"
	"varve/control/vpool"
)

// memory keeps files' bytes; it is what exports.Engine is to the appliance.
type memory struct {
	mu    sync.Mutex
	files map[uuid.UUID][]byte
	times map[uuid.UUID]time.Time
	clock time.Time
	reads int
}

func (m *memory) Stat(id uuid.UUID) (int64, time.Time, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.files[id]
	return int64(len(b)), m.times[id], ok
}

func (m *memory) Read(_ context.Context, v state.Volume, most int64) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reads++
	if int64(len(m.files[v.ID])) > most {
		return nil, errors.New("too long")
	}
	return slices.Clone(m.files[v.ID]), nil
}

func (m *memory) Write(_ context.Context, v state.Volume, b []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.clock = m.clock.Add(time.Second)
	m.files[v.ID], m.times[v.ID] = slices.Clone(b), m.clock
	return nil
}

// world is a controller over a store in memory.
type world struct {
	*testing.T
	log    *enginetest.Log
	engine *enginetest.Engine
	files  *memory
	disks  *vdisk.Controller
	c      *Controller
	pool   state.VPool
	self   uuid.UUID
	now    time.Time
	events []string
	power  string
}

func newWorld(t *testing.T) *world {
	w := &world{T: t, log: enginetest.NewLog(), engine: &enginetest.Engine{}, self: uuid.New(), now: time.Unix(1e9, 0),
		files: &memory{files: make(map[uuid.UUID][]byte), times: make(map[uuid.UUID]time.Time), clock: time.Unix(1e9, 0)}}
	pools := vpool.New(vpool.Config{Raft: w.log, Store: w.log.Store, Engine: w.engine})
	for _, name := range []string{"default", "other"} {
		if _, err := pools.Create(t.Context(), vpool.Spec{Name: name, Backend: "local:///" + name}); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if w.pool, err = w.log.Store.View().VPool("default"); err != nil {
		t.Fatal(err)
	}
	w.node(w.self, "n1")
	w.disks = vdisk.New(vdisk.Config{Raft: w.log, Store: w.log.Store, Engine: w.engine})
	w.c = New(Config{Raft: w.log, Store: w.log.Store, Disks: w.disks, Files: w.files, Node: w.self,
		Emit:  func(typ, _, _ string, _ any) { w.events = append(w.events, typ) },
		Power: func(context.Context, state.VMachine) (string, bool) { return w.power, w.power != "" }})
	return w
}

func (w *world) node(id uuid.UUID, name string) {
	w.Helper()
	w.must(node.New(w.log, w.log.Store, id).Register(w.Context(), state.NodeSpec{Name: name, Role: state.RoleMaster, Version: "test"}))
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// put writes a file as an NFS client does, and makes it this node's.
func (w *world) put(file, text string) state.Inode {
	w.Helper()
	dir := path.Dir(file)
	parent := uint64(state.RootIno)
	if dir != "/" {
		_, err := w.log.Apply(w.Context(), &state.CreateInode{FSID: w.pool.FSID, Parent: state.RootIno, Name: dir[1:], Kind: state.Dir, How: state.Guarded, Mode: 0o755})
		if err != nil && !errors.Is(err, state.ErrExist) {
			w.Fatal(err)
		}
		d, err := w.log.Store.View().Resolve(w.pool.FSID, dir)
		w.must(err)
		parent = d.Ino
	}
	res, err := w.log.Apply(w.Context(), &state.CreateInode{FSID: w.pool.FSID, Parent: parent, Name: path.Base(file), Kind: state.File, How: state.Unchecked,
		Mode: 0o644, Volume: uuid.New()})
	w.must(err)
	n, err := w.log.Store.View().Inode(w.pool.FSID, res.Ino)
	w.must(err)
	w.own()
	vol, err := w.log.Store.View().Volume(n.Volume)
	w.must(err)
	w.must(w.files.Write(w.Context(), vol, []byte(text)))
	return n
}

// own activates every volume here.
func (w *world) own() {
	for _, v := range w.log.Store.View().VolumesOf(w.pool.FSID) {
		if v.Owner != w.self {
			_, err := w.log.Apply(w.Context(), &state.ActivateVolume{Volume: v.ID, Node: w.self, Epoch: v.Epoch})
			w.must(err)
		}
	}
}

// pass lets time pass, in rounds of a second.
func (w *world) pass(seconds int) {
	for range seconds {
		w.now = w.now.Add(time.Second)
		w.own()
		w.c.round(w.Context(), w.c.files(w.log.Store.View()), w.now)
	}
}

func (w *world) get(name string) VMachine {
	w.Helper()
	m, err := w.c.Get(w.Context(), name)
	w.must(err)
	return m
}

func (w *world) rename(from, to string) {
	w.Helper()
	v := w.log.Store.View()
	a, err := v.Resolve(w.pool.FSID, path.Dir(from))
	w.must(err)
	b, err := v.Resolve(w.pool.FSID, path.Dir(to))
	w.must(err)
	_, err = w.log.Apply(w.Context(), &state.Rename{FSID: w.pool.FSID, FromDir: a.Ino, From: path.Base(from), ToDir: b.Ino, To: path.Base(to)})
	w.must(err)
}

const vmx = `config.version = "8"
displayName = "%s"
guestOS = "debian12-64"
memSize = "1024"
uuid.bios = "56 4d 9b 2a 51 1e 0f 7e-1c d0 11 22 33 44 55 66"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "web.vmdk"
scsi0:1.present = "TRUE"
scsi0:1.fileName = "/vmfs/volumes/default/web/data.vmdk"
`

func descriptor(flat string) string {
	return "# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW 2048 VMFS \"" + flat + "\"\n"
}

// web makes a VM of two disks as ESXi does.
func (w *world) web() VMachine {
	w.Helper()
	for _, d := range []string{"web", "data"} {
		if _, err := w.disks.Create(w.Context(), "default/web/"+d+"-flat.vmdk", 1<<20); err != nil {
			w.Fatal(err)
		}
		w.put("/web/"+d+".vmdk", descriptor(d+"-flat.vmdk"))
	}
	w.put("/web/web.vmx", fmt.Sprintf(vmx, "Web"))
	w.pass(4)
	return w.get("Web")
}

func diskNames(m VMachine) string { return strings.Join(m.names(), " ") }

func TestFoundAndFollowed(t *testing.T) {
	w := newWorld(t)
	m := w.web()
	if diskNames(m) != "default/web/web default/web/data" || m.Config != "default/web/web.vmx" || m.Memory != 1<<30 || len(m.Sources) != 3 || m.Problem != "" {
		t.Fatalf("%+v", m)
	}
	id, reads := m.ID, w.files.reads
	w.pass(60)
	if w.files.reads != reads {
		t.Errorf("a file that did not change was read %d times more", w.files.reads-reads)
	}

	w.put("/web/web.vmx~", fmt.Sprintf(vmx, "Web 2"))
	w.rename("/web/web.vmx~", "/web/web.vmx")
	w.pass(20)
	if m = w.get("Web 2"); m.ID != id {
		t.Errorf("a new file in the place of the old one made VM %s of %s", m.ID, id)
	}
	w.rename("/web", "/site")
	w.pass(20)
	if m = w.get("Web 2"); m.ID != id || m.Config != "default/site/web.vmx" || diskNames(m) != "default/site/web default/site/data" {
		t.Errorf("after the directory was renamed: %s %+v", diskNames(m), m.VMachine)
	}
	w.put("/site/web.vmx", "half a fi")
	w.pass(4)
	if m = w.get("Web 2"); m.Problem == "" || diskNames(m) != "default/site/web default/site/data" {
		t.Errorf("after its file was damaged: %+v", m.VMachine)
	}
	w.put("/site/web.vmx", strings.Replace(fmt.Sprintf(vmx, "Web 3"), `scsi0:1.present = "TRUE"`, `scsi0:1.present = "FALSE"`, 1))
	w.pass(4)
	if m = w.get("Web 3"); m.Problem != "" || diskNames(m) != "default/site/web" {
		t.Errorf("after a disk was detached: %+v", m.VMachine)
	}
	w.must(w.c.remove(t.Context(), w.pool.FSID, "/site/web.vmx", 0))
	w.pass(5)
	w.get("Web 3")
	w.pass(10)
	if _, err := w.c.Get(t.Context(), "Web 3"); !errors.Is(err, state.ErrNotFound) {
		t.Errorf("a VM without its file: %v", err)
	}
	if got := w.types(); got != "vmachine_create vmachine_rename vmachine_rename vmachine_disks vmachine_delete" &&
		got != "vmachine_create vmachine_rename vmachine_rename vmachine_delete" {
		t.Errorf("events: %s", got)
	}
}

// types lists the events of the state about VMs.
func (w *world) types() string {
	var out []string
	for _, e := range w.log.Store.View().Events(0, 10_000) {
		if e.Topic == "vmachine" {
			out = append(out, e.Type)
		}
	}
	return strings.Join(out, " ")
}

// What is not quiet, no VM, another node's, or hidden is left alone.
func TestNotFound(t *testing.T) {
	w := newWorld(t)
	w.put("/pool.xml", "<pool/>")
	w.put("/notes.vmx", "remember the milk\n")
	w.put("/.hidden.vmx", fmt.Sprintf(vmx, "x"))
	w.put("/vm.vmx.bak", fmt.Sprintf(vmx, "x"))
	w.put("/long.xml", "<domain>"+strings.Repeat(" ", 1<<20)+"</domain>")
	w.pass(5)
	foreign := w.put("/foreign.vmx", fmt.Sprintf(vmx, "foreign"))
	vol, err := w.log.Store.View().Volume(foreign.Volume)
	w.must(err)
	n2 := uuid.New()
	w.node(n2, "n2")
	_, err = w.log.Apply(t.Context(), &state.ActivateVolume{Volume: vol.ID, Node: n2, Epoch: vol.Epoch})
	w.must(err)
	for i := range 10 {
		w.now = w.now.Add(time.Second)
		w.c.round(t.Context(), w.c.files(w.log.Store.View()), w.now)
		busy, err := w.log.Store.View().Resolve(w.pool.FSID, "/busy.vmx")
		if err == nil {
			v, _ := w.log.Store.View().Volume(busy.Volume)
			w.must(w.files.Write(t.Context(), v, []byte(fmt.Sprintf(vmx, fmt.Sprint("busy", i)))))
		}
	}
	if all := w.c.List(t.Context()); len(all) != 0 {
		t.Errorf("%+v", all)
	}
}

// A path that could mean another VM's disk means none.
func TestPathsThatCount(t *testing.T) {
	w := newWorld(t)
	for _, d := range []string{"a/disk", "b/disk", "disk"} {
		if _, err := w.disks.Create(t.Context(), "default/"+d, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.disks.Create(t.Context(), "other/x", 1<<20); err != nil {
		t.Fatal(err)
	}
	w.own()
	other, err := w.log.Store.View().VPool("other")
	w.must(err)
	hv := uuid.New()
	_, err = w.log.Apply(t.Context(), &state.SetPMachine{ID: hv, Create: true, Name: "kvm", Spec: state.PMachineSpec{Kind: state.KindLibvirt, Address: "x"}})
	w.must(err)
	_, err = w.log.Apply(t.Context(), &state.ReportPMachine{ID: hv, Mounts: []state.PMachineMount{{Pool: other.ID, Name: "pool-o", Path: "/srv/o"}}})
	w.must(err)
	for i, c := range []struct{ source, want string }{
		{`type='file'|file='/mnt/default/a/disk.raw'`, "default/a/disk"},
		{`type='file'|file='/mnt/pve/default/b/disk.raw'`, "default/b/disk"},
		{`type='file'|file='/var/lib/libvirt/images/disk.raw'`, ""},
		{`type='file'|file='/var/lib/libvirt/images/b/disk.raw'`, ""},
		{`type='file'|file='/anywhere/a/disk.raw'`, "default/a/disk"}, // beside the file that says so
		{`type='file'|file='disk.raw'`, "default/a/disk"},
		{`type='file'|file='../b/disk.raw'`, ""},
		{`type='file'|file='/mnt/other/x.raw'`, ""},
		{`type='file'|file='/srv/o/x.raw'`, "other/x"},
		{`type='file'|file='/srv/o/../default/disk.raw'`, "default/disk"},
		{`type='volume'|pool='pool-o' volume='x.raw'`, "other/x"},
		{`type='volume'|pool='default' volume='disk.raw'`, ""}, // libvirt's own pool is called so
		{`type='network'|protocol='nbd' name='default/b/disk'`, "default/b/disk"},
		{`type='network'|protocol='rbd' name='default/b/disk'`, ""},
		{`type='block'|dev='/dev/sda'`, ""},
		{`type='file'|file=''`, ""},
	} {
		kind, source, _ := strings.Cut(c.source, "|")
		w.put("/a/vm.xml", fmt.Sprintf("<domain><name>vm%d</name><devices><disk %s><source %s/><target dev='vda'/></disk></devices></domain>", i, kind, source))
		w.pass(4)
		if got := diskNames(w.get(fmt.Sprint("vm", i))); got != c.want {
			t.Errorf("%s is %q, want %q", c.source, got, c.want)
		}
	}
}

func TestGroup(t *testing.T) {
	w := newWorld(t)
	m := w.web()
	s, err := w.c.Snapshot(t.Context(), "Web", vdisk.SnapshotSpec{Name: "one", Consistent: true}, false)
	w.must(err)
	if s.Disks != 2 || !s.Complete() || s.Name != "one" || !s.Consistent {
		t.Fatalf("%+v", s)
	}
	w.power = state.PowerRunning
	if _, err := w.c.Rollback(t.Context(), "Web", "one", false, func(int, int) {}); !errors.Is(err, state.ErrConflict) {
		t.Errorf("rollback of a running VM: %v", err)
	}
	w.power = state.PowerHalted
	saved, err := w.c.Rollback(t.Context(), "Web", "one", false, func(int, int) {})
	w.must(err)
	all, err := w.c.Snapshots(t.Context(), "Web")
	w.must(err)
	if len(all) != 2 || all[1].Name != saved || all[1].Disks != 2 || !all[1].Automatic {
		t.Errorf("snapshots after the rollback: %+v", all)
	}
	w.engine.SetClients(m.Disks[1].Volume, 1)
	if _, err := w.c.Rollback(t.Context(), "Web", "one", false, func(int, int) {}); !errors.Is(err, state.ErrConflict) {
		t.Errorf("rollback of a VM whose disk is open: %v", err)
	}
	w.engine.SetClients(m.Disks[1].Volume, 0)
	w.must(w.c.DeleteSnapshot(t.Context(), "Web", saved, false))
	if all, err = w.c.Snapshots(t.Context(), "Web"); err != nil || len(all) != 1 {
		t.Errorf("%+v %v", all, err)
	}
	if strings.Join(w.events, " ") != "vmachine_snapshot vmachine_snapshot vmachine_rollback vmachine_snapshot_delete" {
		t.Errorf("events: %v", w.events)
	}
}

// A disk that cannot be rolled back takes the others back to what they were.
func TestRollbackIsWholeOrNot(t *testing.T) {
	w := newWorld(t)
	m := w.web()
	_, err := w.c.Snapshot(t.Context(), "Web", vdisk.SnapshotSpec{Name: "one"}, false)
	w.must(err)
	// The second disk's member is gone by the time its turn comes: the engine refuses.
	_, s, err := w.c.GetSnapshot(t.Context(), "Web", "one")
	w.must(err)
	w.must(w.disks.DeleteSnapshot(t.Context(), "default/web/data", s.members[m.Disks[1].Volume].ID.String(), true))
	if _, err := w.c.Rollback(t.Context(), "Web", "one", false, func(int, int) {}); !errors.Is(err, state.ErrConflict) {
		t.Errorf("rollback to half a snapshot: %v", err)
	}
	_, err = w.c.Snapshot(t.Context(), "Web", vdisk.SnapshotSpec{Name: "two"}, false)
	w.must(err)
	done := 0
	_, err = w.c.Rollback(t.Context(), "Web", "two", false, func(n, _ int) {
		done = n
		w.engine.Fail("Rollback", errors.New("the backend is away"))
	})
	if err == nil || done != 1 {
		t.Fatalf("%v after %d disks", err, done)
	}
	if !strings.Contains(err.Error(), "stays at the older snapshot") {
		t.Errorf("what could not be taken back is not told: %v", err)
	}
}

func TestLayered(t *testing.T) {
	w := newWorld(t)
	w.web()
	w.put("/web/web-000001.vmdk", "# Disk DescriptorFile\nparentFileNameHint=\"web.vmdk\"\nRW 2048 VMFSSPARSE \"web-000001-delta.vmdk\"\n")
	w.put("/web/web.vmx", strings.Replace(fmt.Sprintf(vmx, "Web"), `"web.vmdk"`, `"web-000001.vmdk"`, 1))
	w.pass(4)
	m := w.get("Web")
	if !m.Layered || diskNames(m) != "default/web/web default/web/data" {
		t.Fatalf("%s %+v", diskNames(m), m.VMachine)
	}
	if _, err := w.c.Snapshot(t.Context(), "Web", vdisk.SnapshotSpec{}, true); !errors.Is(err, state.ErrConflict) {
		t.Errorf("snapshot of a VM that runs on its hypervisor's snapshots: %v", err)
	}
	// A chain that bites its tail ends.
	w.put("/web/web-000001.vmdk", "# Disk DescriptorFile\nparentFileNameHint=\"web-000001.vmdk\"\n")
	w.pass(30)
	if m := w.get("Web"); diskNames(m) != "default/web/data" {
		t.Errorf("%s", diskNames(m))
	}
}

func TestCloneAndDelete(t *testing.T) {
	w := newWorld(t)
	m := w.web()
	spec := CloneSpec{VMachine: m.ID, Names: []string{"copy 1", "copy2"}}
	_, err := w.c.CanClone(t.Context(), spec)
	w.must(err)
	made, err := w.c.clone(t.Context(), spec, "for-clones-x", func(int, int) {})
	w.must(err)
	w.own()
	if len(made) != 2 {
		t.Fatal(made)
	}
	c := w.get("copy 1")
	if c.ID != made[0] || diskNames(c) != "default/copy 1/copy 1 default/copy 1/copy 1_1" || c.Config != "default/copy 1/copy 1.vmx" || c.UUID == m.UUID {
		t.Fatalf("%s %+v", diskNames(c), c.VMachine)
	}
	again, err := w.c.clone(t.Context(), spec, "for-clones-x", func(int, int) {})
	if err != nil || !slices.Equal(again, made) {
		t.Errorf("a second delivery made %v: %v", again, err)
	}
	if _, err := w.c.CanClone(t.Context(), spec); !errors.Is(err, state.ErrExist) {
		t.Errorf("clone to a name that is taken: %v", err)
	}
	for _, bad := range []string{"", "../x", "a/b", ".x", "x\n", strings.Repeat("x", 200), "x "} {
		if _, err := w.c.CanClone(t.Context(), CloneSpec{VMachine: m.ID, Names: []string{bad}}); !errors.Is(err, state.ErrInvalid) {
			t.Errorf("clone to %q: %v", bad, err)
		}
	}

	// One that fails leaves nothing.
	w.engine.Fail("Clone", errors.New("no room"))
	if _, err := w.c.clone(t.Context(), CloneSpec{VMachine: m.ID, Names: []string{"copy3"}}, "for-clones-y", func(int, int) {}); err == nil {
		t.Error("a clone that the engine refused")
	}
	w.engine.Fail("Clone", nil)
	if _, err := w.log.Store.View().Resolve(w.pool.FSID, "/copy3/copy3-flat.vmdk"); !errors.Is(err, state.ErrNotFound) {
		t.Errorf("what is left of a clone that failed: %v", err)
	}

	w.put("/copy2/notes.txt", "keep me")
	for _, name := range []string{"copy 1", "copy2"} {
		w.must(w.c.Delete(t.Context(), DeleteSpec{VMachine: w.get(name).ID}, func(int, int) {}))
		if _, err := w.c.Get(t.Context(), name); !errors.Is(err, state.ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	v := w.log.Store.View()
	if _, err := v.Resolve(w.pool.FSID, "/copy 1"); !errors.Is(err, state.ErrNotFound) {
		t.Errorf("the directory of a deleted VM: %v", err)
	}
	if _, err := v.Resolve(w.pool.FSID, "/copy2/notes.txt"); err != nil {
		t.Errorf("somebody else's file: %v", err)
	}
	trash, err := w.disks.Trashed(t.Context(), "default")
	disks := 0
	var config state.Trashed
	for _, d := range trash {
		if state.IsDisk(d.Path) {
			disks++
		}
		if d.Path == "/copy2/copy2.vmx" {
			config = d
		}
	}
	if err != nil || disks != 4 {
		t.Errorf("%d disks in the trash: %v", disks, err)
	}
	// The files that described it went with the disks, and all of it comes back together.
	if config.ID == uuid.Nil {
		t.Fatalf("the file of copy2 is not in the trash: %+v", trash)
	}
	for _, d := range trash {
		if strings.HasPrefix(d.Path, "/copy2/") {
			if _, err := w.disks.Restore(t.Context(), d.ID, ""); err != nil {
				t.Errorf("restore %s: %v", d.Path, err)
			}
		}
	}
	w.pass(20)
	if back := w.get("copy2"); len(back.Disks) != 2 || back.Disks[0].Name == "" {
		t.Errorf("a VM that came back: %+v", back)
	}
	w.pass(20)
	if got := w.get("Web"); diskNames(got) != "default/web/web default/web/data" {
		t.Errorf("%+v", got)
	}
}

// A task that is tried again makes what is missing, and leaves alone what it has made before, which runs by now.
func TestRetriedCloneKeepsWhatIsUsed(t *testing.T) {
	w := newWorld(t)
	m := w.web()
	clone := func(names ...string) ([]uuid.UUID, error) {
		return w.c.clone(t.Context(), CloneSpec{VMachine: m.ID, Names: names}, "for-clones-x", func(int, int) {})
	}
	made, err := clone("one")
	w.must(err)
	w.own()
	v := w.log.Store.View()
	n, err := v.Resolve(w.pool.FSID, "/one/one.vmx")
	w.must(err)
	vol, err := v.Volume(n.Volume)
	w.must(err)
	text, err := w.files.Read(t.Context(), vol, 1<<20)
	w.must(err)
	config := string(text)
	w.put("/one/one.vmx", config+"tools.syncTime = \"TRUE\"\n") // as a hypervisor does when it runs the VM
	again, err := clone("one", "two")
	if err != nil || len(again) != 2 || again[0] != made[0] {
		t.Fatal(again, err)
	}
	w.own()
	if got := diskNames(w.get("one")); got != "default/one/one default/one/one_1" {
		t.Errorf("the disks of the first: %s", got)
	}
	// Its own data, and an id that the hypervisor gave: known by the disk that is left.
	d, err := w.disks.Get(t.Context(), "default/one/one")
	w.must(err)
	w.must(w.disks.Flatten(t.Context(), "default/one/one", func(_, _ int64) {}))
	w.put("/one/one.vmx", strings.Replace(config, "uuid.bios", "uuid.was", 1))
	if again, err = clone("one"); err != nil || again[0] != made[0] {
		t.Error(again, err)
	}
	w.pass(30) // its new id is known
	// Nothing of it is known any more: refused, and nothing is deleted.
	w.must(w.disks.Flatten(t.Context(), "default/one/one_1", func(_, _ int64) {}))
	if _, err = clone("one"); !errors.Is(err, state.ErrExist) {
		t.Error(err)
	}
	if have, err := w.disks.Get(t.Context(), "default/one/one"); err != nil || have.Volume.ID != d.Volume.ID {
		t.Error(have, err)
	}
}

func TestTemplate(t *testing.T) {
	w := newWorld(t)
	m := w.web()
	w.power = state.PowerRunning
	if _, err := w.c.SetTemplate(t.Context(), "Web", true, false); !errors.Is(err, state.ErrConflict) {
		t.Errorf("template of a running VM: %v", err)
	}
	w.power = ""
	got, err := w.c.SetTemplate(t.Context(), "Web", true, false)
	if err != nil || !got.Template || !got.Disks[0].Info.Template || !got.Disks[1].Info.Template {
		t.Fatalf("%+v %v", got, err)
	}
	made, err := w.c.clone(t.Context(), CloneSpec{VMachine: m.ID, Names: []string{"n1"}}, "for-clones-z", func(int, int) {})
	if err != nil || len(made) != 1 || w.get("n1").Template {
		t.Fatal(made, err)
	}
}

// Run is stopped by its context, and finds what is written while it runs.
func TestRun(t *testing.T) {
	w := newWorld(t)
	w.c = New(Config{Raft: w.log, Store: w.log.Store, Disks: w.disks, Files: w.files, Node: w.self, Quiet: 10 * time.Millisecond})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.c.Run(ctx) }()
	w.put("/vm.vmx", fmt.Sprintf(vmx, "late"))
	deadline := time.Now().Add(time.Minute)
	for len(w.c.List(ctx)) == 0 {
		if time.Now().After(deadline) {
			t.Fatal("not found in a minute")
		}
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	w.must(<-done)
}
