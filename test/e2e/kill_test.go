//go:build e2e

package e2e

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"varve/test/harness"
	"varve/test/nbdclient"
	"varve/test/nfsclient"
)

const block = 4096

// fill writes what version seq of a block holds: a header that tells what it is, and bytes that follow from it.
// Version 0 is zeros: never written, or trimmed.
func fill(p []byte, owner, lba, seq uint64) {
	clear(p)
	if seq == 0 {
		return
	}
	var key [32]byte
	binary.LittleEndian.PutUint64(key[0:], owner)
	binary.LittleEndian.PutUint64(key[8:], lba)
	binary.LittleEndian.PutUint64(key[16:], seq)
	copy(p, key[:24])
	rand.NewChaCha8(key).Read(p[24:])
}

// describe tells from a block's bytes what it is.
func describe(p []byte) string {
	if len(bytes.TrimLeft(p, "\x00")) == 0 {
		return "zeros"
	}
	owner, lba, seq := binary.LittleEndian.Uint64(p), binary.LittleEndian.Uint64(p[8:]), binary.LittleEndian.Uint64(p[16:])
	want := make([]byte, len(p))
	fill(want, owner, lba, seq)
	if bytes.Equal(want, p) {
		return fmt.Sprintf("version %d of block %d of writer %d", seq, lba, owner)
	}
	return fmt.Sprintf("a torn or foreign block (header: version %d, block %d, writer %d)", seq, lba, owner)
}

// journal is one writer's record of what it asked and what was answered, block by block. A killed process loses nothing
// that it accepted, so after a restart each block must hold its last acknowledged version, or the one version that was
// in flight; the blocks of one write hold all its versions or none.
type journal struct {
	owner uint64
	base  uint64 // first block of the writer's own range

	mu     sync.Mutex
	acked  []uint64 // by block of the range
	flying []*operation
	seq    uint64

	writes, durable, flushes atomic.Int64
}

// operation is a write or trim of some blocks, all of which take version seq, or 0.
type operation struct {
	first, n int
	version  uint64
}

func newJournal(owner, base uint64, blocks int) *journal {
	return &journal{owner: owner, base: base, acked: make([]uint64, blocks), flying: make([]*operation, blocks)}
}

// begin chooses blocks with nothing in flight; nil if it hits others.
func (j *journal) begin(r *rand.Rand, blocksMax int, zero bool) *operation {
	j.mu.Lock()
	defer j.mu.Unlock()
	o := &operation{n: 1 + r.IntN(blocksMax)}
	o.first = r.IntN(len(j.acked) - o.n + 1)
	for i := o.first; i < o.first+o.n; i++ {
		if j.flying[i] != nil {
			return nil
		}
	}
	j.seq++
	if !zero {
		o.version = j.seq
	}
	for i := o.first; i < o.first+o.n; i++ {
		j.flying[i] = o
	}
	return o
}

// end notes the answer. An operation without one stays in flight until the check.
func (j *journal) end(o *operation, err error) {
	if err != nil {
		return
	}
	j.writes.Add(1)
	j.mu.Lock()
	defer j.mu.Unlock()
	for i := o.first; i < o.first+o.n; i++ {
		j.acked[i], j.flying[i] = o.version, nil
	}
}

func (j *journal) payload(o *operation) []byte {
	p := make([]byte, o.n*block)
	for i := range o.n {
		fill(p[i*block:(i+1)*block], j.owner, j.base+uint64(o.first+i), o.version)
	}
	return p
}

func (j *journal) offset(o *operation) int64 { return (int64(j.base) + int64(o.first)) * block }

// check reads the whole range and compares. What was in flight becomes what was found.
func (j *journal) check(read func(p []byte, off int64) error) (resolved int, err error) {
	const step = 64
	p, want := make([]byte, step*block), make([]byte, block)
	applied, missing := map[*operation]int{}, map[*operation]int{}
	for at := 0; at < len(j.acked); at += step {
		q := p[:min(step, len(j.acked)-at)*block]
		if err := read(q, (int64(j.base)+int64(at))*block); err != nil {
			return 0, fmt.Errorf("read after restart: %w", err)
		}
		for i := at; i < min(at+step, len(j.acked)); i++ {
			found := q[(i-at)*block : (i-at+1)*block]
			lba, o := j.base+uint64(i), j.flying[i]
			if o != nil && o.version != j.acked[i] { // a trim of zeros cannot be seen
				if fill(want, j.owner, lba, o.version); bytes.Equal(want, found) {
					applied[o]++
					j.acked[i] = o.version
					continue
				}
				missing[o]++
			}
			if fill(want, j.owner, lba, j.acked[i]); !bytes.Equal(want, found) {
				return 0, fmt.Errorf("writer %d, block %d: version %d was acknowledged, found %s", j.owner, lba, j.acked[i], describe(found))
			}
		}
	}
	for i, o := range j.flying {
		if o != nil && i == o.first {
			resolved++
			if applied[o] > 0 && missing[o] > 0 {
				return 0, fmt.Errorf("writer %d: %d of the %d blocks of version %d at %d are there: a write came apart",
					j.owner, applied[o], o.n, o.version, o.first)
			}
		}
		j.flying[i] = nil
	}
	return resolved, nil
}

// loadNBD keeps several requests in flight on one connection until it breaks: writes, some FUA, trims, zeroes, flushes.
func loadNBD(t *testing.T, j *journal, addr, export string, seed uint64) {
	c, err := nbdclient.Dial("tcp", addr, export)
	if err != nil {
		return // killed before it began
	}
	defer c.Close()
	r := rand.New(rand.NewPCG(seed, j.owner))
	room := make(chan struct{}, 16)
	for c.Err() == nil {
		room <- struct{}{}
		k := r.IntN(100)
		if k < 6 {
			c.Submit(nbdclient.Flush, 0, 0, 0, nil, func(err error) {
				<-room
				if err == nil {
					j.flushes.Add(1)
				} else if !errors.Is(err, nbdclient.ErrDisconnected) {
					t.Errorf("flush: %v", err)
				}
			})
			continue
		}
		o := j.begin(r, 8, k < 14)
		if o == nil {
			<-room
			continue
		}
		var flags uint16
		if r.IntN(5) == 0 {
			flags = nbdclient.FUA
		}
		done := func(err error) {
			j.end(o, err)
			if err == nil && flags != 0 {
				j.durable.Add(1)
			}
			if err != nil && !errors.Is(err, nbdclient.ErrDisconnected) {
				t.Errorf("request: %v", err)
			}
			<-room
		}
		switch {
		case k < 10:
			c.Submit(nbdclient.Trim, flags, j.offset(o), o.n*block, nil, done)
		case k < 14:
			c.Submit(nbdclient.WriteZeroes, flags, j.offset(o), o.n*block, nil, done)
		default:
			c.Submit(nbdclient.Write, flags, j.offset(o), 0, j.payload(o), done)
		}
	}
}

// loadNFS does the same over NFS: UNSTABLE and FILE_SYNC writes, COMMITs.
func loadNFS(t *testing.T, j *journal, addr, name string, seed uint64) {
	c, err := nfsclient.Dial(addr)
	if err != nil {
		return
	}
	defer c.Close()
	root, err := c.Mount("/default")
	if err != nil {
		return
	}
	h, err := c.Lookup(root, name)
	if err != nil {
		if !errors.Is(err, nfsclient.ErrDisconnected) {
			t.Errorf("lookup of %s: %v", name, err)
		}
		return
	}
	r := rand.New(rand.NewPCG(seed, j.owner))
	room := make(chan struct{}, 8)
	var broken atomic.Bool
	for !broken.Load() {
		room <- struct{}{}
		if r.IntN(100) < 8 {
			c.SubmitCommit(h, func(_ nfsclient.Written, err error) {
				if err == nil {
					j.flushes.Add(1)
				} else {
					broken.Store(true)
				}
				<-room
			})
			continue
		}
		o := j.begin(r, 8, false)
		if o == nil {
			<-room
			continue
		}
		stable := nfsclient.Unstable
		if r.IntN(3) == 0 {
			stable = nfsclient.FileSync
		}
		c.SubmitWrite(h, j.payload(o), j.offset(o), stable, func(_ nfsclient.Written, err error) {
			j.end(o, err)
			if err == nil && stable == nfsclient.FileSync {
				j.durable.Add(1)
			}
			if err != nil {
				broken.Store(true)
				if !errors.Is(err, nfsclient.ErrDisconnected) {
					t.Errorf("nfs write: %v", err)
				}
			}
			<-room
		})
	}
}

// names is the model of a directory under create, rename and remove, one call at a time.
type names struct {
	have   map[string]bool
	next   int
	flying func(have map[string]bool) // what the unanswered call would have done
	done   int
}

func (n *names) load(addr string, seed uint64) {
	c, err := nfsclient.Dial(addr)
	if err != nil {
		return
	}
	defer c.Close()
	root, err := c.Mount("/default")
	if err != nil {
		return
	}
	dir, err := c.Lookup(root, "names")
	if err != nil {
		return
	}
	r := rand.New(rand.NewPCG(seed, 77))
	for {
		var apply func(have map[string]bool)
		var call func() error
		old := ""
		if len(n.have) > 0 && r.IntN(100) < 60 {
			all := make([]string, 0, len(n.have))
			for name := range n.have {
				all = append(all, name)
			}
			slices.Sort(all)
			old = all[r.IntN(len(all))]
		}
		n.next++
		fresh := "f" + strconv.Itoa(n.next)
		switch {
		case old == "":
			apply = func(have map[string]bool) { have[fresh] = true }
			call = func() error { _, err := c.Create(dir, fresh, true); return err }
		case r.IntN(2) == 0:
			apply = func(have map[string]bool) { delete(have, old); have[fresh] = true }
			call = func() error { return c.Rename(dir, old, dir, fresh) }
		default:
			apply = func(have map[string]bool) { delete(have, old) }
			call = func() error { return c.Remove(dir, old) }
		}
		n.flying = apply
		if call() != nil {
			return
		}
		apply(n.have)
		n.flying = nil
		n.done++
	}
}

func (n *names) check(c *nfsclient.Client, root nfsclient.Handle) error {
	dir, err := c.Lookup(root, "names")
	if err != nil {
		return err
	}
	list, err := c.Names(dir)
	if err != nil {
		return err
	}
	found := map[string]bool{}
	for _, name := range list {
		found[name] = true
	}
	same := func(a, b map[string]bool) bool {
		if len(a) != len(b) {
			return false
		}
		for k := range a {
			if !b[k] {
				return false
			}
		}
		return true
	}
	ok := same(found, n.have)
	if !ok && n.flying != nil {
		n.flying(n.have)
		ok = same(found, n.have)
	}
	n.flying = nil
	if !ok {
		return fmt.Errorf("directory: acknowledged %d names, found %d, or others", len(n.have), len(found))
	}
	return nil
}

// TestKillUnderLoad kills the real process again and again while NBD and NFS clients write, also while it recovers, and
// asks after each restart for everything that was acknowledged.
func TestKillUnderLoad(t *testing.T) {
	kills := 50
	if v, err := strconv.Atoi(os.Getenv("VARVE_KILLS")); err == nil {
		kills = v
	}
	killLoop(t, func(done int, _ time.Duration) bool { return done < kills })
}

// killLoop kills a node under load as long as more says. args are further flags of the node.
func killLoop(t *testing.T, more func(kills int, elapsed time.Duration) bool, args ...string) {
	seed := uint64(time.Now().UnixNano())
	if v, err := strconv.ParseUint(os.Getenv("VARVE_SEED"), 10, 64); err == nil {
		seed = v
	}
	t.Logf("VARVE_SEED=%d", seed)
	// A small log, so that it wraps and its segments are destaged and reused while the process is killed.
	n := harness.StartNode(t, append([]string{"--log-size", "256MiB", "--log-level", "warn"}, args...)...)
	n.CreateDisk(t, "kill", "8GiB")
	c, root := mountNFS(t, n)
	for _, name := range []string{"kill2.raw", "plain.bin"} {
		h, err := c.Create(root, name, true)
		must(t, err)
		must(t, c.Truncate(h, 64<<20))
	}
	_, err := c.MkDir(root, "names")
	must(t, err)
	c.Close()

	const blocks = 1500
	nbd := []*journal{newJournal(1, 0, blocks), newJournal(2, 1<<20, blocks)}
	nfs := map[string]*journal{"kill2.raw": newJournal(3, 100, blocks), "plain.bin": newJournal(4, 2000, blocks)}
	tree := &names{have: map[string]bool{}}
	r := rand.New(rand.NewPCG(seed, 0))
	kills, inRecovery, unknown := 0, 0, 0
	var restarts []time.Duration
	begin := time.Now()
	for round := 0; more(kills, time.Since(begin)); round++ {
		var load sync.WaitGroup
		for _, j := range nbd {
			load.Go(func() { loadNBD(t, j, n.NBDAddr(), "default/kill", seed+uint64(round)) })
		}
		for name, j := range nfs {
			load.Go(func() { loadNFS(t, j, n.NFSAddr(), name, seed+uint64(round)) })
		}
		load.Go(func() { tree.load(n.NFSAddr(), seed+uint64(round)) })
		time.Sleep(time.Duration(50+r.IntN(450)) * time.Millisecond)
		n.Kill()
		kills++
		load.Wait()
		for r.IntN(4) == 0 {
			must(t, n.Launch())
			time.Sleep(time.Duration(r.IntN(150)) * time.Millisecond)
			n.Kill()
			kills++
			inRecovery++
		}
		start := time.Now()
		if err := n.Start(); err != nil {
			t.Fatalf("restart after kill %d: %v", kills, err)
		}
		restarts = append(restarts, time.Since(start))

		d, err := nbdclient.Dial("tcp", n.NBDAddr(), "default/kill")
		must(t, err)
		c, err := nfsclient.Dial(n.NFSAddr())
		must(t, err)
		root, err := c.Mount("/default")
		must(t, err)
		for _, j := range nbd {
			k, err := j.check(func(p []byte, off int64) error { return d.Do(nbdclient.Read, 0, off, 0, p) })
			if err != nil {
				t.Fatalf("after kill %d (VARVE_SEED=%d): %v", kills, seed, err)
			}
			unknown += k
		}
		for name, j := range nfs {
			h, err := c.Lookup(root, name)
			must(t, err)
			k, err := j.check(func(p []byte, off int64) error { return c.Read(h, p, off) })
			if err != nil {
				t.Fatalf("%s after kill %d (VARVE_SEED=%d): %v", name, kills, seed, err)
			}
			unknown += k
		}
		if err := tree.check(c, root); err != nil {
			t.Fatalf("after kill %d (VARVE_SEED=%d): %v", kills, seed, err)
		}
		d.Close()
		c.Close()
	}
	var writes, durable, flushes int64
	for _, j := range append(nbd, nfs["kill2.raw"], nfs["plain.bin"]) {
		writes += j.writes.Load()
		durable += j.durable.Load()
		flushes += j.flushes.Load()
	}
	if writes < int64(kills)*20 || durable == 0 || flushes == 0 || tree.done < kills/5 {
		t.Errorf("too little load to prove anything: %d writes, %d durable, %d flushes, %d names", writes, durable, flushes, tree.done)
	}
	slices.Sort(restarts)
	harness.Show("%d kills of the process under NBD and NFS load (%d of them while it recovered): %d acknowledged writes (%d by FUA or FILE_SYNC), "+
		"%d flushes and commits, %d names created, renamed, removed: 0 lost; %d in flight resolved whole or not at all",
		kills, inRecovery, writes, durable, flushes, tree.done, unknown)
	harness.Show("restart after a kill until ready: median %.2f s, longest %.2f s",
		restarts[len(restarts)/2].Seconds(), restarts[len(restarts)-1].Seconds())
}

// TestSoak is the same for VARVE_SOAK_MINUTES.
func TestSoak(t *testing.T) {
	minutes, err := strconv.Atoi(os.Getenv("VARVE_SOAK_MINUTES"))
	if err != nil {
		t.Skip("VARVE_SOAK_MINUTES is not set")
	}
	killLoop(t, func(_ int, elapsed time.Duration) bool { return elapsed < time.Duration(minutes)*time.Minute })
}
