//go:build planted

// Package planted puts known bugs into the product, one at a time, and asks that the test which is there to catch each
// does so. A bug is a change of some source text; it reaches the compiler as an overlay, so the tree itself stays as it
// is. A change that no longer fits the source, or does not compile, fails here: the table has to follow the code.
//
//	VARVE_PLANTED=regexp runs some of them.
package planted

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"varve/test/harness"
)

// edit replaces text that occurs exactly once in a file.
type edit struct{ file, old, new string }

type bug struct {
	name   string
	edits  []edit
	pkg    string
	caught string // regexp of the tests that catch it
	within string // regexp of the subtests of those; empty for all
	env    []string
}

var crashPoints = []string{"VARVE_CRASH_POINTS=3000"}

// programs picks some of the exhaustive test's, each of which loses power before every call of the file system.
func programs(names string) []string { return []string{"VARVE_PROGRAMS=^(" + names + ")$"} }

func familyOps(n int) []string { return []string{fmt.Sprintf("VARVE_FAMILY_OPS=%d", n)} }

var bugs = []bug{
	{
		name: "ack before fsync: a write with FUA is answered when it is written",
		edits: []edit{
			{"volumedriver/writelog/commit.go", "if w := &b.waiters[i]; !w.sync {", "if w := &b.waiters[i]; true {"},
			{"volumedriver/writelog/sync.go", "if b.waiters[i].sync {", "if false {"},
		},
		pkg: "./volumedriver/writelog", caught: "TestPowerCutAtEveryCall|TestSyncRequestEndsWhenDurable",
	},
	{
		name:  "ack without fsync: the log's sync does nothing",
		edits: []edit{{"volumedriver/writelog/sync.go", "err := s.file.Datasync()", "var err error"}},
		pkg:   "./volumedriver", caught: "TestCrashPoints", env: crashPoints,
	},
	{
		name: "skipped directory sync: a new log segment's name is not durable",
		edits: []edit{{"volumedriver/writelog/space.go", "if err = l.cfg.FS.SyncDir(l.cfg.Dir); err != nil {",
			"if err = error(nil); err != nil {"}},
		pkg: "./volumedriver/writelog", caught: "TestPowerCutAtEveryCall",
	},
	{
		name: "skipped directory sync: an object's name is not durable when Put returns",
		edits: []edit{{"volumedriver/backend/local/directory.go", "s.fs.SyncDir(path.Join(s.objects, rel))",
			"func(string) error { return nil }(path.Join(s.objects, rel))"}},
		pkg: "./volumedriver/backend/local", caught: "TestPowerCutAtEveryCall",
	},
	{
		name: "retried fsync: a failed sync of the log is tried again, and believed",
		edits: []edit{{"volumedriver/writelog/sync.go", "err := s.file.Datasync()",
			"err := s.file.Datasync()\n\tif err != nil {\n\t\terr = s.file.Datasync()\n\t}"}},
		pkg: "./volumedriver/writelog", caught: "TestFailedSyncIsNotTrustedAfterwards|TestEveryCallFailsOnce",
	},
	{
		name: "retried fsync: the volume driver goes on after a failed sync",
		edits: []edit{{"volumedriver/writelog/sync.go", "err := s.file.Datasync()",
			"err := s.file.Datasync()\n\tif err != nil {\n\t\terr = s.file.Datasync()\n\t}"}},
		pkg: "./volumedriver", caught: "TestFailedSync",
	},
	{
		name: "unchecked CRC: recovery takes a batch whose payload is torn",
		edits: []edit{{"volumedriver/writelog/scan.go", "if crc32.Checksum(block, castagnoli) != want {",
			"if false && crc32.Checksum(block, castagnoli) != want {"}},
		pkg: "./volumedriver/writelog", caught: "TestDamage|TestPowerCutAtEveryCall",
	},
	{
		name: "unchecked CRC: a block of an object is served as it was read",
		edits: []edit{{"volumedriver/objects.go", "return ok && at == lba && sco.Checksum(p) == crc",
			"return ok && at == lba && (true || sco.Checksum(p) == crc)"}},
		pkg: "./volumedriver", caught: "TestCorruptObject",
	},
	{
		name: "cache without CRC: a cell of the SSD tier is served as it was read",
		edits: []edit{{"volumedriver/cache/disk.go", "if crc32.Checksum(cell[:cellBytes-4], castagnoli) != binary.LittleEndian.Uint32(t[28:]) {",
			"if false && crc32.Checksum(cell[:cellBytes-4], castagnoli) != binary.LittleEndian.Uint32(t[28:]) {"}},
		pkg: "./volumedriver/cache", caught: "TestBitFlipsOnDiskGiveRightBytes",
	},
	{
		name: "cache that trusts its index: a cell is not asked whose it is",
		edits: []edit{{"volumedriver/cache/disk.go", "if objectHash(t[:16]) != h || binary.LittleEndian.Uint32(t[16:]) != line ||",
			"if objectHash(t[:16]) != h && false || binary.LittleEndian.Uint32(t[16:]) != line && false ||"}},
		pkg: "./volumedriver/cache", caught: "TestOldIndexCostsOnlyMisses|TestDiskThatLies",
	},
	{
		name: "unchecked CRC: a block of the log is served as it was read",
		edits: []edit{{"volumedriver/read.go", "if sco.Checksum(p[j*blockSize:(j+1)*blockSize]) != pl.at[i+j].crc {",
			"if false && sco.Checksum(p[j*blockSize:(j+1)*blockSize]) != pl.at[i+j].crc {"}},
		pkg: "./volumedriver", caught: "TestCorruptLog",
	},
	{
		name: "tail scan past a break: recovery looks for later batches behind a torn one and takes them",
		edits: []edit{{"volumedriver/writelog/scan.go", "if !ok || h.number != number || h.chain != s.chain {",
			`if !ok || h.number != number || h.chain != s.chain {
		for off := s.off + blockSize; !s.sealed && off+blockSize <= s.size; off += blockSize {
			if h, ok, err := s.header(off); err == nil && ok && h.number > s.number {
				s.off, s.number, s.chain = off, h.number-1, h.chain
				return s.next()
			}
		}`}},
		pkg: "./volumedriver/writelog", caught: "TestPowerCutAtEveryCall|TestDamage",
	},
	{
		name: "FLUSH of one connection only: a connection without writes of its own has nothing to flush",
		edits: []edit{
			{"gateway/nbd/transmission.go", "type conn struct {", "type conn struct {\n\tplanted bool"},
			{"gateway/nbd/requests.go", "func (c *conn) writeRequest(q request) (complete bool, err error) {",
				"func (c *conn) writeRequest(q request) (complete bool, err error) {\n\tc.planted = true"},
			{"gateway/nbd/requests.go", "func (c *conn) flushRequest(q request) error {",
				"func (c *conn) flushRequest(q request) error {\n\tif !c.planted {\n\t\tc.refuse(q, 0)\n\t\treturn nil\n\t}"},
		},
		pkg: "./gateway/nbd", caught: "TestFlushCoversEveryConnection",
	},
	{
		name: "FLUSH lie: a volume's flush is answered at once",
		edits: []edit{
			{"volumedriver/volume.go", "if v.d.wal.SyncAsync(v.lastBatch.Load(), c, tag) {", "if true {"},
			{"volumedriver/volume.go", "return v.d.wal.SyncInline(v.lastBatch.Load())", "return nil"},
		},
		pkg: "./test/powercut", caught: "TestWhatWasToldDurableSurvivesAPowerCut",
	},
	{
		name: "FUA ignored: an NBD write with FUA is submitted without",
		edits: []edit{{"gateway/nbd/requests.go", "if q.flags&cmdFlagFUA != 0 {",
			"if false {"}},
		pkg: "./test/powercut", caught: "TestWhatWasToldDurableSurvivesAPowerCut",
	},
	{
		name:  "FILE_SYNC lie: a stable WRITE is submitted without FUA and answered FILE_SYNC",
		edits: []edit{{"gateway/nfs/fileprocs.go", "return blockio.Extend | blockio.FUA", "return blockio.Extend"}},
		pkg:   "./gateway/nfs", caught: "TestStableWritesSurviveAPowerCut",
	},
	{
		name: "nonce reuse: an SCO that is built again, or compacted, takes the salt that it had",
		edits: []edit{{"volumedriver/sco/build.go", "if f.salt, err = seal.Salt(); err != nil {",
			"if f.salt, err = [seal.SaltBytes]byte{1}, nil; err != nil {"}},
		pkg: "./volumedriver/sco", caught: "TestNonceReuse",
	},
	{
		name: "nonce reuse: the frames of an SCO share a nonce",
		edits: []edit{{"volumedriver/sco/frame.go", "binary.LittleEndian.PutUint32(x.nonce[:], frame)",
			"binary.LittleEndian.PutUint32(x.nonce[:], 0)"}},
		pkg: "./volumedriver/sco", caught: "TestNonceReuse",
	},
	{
		name: "nonce reuse: a stretch of the log takes the keystream of another",
		edits: []edit{{"volumedriver/seal/log.go", "block, err := k.block(\"log\", salt, ",
			"block, err := k.block(\"log\", [SaltBytes]byte{}, "}},
		pkg: "./volumedriver/seal", caught: "TestLogCipher",
	},
	{
		name: "snapshot before flush: a snapshot is acknowledged with its mark written and not synced",
		edits: []edit{{"volumedriver/snapshot.go", "if err := m.v.Flush(ctx); err != nil {",
			"if err := error(nil); err != nil {"}},
		pkg: "./volumedriver", caught: "TestExhaustivePrograms", env: programs("snapshot, (write|template|clone)"),
	},
	{
		name: "snapshot before flush: a snapshot does not end an SCO, and has what was written after it",
		edits: []edit{{"volumedriver/destage.go", "if len(j.marks) > 0 && !snap || revert && records > 0 {",
			"if revert && records > 0 {"}},
		pkg: "./volumedriver", caught: "TestFamily", within: "^large-objects$", env: familyOps(1500),
	},
	{
		name: "freeze after root: the root says that the snapshot is in the map before its generation is frozen",
		edits: []edit{{"volumedriver/snapshot.go", "_, err = v.d.maps.Freeze(r.Handle, puts)",
			"if err = v.d.maps.Put(puts[:1], true); err == nil {\n\t\t_, err = v.d.maps.Freeze(r.Handle, puts[1:])\n\t}"}},
		pkg: "./volumedriver", caught: "TestExhaustivePrograms", env: programs("(write|overwrite|zero), snapshot|snapshot, .*"),
	},
	{
		name:  "scrub ignores a clone: of a line of generations only the head is walked, not what snapshots have given to clones",
		edits: []edit{{"volumedriver/scrub.go", "return v.line(h)", "_, from, err = v.line(h)\n\t\treturn nil, from, err"}},
		pkg:   "./volumedriver", caught: "TestExhaustivePrograms", env: programs("(clone|snapshot|overwrite), scrub"),
	},
	{
		name: "scrub ignores a clone: the mark asks the volume that wrote an SCO, and nobody else whose map names it",
		edits: []edit{{"volumedriver/scrub.go", "return s.Volume == writer }) {",
			"return s.Volume == writer }) || r.ID != writer {"}},
		pkg: "./volumedriver", caught: "TestMarkAsksClonesThemselves",
	},
	{
		name:  "rewind: the scrub takes what only the window still holds",
		edits: []edit{{"volumedriver/rewind.go", "return b[0].Seq, true, nil", "return b[0].Seq, false, nil"}},
		pkg:   "./volumedriver", caught: "TestRewind|TestExhaustivePrograms", env: programs("rewind, scrub|scrub, rewind"),
	},
	{
		name:  "rewind: an SCO holds records of two seconds",
		edits: []edit{{"volumedriver/destage.go", "if seconds && records > 0 &&", "if false && seconds && records > 0 &&"}},
		pkg:   "./volumedriver", caught: "TestRewind",
	},
	{
		name:  "forward table lost: the new places of what the scrub has moved are not durable when the old objects go",
		edits: []edit{{"volumedriver/scrub.go", "d.maps.Update(puts, nil); err", "d.maps.Put(puts, false); err"}},
		pkg:   "./volumedriver", caught: "TestExhaustivePrograms", env: programs("(overwrite|write|delete snapshot|zero), scrub|scrub, .*"),
	},
	{
		name: "forward table lost: the old object is deleted before the new place is stored",
		edits: []edit{{"volumedriver/scrub.go", "if err := d.maps.Update(puts, nil); err != nil {",
			`for _, s := range victims {
		if err := p.store.Delete(ctx, s.at.name(r.ID, s.seq)); err != nil {
			return err
		}
	}
	if err := d.maps.Update(puts, nil); err != nil {`}},
		pkg: "./volumedriver", caught: "TestExhaustivePrograms", env: programs("(overwrite|write|delete snapshot|zero), scrub"),
	},
	{
		name:  "deleted too early: a deleted snapshot's generation is given back while a rollback's branch needs it",
		edits: []edit{{"volumedriver/snapshot.go", "if b.Parent == h {", "if false && b.Parent == h {"}},
		pkg:   "./volumedriver", caught: "TestExhaustivePrograms", env: programs("rollback, delete snapshot"),
	},
	{
		name:  "deleted too early: a snapshot that the map is just freezing is taken for none",
		edits: []edit{{"volumedriver/snapshot.go", "v.storing.Lock() // over a freeze and the note of it\n\tdefer v.storing.Unlock()\n", ""}},
		pkg:   "./volumedriver", caught: "TestReleaseDuringFreeze",
	},
	{
		name: "deleted too early: a snapshot is deleted under its clones",
		edits: []edit{{"volumedriver/snapshot.go", "if n := v.d.clonesLocked()[id]; n > 0 {", "if n := v.d.clonesLocked()[id]; n > 1<<30 {"},
			{"volumedriver/snapshot.go", "if v.d.children[id] > 0 {", "if v.d.children[id] > 1<<30 {"}},
		pkg: "./volumedriver", caught: "TestExhaustivePrograms", env: programs("clone, delete snapshot"),
	},
	{
		name:  "promotion kept from the backend: a rebuild gives the snapshots back to the old parent",
		edits: []edit{{"volumedriver/snapshot.go", "o.Owns = append(o.Owns, sco.RootOwned{", "_ = append(o.Owns, sco.RootOwned{"}},
		pkg:   "./volumedriver", caught: "TestPromote",
	},
	{
		name:  "lineage by where maps lie: a head that was rolled back to what a rewind made descends from it",
		edits: []edit{{"volumedriver/promote.go", "!s.Base && !s.Rewound && (", "!s.Base && ("}},
		pkg:   "./volumedriver", caught: "TestRewindLineage",
	},
	{
		name:  "rebuild that keeps every head: what a rollback has left is never given back",
		edits: []edit{{"volumedriver/rebuild.go", "v.left = append(v.left, mapPoint{handle: r.Handle})", ""}},
		pkg:   "./volumedriver", caught: "TestRewindLineage",
	},
	{
		name:  "husk that is written to: a deleted volume that holds snapshots for others takes requests",
		edits: []edit{{"volumedriver/volume.go", "if v.closed || v.husk.Load() {", "if v.closed {"}},
		pkg:   "./volumedriver", caught: "TestPromote",
	},
	{
		name:  "promotion that copies the names: two owners of one snapshot",
		edits: []edit{{"volumedriver/snapshot.go", "if s.Seq != 0 && !s.Base && v.d.owned.owner(v.id, s.ID) == v.id {", "if s.Seq != 0 && !s.Base {"}},
		pkg:   "./volumedriver", caught: "TestPromote",
	},
	{
		name:  "rollback that keeps the head's map: the new line is forked, and the root still names the old one",
		edits: []edit{{"volumedriver/clone.go", "\t\tr.Handle = h\n", ""}},
		pkg:   "./volumedriver", caught: "TestExhaustivePrograms", env: programs("rollback"),
	},
	{
		name:  "map older than its log: what is below the floor is taken",
		edits: []edit{{"volumedriver/floor.go", "if d.floor.number < low {", "if false && d.floor.number < low {"}},
		pkg:   "./volumedriver", caught: "TestOlderMapIsRefused",
	},
}

func TestPlantedBugsAreCaught(t *testing.T) {
	only := regexp.MustCompile(os.Getenv("VARVE_PLANTED"))
	room := make(chan struct{}, runtime.NumCPU())
	for _, b := range bugs {
		if !only.MatchString(b.name) {
			continue
		}
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			room <- struct{}{}
			defer func() { <-room }()
			b.plant(t)
		})
	}
}

func (b bug) plant(t *testing.T) {
	root, dir := harness.Root(), t.TempDir()
	replace := map[string]string{}
	for i, e := range b.edits {
		path := filepath.Join(root, e.file)
		from := path
		if r := replace[path]; r != "" {
			from = r
		}
		text, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(text), e.old); n != 1 {
			t.Fatalf("%s holds the text to be changed %d times: the table has to follow the code: %s", e.file, n, e.old)
		}
		changed := filepath.Join(dir, fmt.Sprintf("%d.go", i))
		if err := os.WriteFile(changed, []byte(strings.Replace(string(text), e.old, e.new, 1)), 0o644); err != nil {
			t.Fatal(err)
		}
		replace[path] = changed
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	overlayFile, binary := filepath.Join(dir, "overlay.json"), filepath.Join(dir, "planted.test")
	if err := os.WriteFile(overlayFile, overlay, 0o644); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "test", "-c", "-overlay", overlayFile, "-o", binary, b.pkg)
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("the bug does not compile: %v\n%s", err, out)
	}
	run := exec.Command(binary, "-test.run=^("+b.caught+")$/"+b.within, "-test.timeout=90s", "-test.failfast")
	run.Dir = filepath.Join(root, b.pkg)
	run.Env = append(os.Environ(), b.env...)
	start := time.Now()
	out, err := run.CombinedOutput()
	if err == nil {
		t.Fatalf("NOT caught by %s in %s:\n%s", b.caught, b.pkg, out)
	}
	catcher := regexp.MustCompile(`(?m)^--- FAIL: (\w+)`).FindSubmatch(out)
	if catcher == nil {
		if len(out) > 3000 {
			out = out[:3000]
		}
		t.Fatalf("it failed without a failed test: %v\n%s", err, out)
	}
	harness.Show("%-95s caught by %s %s (%.1f s)", b.name, strings.TrimPrefix(b.pkg, "./"), catcher[1], time.Since(start).Seconds())
}
