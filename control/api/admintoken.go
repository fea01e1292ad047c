package api

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"

	"varve/control/auth"
	"varve/control/durable"
	"varve/control/state"
)

const (
	adminToken = "admin"
	tokenFile  = "admin.token"
)

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
	token := auth.TokenPrefix + base64.RawURLEncoding.EncodeToString(secret)
	if err := durable.Replace(dir, tokenFile, []byte(token+"\n"), 0o600); err != nil {
		return false, fmt.Errorf("keep the admin token: %w", err)
	}
	hash := sha256.Sum256([]byte(token))
	if _, err := raft.Apply(ctx, &state.SetToken{Name: adminToken, Hash: hash[:], Role: state.RoleAdmin}); err != nil {
		return false, fmt.Errorf("make the admin token: %w", err)
	}
	return true, nil
}
