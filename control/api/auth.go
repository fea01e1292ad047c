package api

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"strings"

	"github.com/labstack/echo/v4"

	"varve/control/durable"
	"varve/control/state"
)

// access says who may call a route.
type access int

const (
	admin access = iota // the zero value is the strictest
	local
	open
)

const (
	tokenPrefix   = "varve_" // so that secret scanners know it
	tokenBytesMax = 256
	adminToken    = "admin"
	tokenFile     = "admin.token"
)

// allow checks the caller against the route's access. who is for the log.
func (s *Server) allow(c echo.Context, a access) (who string, err error) {
	r := c.Request()
	if a == open {
		return "anyone", nil
	}
	if p, ok := r.Context().Value(peerKey{}).(peer); ok && p.unix {
		if p.known && (p.uid == 0 || p.uid == s.self) {
			return fmt.Sprintf("uid %d", p.uid), nil
		}
		return "", refuse(http.StatusForbidden, "forbidden", "this user may not administer the appliance",
			"run the command as root or as the appliance's user")
	}
	if a == local && isLoopback(r.RemoteAddr) && r.Header.Get("X-Forwarded-For") == "" && r.Header.Get("Forwarded") == "" {
		return "loopback", nil
	}
	header := r.Header.Get("Authorization")
	scheme, token, _ := strings.Cut(header, " ")
	if header == "" || !strings.EqualFold(scheme, "Bearer") {
		return "", refuse(http.StatusUnauthorized, "unauthenticated", "a bearer token is needed",
			"send the token in DATA/admin.token of the appliance")
	}
	name, ok := s.tokenName(token)
	if !ok {
		return "", refuse(http.StatusUnauthorized, "unauthenticated", "the token is not valid",
			"send the token in DATA/admin.token of the appliance")
	}
	return "token " + name, nil
}

// tokenName returns the name of the token, which must be that of an administrator: there is no other role yet.
func (s *Server) tokenName(token string) (name string, ok bool) {
	if len(token) > tokenBytesMax {
		return "", false
	}
	hash := sha256.Sum256([]byte(token))
	for _, t := range s.cfg.Store.View().Tokens() {
		if subtle.ConstantTimeCompare(hash[:], t.Hash[:]) == 1 && t.Role == state.RoleAdmin {
			name, ok = t.Name, true
		}
	}
	return name, ok
}

func isLoopback(remote string) bool {
	host, _, err := net.SplitHostPort(remote)
	ip := net.ParseIP(host)
	return err == nil && ip != nil && ip.IsLoopback()
}

// EnsureAdminToken makes the administrator's token if the cluster has none yet: the token into dir/admin.token, for this
// user alone, then its hash into the state. created says that it did. A file that was moved away is not made again.
func EnsureAdminToken(ctx context.Context, raft interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}, store *state.Store, dir string) (created bool, err error) {
	if _, err := store.View().Token(adminToken); err == nil {
		return false, nil
	}
	secret := make([]byte, 32)
	rand.Read(secret)
	token := tokenPrefix + base64.RawURLEncoding.EncodeToString(secret)
	if err := durable.Replace(dir, tokenFile, []byte(token+"\n"), 0o600); err != nil {
		return false, fmt.Errorf("keep the admin token: %w", err)
	}
	hash := sha256.Sum256([]byte(token))
	if _, err := raft.Apply(ctx, &state.SetToken{Name: adminToken, Hash: hash[:], Role: state.RoleAdmin}); err != nil {
		return false, fmt.Errorf("make the admin token: %w", err)
	}
	return true, nil
}
