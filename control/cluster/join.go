package cluster

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/control/pki"
	"varve/control/raft"
	"varve/control/state"
	"varve/control/wire"
)

// Bounds of joining.
const (
	tokenPrefix   = "varve_join_"
	tokenBytesMax = 4 << 10
	addressesMax  = 16
	joinBytesMax  = 64 << 10
	joinsPerTen   = 20 // requests in ten seconds, of all joiners together
	// JoinTimeout is how long Join tries.
	JoinTimeout = time.Minute
	// TokenTTL is how long a token lives if nothing else is asked for; TokenTTLMax at most.
	TokenTTL    = time.Hour
	TokenTTLMax = 24 * time.Hour
)

// token is what is in a join token.
type token struct {
	Addresses []string `json:"a"`
	CA        []byte   `json:"h"` // SHA-256 of the CA certificate
	Secret    []byte   `json:"s"`
}

func (t token) String() string {
	b, err := json.Marshal(t)
	if err != nil {
		panic(err) // strings and bytes
	}
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(b)
}

var errToken = &state.Error{Err: state.ErrInvalid, Object: "join token", Remedy: "copy it whole from varve cluster token create"}

func parseToken(s string) (token, error) {
	s = strings.TrimSpace(s)
	rest, ok := strings.CutPrefix(s, tokenPrefix)
	if !ok || len(s) > tokenBytesMax {
		return token{}, errToken
	}
	b, err := base64.RawURLEncoding.DecodeString(rest)
	if err != nil {
		return token{}, errToken
	}
	var t token
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if d.Decode(&t) != nil || len(t.CA) != sha256.Size || len(t.Secret) != 32 || len(t.Addresses) == 0 || len(t.Addresses) > addressesMax {
		return token{}, errToken
	}
	return t, nil
}

// CreateToken makes a token that lets one node join with a role.
func (c *Cluster) CreateToken(ctx context.Context, role string, ttl time.Duration) (string, time.Time, error) {
	if ttl == 0 {
		ttl = TokenTTL
	}
	if ttl < 0 || ttl > TokenTTLMax {
		return "", time.Time{}, &state.Error{Err: state.ErrInvalid, Object: "join token", Detail: "cannot live " + ttl.String(),
			Remedy: "give up to " + TokenTTLMax.String()}
	}
	n := c.raft()
	if n == nil {
		return "", time.Time{}, fmt.Errorf("%w: the node is starting", raft.ErrUnavailable)
	}
	secret := make([]byte, 32)
	rand.Read(secret)
	hash, ca := sha256.Sum256(secret), c.cfg.PKI.CAHash()
	expires := time.Now().Add(ttl)
	if _, err := n.Apply(ctx, &state.AddJoinToken{Hash: hash[:], Role: role, Expires: state.Time(expires.UnixNano())}); err != nil {
		return "", time.Time{}, err
	}
	own := c.cfg.Advertise()
	addresses := []string{own}
	for _, m := range n.State().View().Nodes() {
		if m.Peer != "" && m.Peer != own && !m.Offline && len(addresses) < addressesMax {
			addresses = append(addresses, m.Peer)
		}
	}
	return token{Addresses: addresses, CA: ca[:], Secret: secret}.String(), expires, nil
}

// joinRequest is what a joiner sends once it knows whom it talks to.
type joinRequest struct {
	Secret []byte         `json:"secret"`
	Node   pki.Request    `json:"node"`
	Server pki.Request    `json:"server"`
	Spec   state.NodeSpec `json:"spec"`
}

type joinAnswer struct {
	pki.Admitted
	Cluster uuid.UUID            `json:"cluster"`
	Peers   map[uuid.UUID]string `json:"peers"`
	// Secrets are the keys of sealed secrets.
	Secrets []byte `json:"secrets,omitempty"`
}

// joinHandler takes join requests to the leader. It is the one handler that strangers reach.
func (c *Cluster) joinHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /join", func(w http.ResponseWriter, r *http.Request) {
		wire.Serve(w, r, joinBytesMax, func(ctx context.Context, body []byte) (any, error) {
			if !c.mayJoin(time.Now()) {
				return nil, errors.New("too many join requests")
			}
			n := c.raft()
			if n == nil {
				return nil, fmt.Errorf("%w: the node is starting", raft.ErrUnavailable)
			}
			leader := n.Leader()
			if leader == c.cfg.Self {
				return c.admit(ctx, n, body)
			}
			if leader == uuid.Nil {
				return nil, fmt.Errorf("%w: the cluster has no leader now", raft.ErrUnavailable)
			}
			var a joinAnswer
			ctx, cancel := context.WithTimeout(ctx, callTimeout)
			defer cancel()
			return &a, c.callRaw(ctx, leader, "join", body, &a)
		})
	})
	return mux
}

// mayJoin bounds guessing, and what strangers can make the leader do.
func (c *Cluster) mayJoin(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.joined = slices.DeleteFunc(c.joined, func(t time.Time) bool { return now.Sub(t) > 10*time.Second })
	if len(c.joined) >= joinsPerTen {
		return false
	}
	c.joined = append(c.joined, now)
	return true
}

// admit is the leader's part.
func (c *Cluster) admit(ctx context.Context, n *raft.Node, body []byte) (*joinAnswer, error) {
	var r joinRequest
	if err := json.Unmarshal(body, &r); err != nil {
		return nil, &state.Error{Err: state.ErrInvalid, Object: "join request", Detail: err.Error()}
	}
	if !n.IsLeader() {
		return nil, &raft.NotLeaderError{Leader: n.Leader()}
	}
	if !c.cfg.PKI.HasCAKey() { // before the token is used
		return nil, fmt.Errorf("%w: the leader is fetching the authority's key", raft.ErrUnavailable)
	}
	key, err := r.Node.KeyHash()
	if err != nil {
		return nil, &state.Error{Err: state.ErrInvalid, Object: "join request", Detail: err.Error()}
	}
	var keys []byte
	if c.cfg.Secrets != nil { // before the token is used
		if keys, err = c.cfg.Secrets(); err != nil {
			return nil, fmt.Errorf("%w: keys of sealed secrets: %w", raft.ErrUnavailable, err)
		}
	}
	hash := sha256.Sum256(r.Secret)
	_, err = n.Apply(ctx, &state.UseJoinToken{Hash: hash[:], Node: r.Node.Node, Key: key[:], Spec: r.Spec})
	if err != nil {
		return nil, err
	}
	a := &joinAnswer{Cluster: c.cfg.Cluster, Peers: make(map[uuid.UUID]string), Secrets: keys}
	a.CA = c.cfg.PKI.CACert()
	r.Node.Purpose, r.Server.Purpose = pki.ForNode, pki.ForServer
	if a.Node, err = c.sign(r.Node); err != nil {
		return nil, err
	}
	if a.Server, err = c.sign(r.Server); err != nil {
		return nil, err
	}
	for _, m := range n.State().View().Nodes() {
		if m.ID != r.Node.Node && m.Peer != "" {
			a.Peers[m.ID] = m.Peer
		}
	}
	a.Peers[c.cfg.Self] = c.cfg.Advertise()
	select {
	case c.kick <- struct{}{}:
	default:
	}
	c.cfg.Log.Info("a node was admitted", "node", r.Node.Node, "name", r.Spec.Name)
	return a, nil
}

// JoinConfig says what joins and where its files go.
type JoinConfig struct {
	ControlDir, TLSDir string
	// Spec is the node's name, version and, where it is known, its node port's address.
	Spec state.NodeSpec
	// Hosts are for its server certificate.
	Hosts []string
	// KeepSecrets takes the keys of sealed secrets; nil forgets them.
	KeepSecrets func(bundle []byte) error
}

// Joined says what came of it.
type Joined struct{ Cluster, Node uuid.UUID }

// Join uses a token: afterwards the directories are those of a node of the cluster, to be started. It is for directories that
// hold no node yet. While the cluster has no leader it tries again, for a minute.
func Join(ctx context.Context, tok string, conf JoinConfig) (Joined, error) {
	t, err := parseToken(tok)
	if err != nil {
		return Joined{}, err
	}
	id := uuid.New()
	nodeKey, nodeReq, err := pki.NewRequest(pki.ForNode, id, nil)
	if err != nil {
		return Joined{}, err
	}
	serverKey, serverReq, err := pki.NewRequest(pki.ForServer, id, conf.Hosts)
	if err != nil {
		return Joined{}, err
	}
	conf.Spec.Role = state.RoleExtra // the token's counts
	body, err := json.Marshal(joinRequest{Secret: t.Secret, Node: nodeReq, Server: serverReq, Spec: conf.Spec})
	if err != nil {
		return Joined{}, fmt.Errorf("encode join request: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, JoinTimeout)
	defer cancel()
	a, err := t.ask(ctx, body)
	if err != nil {
		return Joined{}, fmt.Errorf("join the cluster: %w", err)
	}
	if sum := sha256.Sum256(a.CA); !bytes.Equal(sum[:], t.CA) {
		return Joined{}, errors.New("join the cluster: the answer's authority is not the token's")
	}
	if err := pki.Install(conf.TLSDir, a.Admitted, nodeKey, serverKey); err != nil {
		return Joined{}, fmt.Errorf("keep the certificates: %w", err)
	}
	if len(a.Secrets) > 0 && conf.KeepSecrets != nil {
		if err := conf.KeepSecrets(a.Secrets); err != nil {
			return Joined{}, fmt.Errorf("keep the keys of sealed secrets: %w", err)
		}
	}
	if err := raft.WriteJoining(conf.ControlDir, a.Cluster, id); err != nil {
		return Joined{}, err
	}
	if err := savePeers(conf.ControlDir, a.Peers); err != nil {
		return Joined{}, err
	}
	return Joined{Cluster: a.Cluster, Node: id}, nil
}

// ask tries the token's addresses in turn until one answers for good.
func (t token) ask(ctx context.Context, body []byte) (joinAnswer, error) {
	client := &http.Client{Transport: &http.Transport{DialTLSContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
		return t.dial(ctx, addr)
	}, DisableKeepAlives: true}}
	defer client.CloseIdleConnections()
	pause := 100 * time.Millisecond
	for {
		var errs []error
		for _, addr := range t.Addresses {
			var a joinAnswer
			err := post(ctx, client, "https://"+addr+"/join", body, &a)
			if err == nil {
				return a, nil
			}
			if _, refused := errors.AsType[*state.Error](err); refused {
				return joinAnswer{}, err
			}
			errs = append(errs, fmt.Errorf("%s: %w", addr, err))
		}
		select {
		case <-ctx.Done():
			return joinAnswer{}, errors.Join(append(errs, ctx.Err())...)
		case <-time.After(pause):
			pause = min(2*pause, 2*time.Second)
		}
	}
}

func post(ctx context.Context, client *http.Client, url string, body []byte, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, 2*callTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	return wire.Read(res, joinBytesMax, answer)
}

// dial connects to a node that proves to be of the token's cluster, before anything is sent.
func (t token) dial(ctx context.Context, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{protoJoin},
		InsecureSkipVerify: true, VerifyConnection: t.verify}) // verify does it all: there is no name to check yet
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

func (t token) verify(cs tls.ConnectionState) error {
	if len(cs.PeerCertificates) != 2 {
		return errors.New("the node shows no authority")
	}
	leaf, ca := cs.PeerCertificates[0], cs.PeerCertificates[1]
	if sum := sha256.Sum256(ca.Raw); !bytes.Equal(sum[:], t.CA) {
		return errors.New("the node is of another cluster than the token")
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
		return err
	}
	_, err := pki.PeerOf(leaf)
	return err
}
