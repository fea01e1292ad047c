package vdisk

import (
	"cmp"
	"slices"
	"strings"
	"sync"

	"github.com/google/uuid"

	"varve/control/state"
)

// Listed is a vDisk by what only a change of names changes. The JSON names are the customer API's.
type Listed struct {
	Name  string    `json:"name"` // "vpool/path"
	VPool string    `json:"vpool"`
	ID    uuid.UUID `json:"id"` // of its volume
	File  string    `json:"file"`

	fsid, ino uint64
}

// names are all vDisks in the order of their names. They are read anew when a name has changed, so that a page of a long list costs its own
// length and not the list's.
type names struct {
	mu      sync.Mutex // guards the rest
	changed []<-chan struct{}
	all     []Listed
	pools   map[string][2]int // which of all
}

// currentLocked brings the names up to date; mu is held.
func (n *names) currentLocked(store *state.Store) error {
	fresh := len(n.changed) > 0
	for _, c := range n.changed {
		select {
		case <-c:
			fresh = false
		default:
		}
	}
	if fresh {
		return nil
	}
	// The channels first: what changes after them is seen next time.
	var changed []<-chan struct{}
	for _, table := range []string{"vpool", "inode"} {
		_, c, err := store.Watch(table)
		if err != nil {
			return err
		}
		changed = append(changed, c)
	}
	v := store.View()
	pools := v.VPools()
	slices.SortFunc(pools, func(a, b state.VPool) int { return strings.Compare(a.Name+"/", b.Name+"/") })
	n.all, n.pools = make([]Listed, 0, len(n.all)), make(map[string][2]int, len(pools))
	for _, p := range pools {
		from := len(n.all)
		for _, f := range v.NamedDisks(p.FSID) {
			n.all = append(n.all, Listed{Name: p.Name + "/" + f.Name, VPool: p.Name, ID: f.Volume, File: f.Path, fsid: p.FSID, ino: f.Ino})
		}
		slices.SortFunc(n.all[from:], func(a, b Listed) int { return cmp.Compare(a.Name, b.Name) })
		n.pools[p.Name] = [2]int{from, len(n.all)}
	}
	n.changed = changed
	return nil
}

// Names returns the vDisks of one vPool, or of all where pool is "", by name. The caller leaves the list as it is.
func (c *Controller) Names(pool string) ([]Listed, error) {
	if pool != "" {
		if _, err := c.cfg.Store.View().VPool(pool); err != nil {
			return nil, err
		}
	}
	c.names.mu.Lock()
	defer c.names.mu.Unlock()
	if err := c.names.currentLocked(c.cfg.Store); err != nil {
		return nil, err
	}
	if pool == "" {
		return c.names.all, nil
	}
	at := c.names.pools[pool]
	return c.names.all[at[0]:at[1]:at[1]], nil
}

// Describe tells of the vDisks of a list; those that are gone meanwhile are left out.
func (c *Controller) Describe(list []Listed) []VDisk {
	v := c.cfg.Store.View()
	pools := make(map[uint64]state.VPool)
	for _, p := range v.VPools() {
		pools[p.FSID] = p
	}
	out := make([]VDisk, 0, len(list))
	for _, l := range list {
		p, ok := pools[l.fsid]
		if !ok {
			continue
		}
		n, err := v.Inode(l.fsid, l.ino)
		if err != nil || n.Volume != l.ID {
			continue
		}
		vol, err := v.Volume(l.ID)
		if err != nil {
			continue
		}
		out = append(out, c.with(p, state.Disk{Name: strings.TrimPrefix(l.Name, l.VPool+"/"), Path: l.File, Inode: n, Volume: vol}))
	}
	return out
}
