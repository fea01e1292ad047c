//go:build e2e

package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"varve/test/harness"
	"varve/test/nbdclient"
	"varve/test/nfsclient"
)

// makeDisks creates vDisks quickly, as a hypervisor would: files over NFS, 64 at a time.
func makeDisks(t *testing.T, n *harness.Node, count int, size int64) {
	t.Helper()
	c, root := mountNFS(t, n)
	defer c.Close()
	errs := make(chan error, count)
	room := make(chan struct{}, 64)
	for i := range count {
		room <- struct{}{}
		go func() {
			h, err := c.Create(root, fmt.Sprintf("d%04d.raw", i), true)
			if err == nil {
				err = c.Truncate(h, size)
			}
			<-room
			errs <- err
		}()
	}
	for range count {
		must(t, <-errs)
	}
}

func megabytes(n int64) float64 { return float64(n) / float64(mib) }

// A thousand idle disks of 1 TiB, each attached over a connection of its own.
func TestMemoryThousandDisks(t *testing.T) {
	const disks = 1000
	n := harness.StartNode(t, "--log-level", "warn")
	fresh := harness.RSS(n.PID())
	took := timed(func() { makeDisks(t, n, disks, tib) })
	created := harness.RSS(n.PID())
	p := make([]byte, block)
	clients := make([]*nbdclient.Client, disks)
	attach := timed(func() {
		for i := range clients {
			c, err := nbdclient.Dial("tcp", n.NBDAddr(), fmt.Sprintf("default/d%04d", i))
			must(t, err)
			t.Cleanup(c.Close)
			if c.Size != tib {
				t.Fatalf("size %d", c.Size)
			}
			must(t, c.Do(nbdclient.Read, 0, 0, 0, p))
			clients[i] = c
		}
	})
	attached := harness.RSS(n.PID())
	each := float64(attached-created) / disks / float64(kib)
	harness.Show("memory: fresh node %.0f MiB; %d vDisks of 1 TiB made over NFS in %.1f s: %.0f MiB; all attached over %d NBD connections in %.1f s and read: "+
		"%.0f MiB, %.0f KiB each (goal < 256 KiB)", megabytes(fresh), disks, took.Seconds(), megabytes(created), disks, attach.Seconds(), megabytes(attached), each)
	if each > 400 {
		t.Errorf("%.0f KiB for each attached idle disk", each)
	}
	// They are all alive.
	for i := range p {
		p[i] = byte(i)
	}
	for i := 0; i < disks; i += 97 {
		must(t, clients[i].Do(nbdclient.Write, nbdclient.FUA, int64(i)<<20, 0, p))
	}
}

// A write at random in each 2 MiB of 100 GiB touches every leaf of the map, far more than the budget holds.
func TestMemoryMapBudget(t *testing.T) {
	const size, leaf = 100 << 30, 2 << 20
	n := harness.StartNode(t, "--log-level", "warn", "--map-size", "64MiB")
	n.CreateDisk(t, "wide", fmt.Sprint(size))
	c := dial(t, n.NBD("wide"))
	before := harness.RSS(n.PID())
	r := rand.New(rand.NewPCG(8, 9))
	order := r.Perm(size / leaf)
	room := make(chan struct{}, 32)
	var failed sync.Map
	took := timed(func() {
		for _, i := range order {
			room <- struct{}{}
			p := make([]byte, block)
			fill(p, 11, uint64(i), 1)
			c.Submit(nbdclient.Write, 0, int64(i)*leaf+int64(i%(leaf/block))*block, 0, p, func(err error) {
				if err != nil {
					failed.Store(i, err)
				}
				<-room
			})
		}
		must(t, c.Do(nbdclient.Flush, 0, 0, 0, nil))
	})
	peak := harness.RSS(n.PID())
	p, want := make([]byte, block), make([]byte, block)
	for k := range 2000 {
		i := order[k*len(order)/2000]
		must(t, c.Do(nbdclient.Read, 0, int64(i)*leaf+int64(i%(leaf/block))*block, 0, p))
		if fill(want, 11, uint64(i), 1); string(p) != string(want) {
			t.Fatalf("block of leaf %d holds %s", i, describe(p))
		}
	}
	failed.Range(func(i, err any) bool { t.Errorf("write to leaf %v: %v", i, err); return false })
	rss := harness.RSS(n.PID())
	harness.Show("memory: a random 4K write in each of the %d leaves of 100 GiB under --map-size 64MiB (%.1f s), 2,000 read back: %.0f MiB resident, %.0f before, %.0f at the end of the writes",
		len(order), took.Seconds(), megabytes(rss), megabytes(before), megabytes(peak))
	if rss > 512*mib {
		t.Errorf("%.0f MiB resident", megabytes(rss))
	}
}

// Mixed load for VARVE_MIXED_SECONDS (20), or for as long as a soak is to take: memory must not creep. More than a minute is
// run at a steady 600 requests a second, since the space of what is overwritten is not reclaimed yet and the disk would fill.
func TestMemoryMixedLoad(t *testing.T) {
	seconds := 20
	if v, err := strconv.Atoi(os.Getenv("VARVE_MIXED_SECONDS")); err == nil {
		seconds = v
	}
	if v, err := strconv.Atoi(os.Getenv("VARVE_SOAK_MINUTES")); err == nil {
		seconds = 60 * v
	}
	n := harness.StartNode(t, "--log-level", "warn", "--log-size", "1GiB")
	n.CreateDisk(t, "mix", "16GiB")
	c, root := mountNFS(t, n)
	h, err := c.Create(root, "mix2.raw", true)
	must(t, err)
	must(t, c.Truncate(h, 16*gib))
	stop := make(chan struct{})
	time.AfterFunc(time.Duration(seconds)*time.Second, func() { close(stop) })
	over := func() bool {
		select {
		case <-stop:
			return true
		default:
			return false
		}
	}
	var load sync.WaitGroup
	var ops [2]int
	pause := func(time.Duration) {}
	if seconds > 60 {
		pause = time.Sleep
	}
	d := dial(t, n.NBD("mix"))
	load.Go(func() {
		r := rand.New(rand.NewPCG(1, 2))
		room := make(chan []byte, 16)
		for range cap(room) {
			room <- make([]byte, 64*kib)
		}
		for !over() {
			p := <-room
			size := (1 + r.IntN(16)) * block
			kind := []uint16{nbdclient.Read, nbdclient.Write, nbdclient.Write, nbdclient.Trim}[r.IntN(4)]
			done := func(error) { room <- p }
			ops[0]++
			pause(time.Second / 400)
			if kind == nbdclient.Trim {
				d.Submit(kind, 0, r.Int64N(4*gib/block-16)*block, size, nil, done)
				continue
			}
			r2 := p[:size]
			r2[0]++
			d.Submit(kind, 0, r.Int64N(4*gib/block-16)*block, 0, r2, done)
		}
		for range cap(room) {
			<-room
		}
	})
	load.Go(func() {
		r := rand.New(rand.NewPCG(3, 4))
		room := make(chan []byte, 8)
		for range cap(room) {
			room <- make([]byte, 32*kib)
		}
		for !over() {
			p := <-room
			off := r.Int64N(4*gib/block-16) * block
			ops[1]++
			pause(time.Second / 200)
			if r.IntN(3) == 0 {
				c.SubmitRead(h, p, off, func(error) { room <- p })
			} else {
				c.SubmitWrite(h, p, off, nfsclient.Unstable, func(nfsclient.Written, error) { room <- p })
			}
		}
		for range cap(room) {
			<-room
		}
	})
	var peak, middle int64
	for i := 0; !over(); i++ {
		time.Sleep(200 * time.Millisecond)
		rss := harness.RSS(n.PID())
		peak = max(peak, rss)
		if i == seconds*5/2 {
			middle = rss
		}
	}
	load.Wait()
	if err := d.Err(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	end := harness.RSS(n.PID())
	harness.Show("memory: %d s of mixed load, %d NBD and %d NFS requests: %.0f MiB half-way, %.0f at the peak, %.0f after it",
		seconds, ops[0], ops[1], megabytes(middle), megabytes(peak), megabytes(end))
	if peak > gib {
		t.Errorf("%.0f MiB resident", megabytes(peak))
	}
}
