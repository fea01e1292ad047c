package state

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/google/uuid"
)

// Node is an appliance in its role of storage router.
type Node struct {
	ID uuid.UUID `json:"id"`
	NodeSpec
	// Offline is an operator's word: nothing is expected of the node, and another master takes its vote.
	Offline bool   `json:"offline,omitempty"`
	Joined  Time   `json:"joined"`
	Seen    Time   `json:"seen"`
	Rev     uint64 `json:"rev"`
}

// NodeSpec is what a node says of itself when it starts. Addresses are host:port, "" where the service is off. Name and role are
// what the cluster gave it once it is known.
type NodeSpec struct {
	Name    string `json:"name"`
	Role    string `json:"role"`
	Peer    string `json:"peer,omitempty"` // of the node port
	NBD     string `json:"nbd,omitempty"`
	NFS     string `json:"nfs,omitempty"`
	HTTPS   string `json:"https,omitempty"`
	Version string `json:"version"`
	// LevelMax is the newest data level that its binary knows.
	LevelMax int `json:"level_max,omitempty"`
}

// Roles of nodes. A master votes in raft when it has a place; an extra never does.
const (
	RoleMaster = "master"
	RoleExtra  = "extra"
)

// NodesMax bounds a cluster's nodes.
const NodesMax = 256

// Removed is a node that was taken out: its certificate is refused for ever.
type Removed struct {
	ID   uuid.UUID `json:"id"`
	Name string    `json:"name"`
	At   Time      `json:"at"`
	Rev  uint64    `json:"rev"`
}

// JoinToken admits one node. Only the SHA-256 of its secret is known. Used by a node it admits the same one, with the same key,
// again, since the answer may have been lost.
type JoinToken struct {
	Hash    Secret    `json:"-"`
	Role    string    `json:"role"`
	Created Time      `json:"created"`
	Expires Time      `json:"expires"`
	Node    uuid.UUID `json:"node,omitzero"`
	Key     []byte    `json:"key,omitempty"` // SHA-256 of the public key that was certified
	Rev     uint64    `json:"rev"`
}

// JoinTokensMax bounds the tokens that have not expired.
const JoinTokensMax = 64

const (
	tRemoved   = "removed"
	tJoinToken = "join_token"
)

func nodeTable(frame byte) object {
	o := rowObject[Node](frame, tNode, map[string]index{byID: always(func(n *Node) []byte { return n.ID[:] })})
	o.commands = []func() Command{command[RegisterNode], command[SetNode], command[RemoveNode]}
	return o
}

func removedTable(frame byte) object {
	o := rowObject[Removed](frame, tRemoved, map[string]index{byID: always(func(n *Removed) []byte { return n.ID[:] })})
	o.check = func(v *View) error {
		for _, r := range all[Removed](v, tRemoved, byID, nil) {
			if _, err := v.Node(r.ID); err == nil {
				return fmt.Errorf("node %s is removed and there", r.ID)
			}
		}
		return nil
	}
	return o
}

type joinTokenRow struct {
	JoinToken
	Hash []byte `json:"hash"`
}

func joinTokenTable(frame byte) object {
	o := secretObject(frame, tJoinToken, map[string]index{byID: always(func(t *JoinToken) []byte { return t.Hash[:] })},
		func(t JoinToken) joinTokenRow { return joinTokenRow{JoinToken: t, Hash: t.Hash[:]} },
		func(r joinTokenRow) JoinToken { copy(r.JoinToken.Hash[:], r.Hash); return r.JoinToken })
	o.commands = []func() Command{command[AddJoinToken], command[UseJoinToken]}
	return o
}

// RegisterNode records what a node says of itself. Every start of a node sends one. Its name and role stay what they are.
type RegisterNode struct {
	ID   uuid.UUID `json:"id"`
	Spec NodeSpec  `json:"spec"`
}

func (*RegisterNode) kind() (string, int) { return "register_node", 1 }

func (c *RegisterNode) check() error {
	if c.ID == uuid.Nil {
		return invalid("node", "no id")
	}
	return c.Spec.check("node " + c.ID.String())
}

func (s NodeSpec) check(object string) error {
	if s.Role != RoleMaster && s.Role != RoleExtra {
		return invalid(object, "role "+quote(s.Role))
	}
	for _, f := range []string{s.Peer, s.NBD, s.NFS, s.HTTPS, s.Version} {
		if len(f) > NameBytesMax || !utf8.ValidString(f) {
			return invalid(object, "address or version too long or not UTF-8")
		}
	}
	return checkLabel("node", s.Name)
}

func (c *RegisterNode) apply(t *tx) (Result, error) {
	n := &Node{ID: c.ID, NodeSpec: c.Spec, Joined: t.at, Seen: t.at, Rev: t.index}
	if knows := max(c.Spec.LevelMax, LevelMin); knows < t.Level() {
		return Result{}, &Error{Err: ErrConflict, Object: "node " + quote(c.Spec.Name), Detail: fmt.Sprintf("runs version %s, which knows data up to level %d; the cluster's is of level %d",
			c.Spec.Version, knows, t.Level()), Remedy: "update it"}
	}
	if _, gone := first[Removed](&t.View, tRemoved, byID, c.ID[:]); gone {
		return Result{}, &Error{Err: ErrConflict, Object: "node " + c.ID.String(), Detail: "was removed from the cluster",
			Remedy: "join again with an empty data directory"}
	}
	if have, err := t.Node(c.ID); err == nil {
		n.Joined, n.Name, n.Role, n.Offline = have.Joined, have.Name, have.Role, have.Offline
	} else {
		if count[Node](&t.View, tNode, byID, nil) >= NodesMax {
			return Result{}, &Error{Err: ErrNoSpace, Object: "node " + c.ID.String(), Detail: fmt.Sprintf("%d nodes", NodesMax)}
		}
		n.Name = t.freeNodeName(c.Spec.Name)
	}
	t.put(tNode, n)
	return Result{Object: c.ID}, nil
}

// freeNodeName gives a node the name that it asks for, or that with a number.
func (t *tx) freeNodeName(name string) string {
	taken := make(map[string]bool)
	for _, n := range t.Nodes() {
		taken[n.Name] = true
	}
	free := name
	for i := 2; taken[free]; i++ {
		suffix := "-" + strconv.Itoa(i)
		free = name[:min(len(name), 63-len(suffix))] + suffix
	}
	return free
}

// SetNode changes a node's role or what is expected of it. Rev 0 changes whatever is there.
type SetNode struct {
	ID      uuid.UUID `json:"id"`
	Rev     uint64    `json:"rev,omitempty"`
	Role    *string   `json:"role,omitempty"`
	Offline *bool     `json:"offline,omitempty"`
}

func (*SetNode) kind() (string, int) { return "set_node", 1 }

func (c *SetNode) check() error {
	if c.Role != nil && *c.Role != RoleMaster && *c.Role != RoleExtra {
		return invalid("node "+c.ID.String(), "role "+quote(*c.Role))
	}
	return nil
}

func (c *SetNode) apply(t *tx) (Result, error) {
	n, err := t.Node(c.ID)
	if err != nil {
		return Result{}, err
	}
	if err := fresh("node "+quote(n.Name), c.Rev, n.Rev); err != nil {
		return Result{}, err
	}
	if c.Role != nil {
		n.Role = *c.Role
	}
	if c.Offline != nil {
		n.Offline = *c.Offline
	}
	if !t.mastersBeside(n.ID) && (n.Role != RoleMaster || n.Offline) {
		return Result{}, lastMaster(n)
	}
	n.Rev = t.index
	t.put(tNode, &n)
	return Result{Object: n.ID}, nil
}

// mastersBeside says whether another master than id is expected to be there.
func (t *tx) mastersBeside(id uuid.UUID) bool {
	return slices.ContainsFunc(t.Nodes(), func(n Node) bool { return n.ID != id && n.Role == RoleMaster && !n.Offline })
}

func lastMaster(n Node) error {
	return &Error{Err: ErrConflict, Object: "node " + quote(n.Name), Detail: "is the last master that is there",
		Remedy: "let another master join, or promote one, first"}
}

// RemoveNode takes a node out of the cluster. Without Force it is refused while the node owns something.
type RemoveNode struct {
	ID    uuid.UUID `json:"id"`
	Rev   uint64    `json:"rev,omitempty"`
	Force bool      `json:"force,omitempty"`
}

func (*RemoveNode) kind() (string, int) { return "remove_node", 1 }

func (c *RemoveNode) check() error { return nil }

func (c *RemoveNode) apply(t *tx) (Result, error) {
	n, err := t.Node(c.ID)
	if err != nil {
		return Result{}, err
	}
	object := "node " + quote(n.Name)
	if err := fresh(object, c.Rev, n.Rev); err != nil {
		return Result{}, err
	}
	if !t.mastersBeside(n.ID) {
		return Result{}, lastMaster(n)
	}
	if by := t.ownedBy(n.ID); len(by) > 0 && !c.Force {
		return Result{}, &Error{Err: ErrConflict, Object: object, Detail: "owns vpools or volumes", By: by,
			Remedy: "move or delete them first, or force the removal, which gives them up"}
	}
	if !c.Force {
		if err := t.free(Ref{Kind: tNode, ID: n.ID}, object); err != nil {
			return Result{}, err
		}
	}
	t.del(tNode, &n)
	t.put(tRemoved, &Removed{ID: n.ID, Name: n.Name, At: t.at, Rev: t.index})
	return Result{Object: n.ID}, nil
}

// ownedBy names vPools whose backend is on a node, and volumes that it owns.
func (t *tx) ownedBy(id uuid.UUID) []string {
	var by []string
	add := func(name string) bool {
		if len(by) == blockersListedMax {
			by = append(by, "…")
			return false
		}
		by = append(by, name)
		return true
	}
	for _, p := range t.VPools() {
		if p.Backend.Node == id && !add("vpool "+p.Name) {
			return by
		}
	}
	rows(&t.View, tVolume, byID, nil, func(v *Volume) bool { return v.Owner != id || add("volume "+v.ID.String()) })
	return by
}

// AddJoinToken lets one node join until it expires.
type AddJoinToken struct {
	Hash    []byte `json:"hash"`
	Role    string `json:"role"`
	Expires Time   `json:"expires"`
}

func (*AddJoinToken) kind() (string, int) { return "add_join_token", 1 }

func (c *AddJoinToken) check() error {
	if len(c.Hash) != len(Secret{}) || c.Role != RoleMaster && c.Role != RoleExtra {
		return invalid("join token", "no hash, or role "+quote(c.Role))
	}
	return nil
}

func (c *AddJoinToken) apply(t *tx) (Result, error) {
	kept := 0
	for _, old := range all[JoinToken](&t.View, tJoinToken, byID, nil) {
		if old.Expires < t.at {
			t.del(tJoinToken, &old)
		} else if kept++; kept >= JoinTokensMax {
			return Result{}, &Error{Err: ErrNoSpace, Object: "join token", Detail: fmt.Sprintf("%d of them are open", kept),
				Remedy: "wait until some expire"}
		}
	}
	tok := &JoinToken{Role: c.Role, Created: t.at, Expires: c.Expires, Rev: t.index}
	copy(tok.Hash[:], c.Hash)
	t.put(tJoinToken, tok)
	return Result{}, nil
}

// UseJoinToken admits a node: it gets a record with the token's role. Key is the SHA-256 of the public key that it will be
// certified for.
type UseJoinToken struct {
	Hash []byte    `json:"hash"`
	Node uuid.UUID `json:"node"`
	Key  []byte    `json:"key"`
	Spec NodeSpec  `json:"spec"`
}

func (*UseJoinToken) kind() (string, int) { return "use_join_token", 1 }

func (c *UseJoinToken) check() error {
	if c.Node == uuid.Nil || len(c.Hash) != len(Secret{}) || len(c.Key) != 32 {
		return invalid("join request", "no id, secret or key")
	}
	spec := c.Spec
	spec.Role = RoleExtra // the token's counts
	return spec.check("join request")
}

func (c *UseJoinToken) apply(t *tx) (Result, error) {
	const object = "join token"
	tok, ok := first[JoinToken](&t.View, tJoinToken, byID, c.Hash)
	if !ok || tok.Expires < t.at {
		return Result{}, &Error{Err: ErrNotFound, Object: object, Detail: "or it has expired", Remedy: "make a new one: varve cluster token create"}
	}
	if tok.Node != uuid.Nil && (tok.Node != c.Node || !bytes.Equal(tok.Key, c.Key)) {
		return Result{}, &Error{Err: ErrConflict, Object: object, Detail: "has been used", Remedy: "make a new one: varve cluster token create"}
	}
	spec := c.Spec
	spec.Role = tok.Role
	if _, err := (&RegisterNode{ID: c.Node, Spec: spec}).apply(t); err != nil {
		return Result{}, err
	}
	used := *tok
	used.Node, used.Key, used.Rev = c.Node, bytes.Clone(c.Key), t.index
	t.put(tJoinToken, &used)
	return Result{Object: c.Node}, nil
}

// Nodes returns all nodes, by id.
func (v *View) Nodes() []Node { return all[Node](v, tNode, byID, nil) }

// Node returns one node.
func (v *View) Node(id uuid.UUID) (Node, error) {
	n, ok := first[Node](v, tNode, byID, id[:])
	if !ok {
		return Node{}, missing("node " + id.String())
	}
	return *n, nil
}

// NodeRemoved says whether a node was taken out of the cluster.
func (v *View) NodeRemoved(id uuid.UUID) bool {
	_, ok := first[Removed](v, tRemoved, byID, id[:])
	return ok
}

// RemovedNodes returns all that were taken out, by id.
func (v *View) RemovedNodes() []Removed { return all[Removed](v, tRemoved, byID, nil) }

// JoinTokens returns the open and the used tokens.
func (v *View) JoinTokens() []JoinToken { return all[JoinToken](v, tJoinToken, byID, nil) }
