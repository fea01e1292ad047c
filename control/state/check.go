package state

import (
	"fmt"

	"github.com/google/uuid"
)

// Check returns the first invariant that the state breaks, or nil. It reads everything; Restore and tests call it.
func (v *View) Check() error {
	for _, o := range objects {
		if o.check == nil {
			continue
		}
		if err := o.check(v); err != nil {
			return err
		}
	}
	return nil
}

// checkNamespace checks vPools, inodes and volumes against each other.
func checkNamespace(v *View) error {
	pools := make(map[uint64]*poolCount)
	for _, p := range v.VPools() {
		if p.FSID != FSIDOf(p.ID) || p.FSID == 0 || pools[p.FSID] != nil {
			return fmt.Errorf("vpool %s: fsid %016x", p.Name, p.FSID)
		}
		if err := p.Backend.Check("vpool " + p.Name); err != nil {
			return err
		}
		if err := checkClients("vpool "+p.Name, p.Clients); err != nil {
			return err
		}
		pools[p.FSID] = &poolCount{VPool: p, dirs: make(map[uint64]*dirCount)}
	}
	if n := count[VPool](v, tVPool, byID, nil); n != len(pools) {
		return fmt.Errorf("%d vpools, %d names", n, len(pools))
	}
	volumes, err := v.checkInodes(pools)
	if err != nil {
		return err
	}
	for _, p := range pools {
		if err := v.checkPool(p); err != nil {
			return err
		}
	}
	return v.checkVolumes(pools, volumes)
}

type poolCount struct {
	VPool
	inodes uint64
	dirs   map[uint64]*dirCount
}

type dirCount struct {
	entries uint64
	subdirs uint32
	cookie  uint64
}

func (p *poolCount) dir(ino uint64) *dirCount {
	d := p.dirs[ino]
	if d == nil {
		d = &dirCount{}
		p.dirs[ino] = d
	}
	return d
}

// checkInodes checks every inode by itself and counts entries; it returns the volumes that files name.
func (v *View) checkInodes(pools map[uint64]*poolCount) (volumes map[uuid.UUID]bool, err error) {
	volumes = make(map[uuid.UUID]bool)
	named := 0
	rows(v, tInode, byID, nil, func(n *Inode) bool {
		p := pools[n.FSID]
		if p == nil || n.Ino == 0 || n.Ino >= p.NextIno {
			err = fmt.Errorf("inode %d of fsid %016x: no such vpool or number not given", n.Ino, n.FSID)
			return false
		}
		p.inodes++
		if n.Ino != RootIno {
			named++
		}
		err = v.checkInode(p, n)
		if n.Kind == File {
			volumes[n.Volume] = true
		}
		return err == nil
	})
	if err != nil {
		return nil, err
	}
	for _, index := range []string{byName, byCookie} {
		if n := count[Inode](v, tInode, index, nil); n != named {
			return nil, fmt.Errorf("%d inodes, %d by %s", named, n, index)
		}
	}
	return volumes, nil
}

func (v *View) checkInode(p *poolCount, n *Inode) error {
	object := inodeObject(n.FSID, n.Ino)
	if n.Ino == RootIno {
		if n.Kind != Dir || n.Parent != RootIno || n.Name != "" || n.Cookie != 0 {
			return fmt.Errorf("%s: not a root", object)
		}
		return nil
	}
	if err := checkName(n.Name); err != nil {
		return err
	}
	d := p.dir(n.Parent)
	d.entries++
	d.cookie = max(d.cookie, n.Cookie)
	if n.Kind == Dir {
		d.subdirs++
	}
	if n.Cookie < FirstCookie {
		return fmt.Errorf("%s: cookie %d", object, n.Cookie)
	}
	if sibling, ok := siblingDisk(n.Name); ok && n.Kind == File {
		if other, ok := v.entry(n.FSID, n.Parent, sibling); ok && other.Kind == File {
			return fmt.Errorf("%s: same vdisk as inode %d", object, other.Ino)
		}
	}
	switch n.Kind {
	case File:
		vol, ok := first[Volume](v, tVolume, byID, n.Volume[:])
		if !ok || vol.Ino != n.Ino || vol.FSID != n.FSID || vol.Kind != volumeKind(n.Name) {
			return fmt.Errorf("%s: its volume %s is missing or another's", object, n.Volume)
		}
	case Dir, Symlink:
		if n.Volume != uuid.Nil {
			return fmt.Errorf("%s: a %s with a volume", object, n.Kind)
		}
	default:
		return fmt.Errorf("%s: kind %q", object, n.Kind)
	}
	return nil
}

// checkPool checks that every directory exists, counts its entries right, and hangs on the root.
func (v *View) checkPool(p *poolCount) error {
	if p.inodes != p.Inodes {
		return fmt.Errorf("vpool %s: %d inodes, counted %d", p.Name, p.Inodes, p.inodes)
	}
	if _, err := v.dir(p.FSID, RootIno); err != nil {
		return err
	}
	rooted := map[uint64]bool{RootIno: true}
	for ino := range p.dirs {
		if _, err := v.dir(p.FSID, ino); err != nil {
			return err
		}
		var chain []uint64
		for at := ino; !rooted[at]; {
			n, err := v.dir(p.FSID, at)
			if err != nil {
				return err
			}
			chain = append(chain, at)
			if at = n.Parent; uint64(len(chain)) > p.inodes {
				return fmt.Errorf("vpool %s: directory %d hangs on itself", p.Name, ino)
			}
		}
		for _, at := range chain {
			rooted[at] = true
		}
	}
	var err error
	rows(v, tInode, byID, keyFSID(p.FSID), func(n *Inode) bool {
		if n.Kind == Dir {
			d := p.dir(n.Ino)
			if n.Entries != d.entries || n.Nlink != 2+d.subdirs || n.NextCookie <= d.cookie || n.NextCookie < FirstCookie {
				err = fmt.Errorf("%s: entries %d nlink %d next cookie %d, counted %+v",
					inodeObject(n.FSID, n.Ino), n.Entries, n.Nlink, n.NextCookie, *d)
			}
		}
		return err == nil
	})
	return err
}

func (v *View) checkVolumes(pools map[uint64]*poolCount, named map[uuid.UUID]bool) error {
	var err error
	n := 0
	rows(v, tVolume, byID, nil, func(vol *Volume) bool {
		n++
		if p := pools[vol.FSID]; !named[vol.ID] || p == nil || p.ID != vol.Pool {
			err = fmt.Errorf("volume %s: no file or vpool has it", vol.ID)
		}
		return err == nil
	})
	if err == nil && n != len(named) {
		err = fmt.Errorf("%d volumes for %d files", n, len(named))
	}
	rows(v, tDoomed, byID, nil, func(d *Doomed) bool {
		if p := pools[d.FSID]; err == nil && (named[d.ID] || p == nil || p.ID != d.Pool) {
			err = fmt.Errorf("doomed volume %s: still named or without a vpool", d.ID)
		}
		return err == nil
	})
	return err
}
