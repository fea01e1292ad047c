package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	appliance "varve/appliance/server"
	"varve/control/replica"
	"varve/control/state"
	"varve/test/harness"
	"varve/test/nfsclient"
)

// The rows C1-C4 are control's: one appliance, then three in one cluster on this machine, whose logs share its disk. They print lines of their own.
//
//	C1  read of one vDisk over the API, with what any node has acknowledged before it
//	C2  a committed write, sent to each node in turn
//	C3  the list of 10,000 vDisks over the API: a page of 100, and all of it
//	C4  CREATE and REMOVE of files over NFS, one client with one call at a time, and 16
var controlRows = []string{"C1", "C2", "C3", "C4"}

const (
	manyVDisks     = 10000
	controlReads   = 400
	controlWorkers = 64
	fillTimeout    = 5 * time.Minute
)

// controlLab is a cluster and ways in.
type controlLab struct {
	nodes   []*harness.Node
	api     []*http.Client
	control []*replica.Client
	stop    []func() error
}

func (l *controlLab) close() error {
	var errs []error
	for _, stop := range slices.Backward(l.stop) {
		errs = append(errs, stop())
	}
	return errors.Join(errs...)
}

func newControlLab(dir string, size int) (l *controlLab, err error) {
	l = &controlLab{}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	for i := range size {
		port, err := harness.FreePort()
		if err != nil {
			return l, err
		}
		n, err := harness.NewNode(filepath.Join(dir, fmt.Sprintf("n%d-%d", size, i)), "--node", fmt.Sprintf("127.0.0.1:%d", port), "--log-size", "256MiB", "--log-level", "error")
		if err != nil {
			return l, err
		}
		if i > 0 {
			token, err := l.nodes[0].CLI("cluster", "token", "create")
			if err != nil {
				return l, fmt.Errorf("join token: %w", err)
			}
			if out, err := n.CLI("cluster", "join", strings.TrimSpace(token)); err != nil {
				return l, fmt.Errorf("join: %w: %s", err, out)
			}
		}
		if err := n.Start(); err != nil {
			return l, err
		}
		l.stop = append(l.stop, n.Stop)
		c := replica.Open(appliance.ControlSocket(n.Data), slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		l.stop = append(l.stop, func() error { cancel(); return <-done })
		wait, end := context.WithTimeout(ctx, 30*time.Second)
		err = c.Ready(wait)
		end()
		if err != nil {
			return l, err
		}
		api := &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: controlWorkers,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(n.Data, "varve.sock"))
			}}}
		l.stop = append(l.stop, func() error { api.CloseIdleConnections(); return nil })
		l.nodes, l.api, l.control = append(l.nodes, n), append(l.api, api), append(l.control, c)
	}
	if size == 1 {
		return l, nil
	}
	return l, harness.Poll(30*time.Second, func() error {
		var c struct{ Voters int }
		if err := l.get(0, "cluster", &c); err != nil || c.Voters != size {
			return fmt.Errorf("%d of %d nodes vote: %w", c.Voters, size, err)
		}
		return nil
	})
}

func (l *controlLab) get(node int, path string, into any) error {
	res, err := l.api[node].Get("http://varve/api/customer/v1/" + path)
	if err != nil {
		return err
	}
	b, err := io.ReadAll(res.Body)
	if err = errors.Join(err, res.Body.Close()); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s: %s", path, res.Status, b)
	}
	return json.Unmarshal(b, into)
}

// fill makes many vDisks by commands, as names of an import are made.
func (l *controlLab) fill(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, fillTimeout)
	defer cancel()
	pool, err := l.control[0].State().View().VPool("default")
	if err != nil {
		return err
	}
	var next atomic.Int64
	errs := make([]error, controlWorkers)
	var g sync.WaitGroup
	for w := range controlWorkers {
		g.Go(func() {
			for i := next.Add(1); i <= manyVDisks && errs[w] == nil; i = next.Add(1) {
				_, errs[w] = l.control[0].Apply(ctx, &state.CreateInode{FSID: pool.FSID, Parent: state.RootIno, Name: "many" + strconv.FormatInt(i, 10) + ".raw",
					Kind: state.File, How: state.Guarded, Mode: 0o644, Volume: uuid.New(), Size: 1 << 30})
			}
		})
	}
	g.Wait()
	return errors.Join(errs...)
}

func p50p99(times []time.Duration) string {
	p99 := tail(times)
	return fmt.Sprintf("p50 %.2f ms, p99 %.2f ms", millis(times[len(times)/2]), millis(p99))
}

func controlRun(ctx context.Context, r *recorder, dir string) error {
	if !slices.ContainsFunc(controlRows, r.settings.wantsRow) {
		return nil
	}
	for _, size := range []int{1, 3} {
		l, err := newControlLab(dir, size)
		if err != nil {
			return fmt.Errorf("cluster of %d: %w", size, err)
		}
		err = l.measure(ctx, r, size)
		for i, n := range l.nodes {
			if log := n.Log(); err != nil && n.Ended() {
				err = fmt.Errorf("%w; node %d ended: %s", err, i+1, log[max(0, len(log)-4000):])
			}
		}
		if err = errors.Join(err, l.close()); err != nil {
			return fmt.Errorf("cluster of %d: %w", size, err)
		}
	}
	return nil
}

func (l *controlLab) measure(ctx context.Context, r *recorder, size int) error {
	if r.settings.wantsRow("C2") {
		var times []time.Duration
		for i := range controlReads {
			c := l.control[i%size]
			err := stopwatch(&times, func() error {
				_, err := c.Apply(ctx, &state.SetDomain{ID: uuid.New(), Name: fmt.Sprintf("d%d", i%200)})
				if errors.Is(err, state.ErrExist) { // committed all the same
					err = nil
				}
				return err
			})
			if err != nil {
				return err
			}
		}
		fmt.Printf("C2   committed write, %d nodes: %s\n", size, p50p99(times))
	}
	if r.settings.wantsRow("C4") {
		for _, depth := range []int{1, 16} {
			made, err := namespaceRate(ctx, l.nodes[0].NFSAddr(), depth, max(r.settings.runTime, 3*time.Second))
			if err != nil {
				return err
			}
			fmt.Printf("C4   NFS CREATE and REMOVE, %d nodes, %d at a time: %.0f pairs/s\n", size, depth, made)
		}
	}
	if !r.settings.wantsRow("C1") && !r.settings.wantsRow("C3") {
		return nil
	}
	begin := time.Now()
	if err := l.fill(ctx); err != nil {
		return fmt.Errorf("make %d vDisks: %w", manyVDisks, err)
	}
	fmt.Printf("C3   %d vDisks, %d nodes: made in %.1f s by %d at a time\n", manyVDisks, size, time.Since(begin).Seconds(), controlWorkers)
	var page struct {
		Items []json.RawMessage
		Next  string
	}
	for node := range l.nodes[:min(size, 2)] {
		var reads, pages []time.Duration
		for i := range controlReads {
			if err := stopwatch(&reads, func() error { return l.get(node, fmt.Sprintf("vdisks/default%%2Fmany%d", 1+i*7), &struct{}{}) }); err != nil {
				return err
			}
		}
		for range 20 {
			if err := stopwatch(&pages, func() error { return l.get(node, "vdisks?limit=100&sort=-name", &page) }); err != nil {
				return err
			}
		}
		begin, all, next := time.Now(), 0, ""
		for {
			page.Next = ""
			if err := l.get(node, "vdisks?limit=1000&cursor="+next, &page); err != nil {
				return err
			}
			if all += len(page.Items); page.Next == "" {
				break
			}
			next = page.Next
		}
		if all != manyVDisks {
			return fmt.Errorf("the list has %d vDisks", all)
		}
		fmt.Printf("C1   read of a vDisk, node %d of %d: %s\n", node+1, size, p50p99(reads))
		fmt.Printf("C3   %d vDisks, node %d of %d: page of 100, sorted: %s; all in pages of 1,000: %.0f ms\n", all, node+1, size, p50p99(pages),
			millis(time.Since(begin)))
	}
	return nil
}

// namespaceRate makes and removes files for a while.
func namespaceRate(ctx context.Context, address string, depth int, lasts time.Duration) (float64, error) {
	var pairs atomic.Int64
	errs := make([]error, depth)
	var g sync.WaitGroup
	begin := time.Now()
	end := begin.Add(lasts)
	for w := range depth {
		g.Go(func() {
			errs[w] = func() error {
				c, root, err := mountOurs(address)
				if err != nil {
					return err
				}
				defer c.Close()
				for i := 0; time.Now().Before(end) && ctx.Err() == nil; i++ {
					name := fmt.Sprintf("w%d-%d-%d", depth, w, i)
					if _, err := c.Create(root, name, true); err != nil {
						return err
					}
					if err := c.Remove(root, name); err != nil {
						return err
					}
					pairs.Add(1)
				}
				return nil
			}()
		})
	}
	g.Wait()
	return float64(pairs.Load()) / time.Since(begin).Seconds(), errors.Join(errs...)
}

func mountOurs(address string) (*nfsclient.Client, nfsclient.Handle, error) {
	c, err := nfsclient.Dial(address)
	if err != nil {
		return nil, "", err
	}
	root, err := c.Mount("/default")
	if err != nil {
		c.Close()
	}
	return c, root, err
}
