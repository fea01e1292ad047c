// Package rpc speaks ONC RPC version 2 (RFC 5531): call headers, reply headers, credentials, and record marking on a
// stream. It knows no program; gateway/nfs and gateway/nfs/portmap do.
//
//	call:   | xid | 0 | rpcvers 2 | prog | vers | proc | cred: flavour, opaque<400> | verf: flavour, opaque<400> | args
//	reply:  | xid | 1 | 0 accepted | verf: 0, 0 | accept_stat | results, or low, high for PROG_MISMATCH
//	        | xid | 1 | 1 denied   | 0 RPC_MISMATCH, low, high   or   1 AUTH_ERROR, auth_stat
//	record: fragments | last 1 bit, length 31 bits | bytes |, the last one marked
package rpc

import (
	"encoding/binary"

	"varve/gateway/nfs/xdr"
)

// Accept is accept_stat: how the server took a call that it did not deny.
type Accept uint32

// RFC 5531 section 9.
const (
	Success      Accept = 0
	ProgUnavail  Accept = 1
	ProgMismatch Accept = 2
	ProcUnavail  Accept = 3
	GarbageArgs  Accept = 4
	SystemErr    Accept = 5
)

// AuthStat is why credentials were refused.
type AuthStat uint32

// RFC 5531 section 9.
const (
	AuthOK           AuthStat = 0
	AuthBadCred      AuthStat = 1
	AuthRejectedCred AuthStat = 2
	AuthTooWeak      AuthStat = 5
)

// Flavours of credentials that we take.
const (
	FlavourNone = 0
	FlavourSys  = 1
)

const (
	// Version is the only version of ONC RPC there is.
	Version      = 2
	authBytesMax = 400
	// GroupsMax is how many supplementary groups AUTH_SYS can carry.
	GroupsMax       = 16
	machineBytesMax = 255
)

// Credentials say on whose behalf a call is made. Nobody vouches for them: a client can claim any user.
type Credentials struct {
	Flavour uint32
	UID     uint32
	GID     uint32
	// Machine is the client's name for itself, a part of the call's message.
	Machine []byte
	groups  [GroupsMax]uint32
	ngroups int
}

// Groups are the supplementary groups.
func (c *Credentials) Groups() []uint32 { return c.groups[:c.ngroups] }

// SetGroups replaces the supplementary groups by the first GroupsMax of g.
func (c *Credentials) SetGroups(g []uint32) { c.ngroups = copy(c.groups[:], g) }

// Call is one decoded call. Args and Cred.Machine are parts of the message it was decoded from.
type Call struct {
	XID, RPCVersion, Program, Version, Proc uint32
	Cred                                    Credentials
	// Auth is not AuthOK when the credentials cannot be used; then the call must be denied with it.
	Auth AuthStat
	Args []byte
}

// DecodeCall reads a call's header. ok is false when the message is no call or its header does not decode, in which case
// there is nothing to answer. A call with another RPC version is returned with RPCVersion set and nothing else.
func DecodeCall(msg []byte, c *Call) (ok bool) {
	d := xdr.NewDecoder(msg)
	c.XID = d.Uint32()
	if kind := d.Uint32(); d.Bad() || kind != 0 {
		return false
	}
	c.RPCVersion = d.Uint32()
	if d.Bad() {
		return false
	}
	if c.RPCVersion != Version {
		return true
	}
	c.Program, c.Version, c.Proc = d.Uint32(), d.Uint32(), d.Uint32()
	flavour := d.Uint32()
	cred := d.Opaque(authBytesMax)
	d.Uint32()
	d.Opaque(authBytesMax)
	if d.Bad() {
		return false
	}
	c.Args = d.Rest()
	c.Auth = decodeCredentials(flavour, cred, &c.Cred)
	return true
}

// decodeCredentials reads AUTH_SYS parameters (RFC 5531 appendix A).
func decodeCredentials(flavour uint32, body []byte, c *Credentials) AuthStat {
	*c = Credentials{Flavour: flavour}
	switch flavour {
	case FlavourNone:
		return AuthOK
	case FlavourSys:
	default:
		return AuthRejectedCred
	}
	d := xdr.NewDecoder(body)
	d.Uint32() // stamp: an arbitrary number of the client
	c.Machine = d.Opaque(machineBytesMax)
	c.UID, c.GID = d.Uint32(), d.Uint32()
	n := d.Uint32()
	if d.Bad() || n > GroupsMax {
		return AuthBadCred
	}
	for i := range n {
		c.groups[i] = d.Uint32()
	}
	if d.Bad() {
		return AuthBadCred
	}
	c.ngroups = int(n)
	return AuthOK
}

// AppendCall writes a call with the credentials c.
func AppendCall(b []byte, xid, prog, vers, proc uint32, c Credentials) []byte {
	for _, v := range []uint32{xid, 0, Version, prog, vers, proc} {
		b = xdr.AppendUint32(b, v)
	}
	b = xdr.AppendUint32(b, c.Flavour)
	if c.Flavour == FlavourSys {
		body := xdr.AppendUint32(nil, 0)
		body = xdr.AppendOpaque(body, c.Machine)
		body = xdr.AppendUint32(body, c.UID)
		body = xdr.AppendUint32(body, c.GID)
		body = xdr.AppendUint32(body, uint32(c.ngroups))
		for _, g := range c.Groups() {
			body = xdr.AppendUint32(body, g)
		}
		b = xdr.AppendOpaque(b, body)
	} else {
		b = xdr.AppendUint32(b, 0)
	}
	return append(b, 0, 0, 0, 0, 0, 0, 0, 0) // verifier AUTH_NONE
}

// AppendAccepted writes the header of a reply to a call that was not denied; results follow it when s is Success.
func AppendAccepted(b []byte, xid uint32, s Accept) []byte {
	b = xdr.AppendUint32(b, xid)
	b = append(b, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	return xdr.AppendUint32(b, uint32(s))
}

// AppendProgMismatch answers a call for a version that is not served.
func AppendProgMismatch(b []byte, xid, low, high uint32) []byte {
	b = AppendAccepted(b, xid, ProgMismatch)
	b = xdr.AppendUint32(b, low)
	return xdr.AppendUint32(b, high)
}

// AppendRPCMismatch answers a call of another RPC version.
func AppendRPCMismatch(b []byte, xid uint32) []byte {
	for _, v := range []uint32{xid, 1, 1, 0, Version, Version} {
		b = xdr.AppendUint32(b, v)
	}
	return b
}

// AppendAuthError denies a call because of its credentials.
func AppendAuthError(b []byte, xid uint32, s AuthStat) []byte {
	for _, v := range []uint32{xid, 1, 1, 1, uint32(s)} {
		b = xdr.AppendUint32(b, v)
	}
	return b
}

const (
	markBytes = 4
	lastBit   = 1 << 31
)

// BeginRecord reserves the room of a record mark and returns where the record starts, for EndRecord.
func BeginRecord(b []byte) ([]byte, int) { return append(b, 0, 0, 0, 0), len(b) }

// EndRecord fills the mark of the record that BeginRecord started at start: one fragment, the last.
func EndRecord(b []byte, start int) []byte {
	binary.BigEndian.PutUint32(b[start:], uint32(len(b)-start-markBytes)|lastBit)
	return b
}
