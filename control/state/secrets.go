package state

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/google/uuid"
)

// SealedSecret is a secret as it may lie in logs, snapshots and backups: ciphertext, and the name of the key that opens it
// (package control/secrets).
type SealedSecret struct {
	Name   string `json:"name"`
	Key    string `json:"key"`
	Sealed []byte `json:"sealed"`
	Rev    uint64 `json:"rev"`
}

// Limits of secrets.
const (
	SecretsMax           = 4096
	SecretNameBytesMax   = 128
	SealedSecretBytesMax = 8 << 10
)

const tSecret = "secret"

// KEKOf names the secret with the key encryption key of a vPool. It goes when the vPool does, and with it every copy of what
// the vPool's encrypted vDisks held.
func KEKOf(pool uuid.UUID) string { return vpoolSecrets(pool) + "kek" }

// S3KeysOf names the secret with the credentials of a vPool's S3 backend. It goes when the vPool does.
func S3KeysOf(pool uuid.UUID) string { return vpoolSecrets(pool) + "s3" }

func vpoolSecrets(pool uuid.UUID) string { return "vpool/" + pool.String() + "/" }

func secretTable(frame byte) object {
	o := rowObject[SealedSecret](frame, tSecret, map[string]index{byID: always(func(s *SealedSecret) []byte { return []byte(s.Name) })})
	o.commands = []func() Command{command[SetSecret], command[DeleteSecret]}
	o.gone = func(t *tx, at Ref) {
		if at.Kind != ScopeVPool {
			return
		}
		for _, s := range all[SealedSecret](&t.View, tSecret, byID, []byte(vpoolSecrets(at.ID))) {
			t.del(tSecret, &s)
		}
	}
	return o
}

// SetSecret keeps a sealed secret. Rev 0 replaces whatever is there.
type SetSecret struct {
	Name   string `json:"name"`
	Key    string `json:"key"`
	Sealed []byte `json:"sealed"`
	Rev    uint64 `json:"rev,omitempty"`
}

func (*SetSecret) kind() (string, int) { return "set_secret", 1 }

func (c *SetSecret) check() error {
	object := "secret " + quote(c.Name)
	switch {
	case c.Name == "" || len(c.Name) > SecretNameBytesMax || !utf8.ValidString(c.Name) || strings.HasPrefix(c.Name, "/"):
		return invalid(object, "not a name")
	case c.Key == "" || len(c.Key) > SecretNameBytesMax || !utf8.ValidString(c.Key):
		return invalid(object, "sealed by no key")
	case len(c.Sealed) == 0 || len(c.Sealed) > SealedSecretBytesMax:
		return invalid(object, fmt.Sprintf("%d sealed bytes", len(c.Sealed)))
	}
	return nil
}

func (c *SetSecret) apply(t *tx) (Result, error) {
	object := "secret " + quote(c.Name)
	have, found := first[SealedSecret](&t.View, tSecret, byID, []byte(c.Name))
	switch {
	case found:
		if err := fresh(object, c.Rev, have.Rev); err != nil {
			return Result{}, err
		}
	case c.Rev != 0:
		return Result{}, missing(object)
	case count[SealedSecret](&t.View, tSecret, byID, nil) >= SecretsMax:
		return Result{}, &Error{Err: ErrNoSpace, Object: object, Detail: fmt.Sprintf("%d secrets", SecretsMax)}
	}
	t.put(tSecret, &SealedSecret{Name: c.Name, Key: c.Key, Sealed: append([]byte(nil), c.Sealed...), Rev: t.index})
	return Result{Created: !found}, nil
}

// DeleteSecret forgets a secret.
type DeleteSecret struct {
	Name string `json:"name"`
}

func (*DeleteSecret) kind() (string, int) { return "delete_secret", 1 }

func (c *DeleteSecret) check() error { return nil }

func (c *DeleteSecret) apply(t *tx) (Result, error) {
	have, found := first[SealedSecret](&t.View, tSecret, byID, []byte(c.Name))
	if !found {
		return Result{}, missing("secret " + quote(c.Name))
	}
	t.del(tSecret, have)
	return Result{}, nil
}

// Secret returns a sealed secret.
func (v *View) Secret(name string) (SealedSecret, error) {
	s, ok := first[SealedSecret](v, tSecret, byID, []byte(name))
	if !ok {
		return SealedSecret{}, missing("secret " + quote(name))
	}
	return *s, nil
}

// Secrets returns all sealed secrets, by name.
func (v *View) Secrets() []SealedSecret { return all[SealedSecret](v, tSecret, byID, nil) }
