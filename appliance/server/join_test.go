package server

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/appliance/update"
	"varve/control/api/client"
	v1 "varve/control/api/customer"
	"varve/control/cluster"
	"varve/control/raft"
	"varve/control/state"
)

func conflict(t *testing.T, err error, says string) {
	t.Helper()
	if p, ok := errors.AsType[*v1.Problem](err); !ok || p.Code != "conflict" || !strings.Contains(p.Detail, says) {
		t.Fatalf("%v, not a conflict that says %q", err, says)
	}
}

// A running appliance joins: not while it holds something, not by a token that is none; then it ends to be started again, as a node of the
// cluster. When the node that has a vDisk is gone, the other one shows it as it was, at once.
func TestJoinOfARunningAppliance(t *testing.T) {
	conf := func() Config {
		c := config(t.TempDir())
		c.Node = "127.0.0.1:0"
		return c
	}
	a, b := start(t, conf()), start(t, conf())
	ctx := t.Context()
	if _, err := a.client.CreateVDisk(ctx, "default/kept", 1<<20); err != nil {
		t.Fatal(err)
	}
	c := a.dial("default/kept")
	if err := errors.Join(c.WriteAt(ctx, bytes.Repeat([]byte{7}, 64<<10), 0), c.Flush(ctx), c.Close()); err != nil {
		t.Fatal(err)
	}
	token, _, err := client.Post[v1.JoinToken](ctx, a.client, v1.JoinTokenCreate{Role: state.RoleMaster}, client.Change{}, "cluster", "tokens")
	if err != nil {
		t.Fatal(err)
	}
	join := func(r *running, token string) (v1.ClusterJoined, error) {
		j, _, err := client.Post[v1.ClusterJoined](ctx, r.client, v1.ClusterJoin{Token: token}, client.Change{}, "cluster", "join")
		return j, err
	}
	if _, err := b.client.CreateVDisk(ctx, "default/mine", 1<<20); err != nil {
		t.Fatal(err)
	}
	_, err = join(b, token.Token)
	conflict(t, err, "files in vPool default")
	_, err = join(a, token.Token)
	conflict(t, err, "files in vPool default")
	if _, err := client.Delete(ctx, b.client, client.Change{Confirm: "default/mine", Purge: true}, "vdisks", "default/mine"); err != nil {
		t.Fatal(err)
	}
	if _, err := join(b, "varve_join_nonsense"); err == nil {
		t.Fatal("it joins with what is no token")
	}
	if err := b.client.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	before, err := client.Get[v1.Cluster](ctx, b.client, "cluster")
	if err != nil || len(before.Nodes) != 1 {
		t.Fatal(before, err)
	}

	j, err := join(b, token.Token)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-b.ended:
		b.over = true
		if !errors.Is(err, ErrRestart) {
			t.Fatalf("it ended with %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("it goes on as what it was")
	}
	b.client.Close()
	b = start(t, b.cfg)
	after, err := client.Get[v1.Cluster](ctx, b.client, "cluster")
	if err != nil || after.ID != j.Cluster || after.ID == before.ID || len(after.Nodes) != 2 ||
		!slices.ContainsFunc(after.Nodes, func(n v1.ClusterNode) bool { return n.ID == j.Node }) {
		t.Fatalf("%+v %v, joined %+v", after, err, j)
	}
	if got, err := fingerprintOf(filepath.Join(b.cfg.Data, tlsName, "server.pem")); err != nil || got != j.Fingerprint || len(got) != 3*32-1 {
		t.Errorf("the certificate is %q %v, %q was announced", got, err, j.Fingerprint)
	}
	for name, want := range map[string]bool{joinDir: false, controlName + leftSuffix: true, tlsName + leftSuffix: true} {
		if _, err := os.Stat(filepath.Join(b.cfg.Data, name)); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err = join(b, token.Token)
	conflict(t, err, "a node of a cluster")

	// What the other node knows is shown here: fresh while it answers, with its time when it does not.
	list := func(query string) (v1.VDisk, v1.VPool, v1.Backend, time.Duration) {
		t.Helper()
		began := time.Now()
		var disks []v1.VDisk
		var pools []v1.VPool
		var backends []v1.Backend
		for _, q := range []struct {
			path string
			into any
		}{{"vdisks", &disks}, {"vpools", &pools}, {"backends", &backends}} {
			if err := listStale(ctx, b.client, q.path+query, q.into); err != nil {
				t.Fatal(q.path, err)
			}
		}
		took := time.Since(began)
		if len(disks) != 1 || len(pools) != 1 || len(backends) != 1 {
			t.Fatal(disks, pools, backends)
		}
		return disks[0], pools[0], backends[0], took
	}
	if _, _, err := client.Post[v1.Ledger](ctx, a.client, v1.WaitLevel{Level: "backed"}, client.Change{}, "vdisks", "default/kept", "wait"); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	d, p, back, _ := list("")
	for (d.Used == 0 || p.Total == 0 || p.Stored == 0 || back.Stored == 0) && time.Now().Before(deadline) {
		time.Sleep(100 * time.Millisecond)
		d, p, back, _ = list("")
	}
	if d.Used != 64<<10 || p.Total == 0 || p.Stored == 0 || back.Stored == 0 || d.AsOf != nil || p.AsOf != nil || back.AsOf != nil {
		t.Fatalf("of a node that answers: %+v\n%+v\n%+v", d, p, back)
	}
	a.stop()
	deadline = time.Now().Add(time.Minute)
	for d.AsOf == nil || p.AsOf == nil || back.AsOf == nil {
		if time.Now().After(deadline) {
			t.Fatalf("of a node that is gone: %+v\n%+v\n%+v", d, p, back)
		}
		time.Sleep(100 * time.Millisecond)
		d, p, back, _ = list("?consistency=stale")
	}
	d, p, back, took := list("?consistency=stale")
	if d.Used != 64<<10 || p.Total == 0 || p.Stored == 0 || back.Stored == 0 || time.Since(*d.AsOf) > 5*time.Minute {
		t.Errorf("of a node that is gone: %+v\n%+v\n%+v", d, p, back)
	}
	fmt.Printf("» a running appliance joined a cluster by its API; with the other node gone, its vDisks, vPools and backends are listed as of %s ago, in %s\n",
		time.Since(*d.AsOf).Round(time.Second), took.Round(time.Millisecond))
}

func listStale(ctx context.Context, c *client.Client, path string, into any) error {
	raw, err := c.Do(ctx, "GET", v1.Prefix+"/"+path, nil, nil)
	if err != nil {
		return err
	}
	var page struct {
		Items json.RawMessage `json:"items"`
	}
	if err := json.Unmarshal(raw.Body, &page); err != nil {
		return err
	}
	return json.Unmarshal(page.Items, into)
}

// A join that is cut anywhere between the cluster's yes and its end is completed by the next start.
func TestJoinCutAnywhere(t *testing.T) {
	type files = map[string]string
	old := files{"control/node.json": "old", "tls/server.pem": "old", "log/0": "old", "map/0": "old", "admin.token": "old"}
	fresh := files{"join.new/control/node.json": "new", "join.new/tls/server.pem": "new"}
	write := func(dir string, all ...files) {
		for _, f := range all {
			for name, text := range f {
				path := filepath.Join(dir, name)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	steps := []func(dir string){ // each on top of those before
		func(dir string) { write(dir, old, fresh, files{"join.new/ready": ""}) },
		func(dir string) { rename(t, dir, "tls", "tls.left") },
		func(dir string) { rename(t, dir, "log", "log.left") },
		func(dir string) { rename(t, dir, "map", "map.left"); rename(t, dir, "admin.token", "admin.token.left") },
		func(dir string) { rename(t, dir, "control", "control.left") },
		func(dir string) { rename(t, dir, "join.new/ready", "join.new/moved") },
		func(dir string) { rename(t, dir, "join.new/tls", "tls") },
		func(dir string) { rename(t, dir, "join.new/control", "control") },
	}
	for n := range len(steps) {
		dir := t.TempDir()
		for _, step := range steps[:n+1] {
			step(dir)
		}
		if !joinIsReady(dir) {
			t.Fatalf("cut %d: the join is forgotten", n)
		}
		for range 2 { // what is over is not done again
			if err := moveJoin(dir); err != nil {
				t.Fatalf("cut %d: %v", n, err)
			}
		}
		for name, want := range (files{"control/node.json": "new", "tls/server.pem": "new", "control.left/node.json": "old", "tls.left/server.pem": "old", "log.left/0": "old"}) {
			if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != want {
				t.Errorf("cut %d: %s: %q %v", n, name, b, err)
			}
		}
		for _, name := range []string{joinDir, "log", "map", "admin.token"} {
			if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
				t.Errorf("cut %d: %s is there", n, name)
			}
		}
	}
	// One that the cluster has not answered is none.
	dir := t.TempDir()
	write(dir, old, fresh)
	if joinIsReady(dir) {
		t.Error("half a join counts")
	}
}

func rename(t *testing.T, dir, from, to string) {
	t.Helper()
	if err := os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
		t.Fatal(err)
	}
}

// A join that fails leaves the directory of an appliance that does not run as it is.
func TestFailedJoinChangesNothing(t *testing.T) {
	cfg := config(t.TempDir())
	st, err := InitCluster(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Join(t.Context(), cfg, JoinOptions{Token: "varve_join_x"}); err == nil {
		t.Fatal("it joins with what is no token")
	}
	id, self, err := raft.Identify(filepath.Join(cfg.Data, controlName))
	if err != nil || id != st.Cluster || self != st.Self || cluster.HasPeers(filepath.Join(cfg.Data, controlName)) || self == uuid.Nil {
		t.Errorf("%s %s %v, was %+v", id, self, err, st)
	}
}

// A bundle is taken over the API as long as a trusted key has signed it and all of it is there; appliances that were not installed from the
// image are not rolled out to.
func TestUpdateByAPI(t *testing.T) {
	private, public, err := update.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	key, err := update.ParsePrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cfg := config(t.TempDir())
	cfg.UpdateKeys = filepath.Join(t.TempDir(), "update.pub")
	if err := os.WriteFile(cfg.UpdateKeys, []byte(public), 0o600); err != nil {
		t.Fatal(err)
	}
	r := start(t, cfg)
	ctx := t.Context()
	pack := func(version string, size int, keys ...ed25519.PrivateKey) []byte {
		var out bytes.Buffer
		if _, err := update.Pack(&out, update.Manifest{Version: version, LevelMax: state.LevelMax}, bytes.NewReader(bytes.Repeat([]byte("system"), size/6)), keys...); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	upload := func(b []byte) (out v1.UpdateBundle, err error) {
		err = client.Upload(ctx, r.client, bytes.NewReader(b), int64(len(b)), &out, "updates", "bundles")
		return out, err
	}
	good := pack("9.1", 6<<20, key)
	damaged := bytes.Clone(good)
	damaged[len(damaged)/2] ^= 1
	_, stranger, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	first, err := upload(pack("9.0", 1<<20, key))
	if err != nil || first.Version != "9.0" {
		t.Fatal(first, err)
	}
	for name, bad := range map[string][]byte{"damaged": damaged, "unsigned": pack("9.2", 600), "signed by a stranger": pack("9.2", 600, stranger),
		"cut": good[:len(good)/2], "empty": nil, "followed by more": append(bytes.Clone(good), make([]byte, 1<<20)...)} {
		if _, err := upload(bad); err == nil {
			t.Errorf("a bundle that is %s is taken", name)
		} else if p, ok := errors.AsType[*v1.Problem](err); !ok || p.Status >= 500 {
			t.Errorf("%s: %v", name, err)
		}
	}
	got, err := upload(good)
	if err != nil || got.Version != "9.1" || int64(got.Size) != int64(len(good)) {
		t.Fatalf("%+v %v", got, err)
	}
	u, err := client.Get[v1.Updates](ctx, r.client, "updates")
	if err != nil || len(u.Bundles) != 1 || u.Bundles[0].SHA256 != got.SHA256 || len(u.Nodes) != 1 || !u.Nodes[0].Reachable || u.Nodes[0].Updatable || u.Rollout != nil {
		t.Fatalf("%+v %v", u, err)
	}
	if parts, err := filepath.Glob(filepath.Join(update.Dir(cfg.Data), "*.part")); err != nil || len(parts) > 0 {
		t.Errorf("left behind: %v %v", parts, err)
	}
	_, _, err = client.Post[v1.Task](ctx, r.client, v1.RolloutStart{SHA256: got.SHA256}, client.Change{}, "updates", "rollout")
	conflict(t, err, "not installed from the image")
	_, _, err = client.Post[v1.Task](ctx, r.client, v1.RolloutStart{SHA256: strings.Repeat("0", 64)}, client.Change{}, "updates", "rollout")
	if p, ok := errors.AsType[*v1.Problem](err); !ok || p.Code != "not_found" {
		t.Errorf("a bundle that is not there: %v", err)
	}
}

// TestJoinOnDisksOfTheirOwn: control and log are file systems of their own, which cannot be renamed.
func TestJoinOnDisksOfTheirOwn(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	dir := t.TempDir()
	file := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{controlName, logName} {
		path := filepath.Join(dir, name)
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount("tmpfs", path, "tmpfs", 0, "size=1m"); err != nil {
			t.Skip("no mounts here: ", err)
		}
		t.Cleanup(func() {
			if err := syscall.Unmount(path, syscall.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	}
	for round := range 2 { // the second finds what the first has left
		old, fresh := fmt.Sprint("old", round), fmt.Sprint("new", round)
		file("control/node.json", old)
		file("control/raft/log", old)
		file("log/0", old)
		file("tls/server.pem", old)
		file("join.new/control/node.json", fresh)
		file("join.new/tls/server.pem", fresh)
		file("join.new/ready", "")
		if err := moveJoin(dir); err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]string{"control/node.json": fresh, "control/.left/node.json": old, "control/.left/raft/log": old,
			"log/.left/0": old, "tls/server.pem": fresh, "tls.left/server.pem": old} {
			if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != want {
				t.Errorf("round %d: %s: %q %v", round, name, b, err)
			}
		}
		for _, name := range []string{joinDir, "control/raft", "log/0"} {
			if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
				t.Errorf("round %d: %s is there", round, name)
			}
		}
	}
}
