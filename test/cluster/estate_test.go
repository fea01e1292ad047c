//go:build e2e

package cluster

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// must runs a command on a node and decodes its JSON.
func (l *lab) must(n *node, into any, args ...string) {
	l.t.Helper()
	out, err := n.cli(append(args, "-o", "json")...)
	if err != nil {
		l.t.Fatalf("%s: varve %s: %v: %s", n.name, strings.Join(args, " "), err, out)
	}
	if into == nil {
		return
	}
	if err := json.Unmarshal([]byte(out), into); err != nil {
		l.t.Fatalf("%s: varve %s: %v: %s", n.name, strings.Join(args, " "), err, out)
	}
}

type shown struct {
	Name      string `json:"name"`
	Size      int64  `json:"size"`
	Automatic bool   `json:"automatic"`
}

// Any node does what is asked about a volume that another one has, reads what any other has acknowledged, opens what is sealed, and
// tells how all of them are. A schedule that is due while the leader is killed is done once.
func TestClusterAsksTheOwner(t *testing.T) {
	l := newLab(t)
	l.form()
	n1, n2, n3 := l.nodes[0], l.nodes[1], l.nodes[2]
	start := time.Now()

	// The keys of sealed secrets came with the join.
	var current [3]struct {
		Current string `json:"current"`
	}
	for i, n := range l.nodes {
		b, err := os.ReadFile(filepath.Join(n.data, "secrets.key"))
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, &current[i]); err != nil || current[i].Current != current[0].Current {
			t.Fatalf("%s seals by another key than %s: %v", n.name, n1.name, err)
		}
	}

	// vPool default is a directory of n1; everything about its vDisks is asked of the others.
	l.must(n2, nil, "vdisk", "create", "default/d", "--size", "64MiB")
	l.must(n3, nil, "snapshot", "create", "default/d", "--name", "s1")
	var list []shown
	l.must(n2, &list, "snapshot", "list", "default/d")
	if len(list) != 1 || list[0].Name != "s1" {
		t.Fatal(list)
	}
	l.must(n3, nil, "vdisk", "resize", "default/d", "--size", "128MiB")
	var d shown
	l.must(n3, &d, "vdisk", "show", "default/d")
	if d.Size != 128<<20 {
		t.Fatalf("the one that resized it sees %d bytes", d.Size)
	}
	l.must(n2, nil, "vdisk", "clone", "default/d@s1", "default/c")
	l.must(n3, nil, "snapshot", "rename", "default/d@s1", "s2")
	l.must(n2, nil, "snapshot", "keep", "default/d@s2")
	if out, err := n2.cli("snapshot", "delete", "default/d@s2", "--confirm", "default/d@s2"); err == nil {
		t.Fatalf("a snapshot that a clone hangs on was deleted: %s", out)
	}
	l.must(n3, nil, "vdisk", "rollback", "default/d@s2", "--confirm", "default/d")

	// Read by one what another one was told is done: at once, every time.
	for i := range 20 {
		name := fmt.Sprintf("default/r%d", i)
		l.must(l.nodes[i%3], nil, "vdisk", "create", name, "--size", "1MiB")
		l.must(l.nodes[(i+1)%3], &d, "vdisk", "show", name)
		if d.Name != name {
			t.Fatal(d)
		}
	}

	var h struct {
		Unreachable []string
		Checks      []struct{ Code, State, Node string }
	}
	out, _ := n2.cli("health", "--all", "-o", "json") // its exit code tells of the machine, too
	if err := json.Unmarshal([]byte(out), &h); err != nil {
		t.Fatal(err, out)
	}
	ready := 0
	for _, c := range h.Checks {
		if c.Code == "node.ready" && c.State == "ok" {
			ready++
		}
	}
	if ready != 3 || len(h.Unreachable) != 0 {
		t.Fatalf("%d nodes are ready, %v do not answer", ready, h.Unreachable)
	}
	fmt.Printf("» three nodes: snapshot, resize, clone, rename, keep, rollback of another node's vDisk, 20 reads by others right after a change, in %s\n",
		time.Since(start).Round(time.Millisecond))

	// A minute's snapshots come due while the leader is gone. It is killed ten seconds before, and started again.
	l.must(n2, nil, "schedule", "set", "snapshot", "--scope", "vdisk:default/d", "--cron", "* * * * *")
	now := time.Now()
	due := now.Truncate(time.Minute).Add(time.Minute)
	if due.Sub(now) < 15*time.Second {
		due = due.Add(time.Minute)
	}
	pause(time.Until(due.Add(-2 * time.Second)))
	killed := l.leader()
	killed.proc.Kill()
	pause(time.Until(due.Add(time.Second)))
	l.start(killed)
	name := "auto-" + due.UTC().Format("2006-01-02T15:04:05Z")
	count := func() (n int) {
		var all []shown
		if out, err := n2.cli("snapshot", "list", "default/d", "-o", "json"); err == nil && json.Unmarshal([]byte(out), &all) == nil {
			for _, s := range all {
				if s.Name == name {
					n++
				}
			}
		}
		return n
	}
	l.eventually("the snapshot of "+name, func() bool { return count() == 1 })
	l.must(n2, nil, "schedule", "inherit", "snapshot", "--scope", "vdisk:default/d")
	pause(3 * time.Second) // whoever else would take one has had the time
	if n := count(); n != 1 {
		t.Fatalf("%d snapshots of %s", n, name)
	}
	var tasks []struct {
		Type, State string
		Created     time.Time
	}
	l.must(n3, &tasks, "task", "list")
	started := 0
	for _, k := range tasks {
		if k.Type == "snapshot.automatic" && k.Created.After(due.Add(-time.Second)) && k.Created.Before(due.Add(55*time.Second)) {
			started++
		}
	}
	if started != 1 {
		t.Fatalf("the schedule was started %d times for %s", started, name)
	}
	fmt.Printf("» three nodes: %s led and was killed two seconds before a schedule was due; it ran once\n", killed.name)
}
