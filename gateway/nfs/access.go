package nfs

import (
	"strings"

	"varve/gateway/nfs/rpc"
)

// Bits of ACCESS, RFC 1813 section 3.3.4.
const (
	accessRead    = 0x01
	accessLookup  = 0x02
	accessModify  = 0x04
	accessExtend  = 0x08
	accessDelete  = 0x10
	accessExecute = 0x20
)

// What an operation wants of an inode's permission bits.
const (
	wantExec  = 1
	wantWrite = 2
	wantRead  = 4
)

// squash turns the credentials of a call into those it acts with under an export.
func (x *export) squash(c *rpc.Credentials) {
	switch {
	case x.AllSquash || c.Flavour != rpc.FlavourSys:
		c.UID, c.GID = x.AnonUID, x.AnonGID
		c.SetGroups(nil)
	case x.RootSquash:
		if c.UID == 0 {
			c.UID = x.AnonUID
		}
		if c.GID == 0 {
			c.GID = x.AnonGID
		}
		for i, g := range c.Groups() {
			if g == 0 {
				c.Groups()[i] = x.AnonGID
			}
		}
	}
}

func inGroup(c *rpc.Credentials, gid uint32) bool {
	if c.GID == gid {
		return true
	}
	for _, g := range c.Groups() {
		if g == gid {
			return true
		}
	}
	return false
}

// granted are the permission bits (wantRead, wantWrite, wantExec) that the mode gives.
func granted(a *Attr, c *rpc.Credentials) uint32 {
	switch {
	case c.UID == 0:
		if a.Kind == Dir || a.Mode&0o111 != 0 {
			return wantRead | wantWrite | wantExec
		}
		return wantRead | wantWrite
	case c.UID == a.UID:
		return a.Mode >> 6 & 7
	case inGroup(c, a.GID):
		return a.Mode >> 3 & 7
	default:
		return a.Mode & 7
	}
}

func may(a *Attr, c *rpc.Credentials, want uint32) bool { return granted(a, c)&want == want }

// mayReadData and mayWriteData let the owner through whatever the mode says: a client checks permission when a file is
// opened, and an owner may go on with an open file after chmod. Who may execute a file must be able to load it.
func mayReadData(a *Attr, c *rpc.Credentials) bool {
	return c.UID == a.UID || granted(a, c)&(wantRead|wantExec) != 0
}

func mayWriteData(a *Attr, c *rpc.Credentials) bool { return c.UID == a.UID || may(a, c, wantWrite) }

// accessBits answers ACCESS.
func accessBits(x *export, a *Attr, c *rpc.Credentials, asked uint32) uint32 {
	g := granted(a, c)
	var bits uint32
	if g&wantRead != 0 {
		bits |= accessRead
	}
	if g&wantWrite != 0 && !x.ReadOnly {
		bits |= accessModify | accessExtend
		if a.Kind == Dir {
			bits |= accessDelete
		}
	}
	if g&wantExec != 0 {
		if a.Kind == Dir {
			bits |= accessLookup
		} else {
			bits |= accessExecute
		}
	}
	return bits & asked
}

// mayUnlink checks the removal or renaming of victim out of dir.
func mayUnlink(dir, victim *Attr, c *rpc.Credentials) Status {
	if !may(dir, c, wantWrite|wantExec) {
		return StatusAcces
	}
	if dir.Mode&0o1000 != 0 && c.UID != 0 && c.UID != dir.UID && c.UID != victim.UID {
		return StatusPerm
	}
	return StatusOK
}

// maySet checks SETATTR and may clear set-id bits that must not survive the change.
func maySet(a *Attr, c *rpc.Credentials, s *SetAttr) Status {
	owner := c.UID == 0 || c.UID == a.UID
	if (s.Mode != nil || s.Atime != nil || s.Mtime != nil) && !owner {
		return StatusPerm
	}
	if (s.AtimeNow || s.MtimeNow) && !owner && !may(a, c, wantWrite) {
		return StatusAcces
	}
	if s.Size != nil && !mayWriteData(a, c) {
		return StatusAcces
	}
	if c.UID == 0 {
		return StatusOK
	}
	if s.UID != nil && *s.UID != a.UID {
		return StatusPerm
	}
	if s.GID != nil && *s.GID != a.GID && (!owner || !inGroup(c, *s.GID)) {
		return StatusPerm
	}
	changesOwner := s.UID != nil || s.GID != nil
	if s.Mode != nil && a.Kind != Dir && *s.Mode&0o2000 != 0 && !inGroup(c, a.GID) {
		cleared := *s.Mode &^ 0o2000
		s.Mode = &cleared
	}
	if changesOwner && s.Mode == nil && a.Kind != Dir && a.Mode&0o6000 != 0 {
		cleared := a.Mode &^ 0o6000
		s.Mode = &cleared
	}
	return StatusOK
}

// nameBytesMax is PATHCONF's name_max.
const nameBytesMax = 255

// newName checks a name that is to be made.
func newName(name []byte) Status {
	if string(name) == "." || string(name) == ".." {
		return StatusExist
	}
	return oldName(name)
}

// oldName checks a name that is to be looked up, removed or renamed away; "." and ".." are the caller's matter.
func oldName(name []byte) Status {
	switch {
	case len(name) == 0:
		return StatusAcces
	case len(name) > nameBytesMax:
		return StatusNameTooLong
	case strings.ContainsAny(string(name), "/\x00"):
		return StatusInval
	default:
		return StatusOK
	}
}
