package auth

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// Codes of RFC 6238, appendix B (SHA-1), cut to six digits.
func TestTOTPVectors(t *testing.T) {
	key := []byte("12345678901234567890")
	for at, want := range map[int64]string{59: "287082", 1111111109: "081804", 1111111111: "050471", 1234567890: "005924", 2000000000: "279037", 20000000000: "353130"} {
		if got := totpCode(key, at/totpStep); got != want {
			t.Errorf("at %d: %s, want %s", at, got, want)
		}
	}
	now := time.Unix(1111111109, 0)
	step := now.Unix() / totpStep
	for _, c := range []struct {
		code string
		last int64
		want int64
	}{
		{totpCode(key, step), 0, step}, {totpCode(key, step-1), 0, step - 1}, {totpCode(key, step+1), 0, step + 1},
		{totpCode(key, step-2), 0, 0}, {totpCode(key, step+2), 0, 0}, {totpCode(key, step), step, 0}, {totpCode(key, step-1), step, 0},
		{"", 0, 0}, {"00000", 0, 0}, {totpCode(key, step) + "0", 0, 0},
	} {
		if got := totpMatch(key, c.code, now, c.last); got != c.want {
			t.Errorf("code %q after %d: step %d, want %d", c.code, c.last, got, c.want)
		}
	}
	uri := totpURI(key, "alice", "Varve")
	if code, err := CodeOf(uri, now); err != nil || code != "081804" {
		t.Error(uri, code, err)
	}
}

// A password verifies against its own hash alone; what is stored and damaged is nobody's password and takes as long.
func TestHash(t *testing.T) {
	h := newHasher()
	stored, err := h.hash(t.Context(), "correct horse battery")
	if err != nil || !strings.HasPrefix(stored, "$argon2id$v=19$m=32768,t=2,p=1$") {
		t.Fatal(stored, err)
	}
	again, err := h.hash(t.Context(), "correct horse battery")
	if err != nil || again == stored {
		t.Fatal("two hashes of a password are equal", err)
	}
	for _, c := range []struct {
		stored, password string
		right, old       bool
	}{
		{stored, "correct horse battery", true, false}, {stored, "correct horse batterz", false, false}, {stored, "", false, false},
		{"", "", false, false}, {"", "x", false, false}, {"$argon2id$v=19$m=32768,t=2,p=1$$", "", false, false},
		{strings.Replace(stored, "m=32768", "m=99999999", 1), "correct horse battery", false, false},
		{strings.Replace(stored, "argon2id", "argon2i", 1), "correct horse battery", false, false},
		{stored, strings.Repeat("x", PasswordBytesMax+1), false, false},
		// salt "somesalt", made by the reference implementation: echo -n password | argon2 somesalt -id -t 2 -m 16 -p 1 -l 24
		{"$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc", "password", true, true},
	} {
		right, old, err := h.verify(t.Context(), c.stored, c.password)
		if err != nil || right != c.right || old != c.old {
			t.Errorf("%q with %.20q: right %v, old %v, %v", c.stored, c.password, right, old, err)
		}
	}
}

func TestWeakPasswords(t *testing.T) {
	for _, weak := range []string{"", "short", "elevenchars", "password1234", "PassWord1234", "aaaaaaaaaaaaaaaa", "abababababab", "123456789012", "abcdefghijklm",
		"098765432109", "alicealicealice1", "varvealice12", strings.Repeat("ab1", 400), "bad\xffutf8 password"} {
		if err := CheckPassword("alice", weak); !errors.Is(err, ErrWeakPassword) {
			t.Errorf("%.30q was taken", weak)
		}
	}
	for _, good := range []string{"correct horse battery", "vijf gele olifanten", "Tr0ub4dor&3 xyz", "пароль-из-многих-слов"} {
		if err := CheckPassword("alice", good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
}

// The memory that strangers can fill is bounded, and an IPv6 host has one address, not 2^64.
func TestBackOffIsBounded(t *testing.T) {
	now := time.Unix(1, 0)
	b := newBackoff(func() time.Time { return now })
	for i := range 3 * backoffKeysMax {
		b.failed(fmt.Sprint("user", i), "192.0.2.1")
	}
	if len(b.by) > backoffKeysMax+3 {
		t.Errorf("%d counters", len(b.by))
	}
	if b.wait("anybody", "192.0.2.1") == 0 {
		t.Error("an address that fails for everybody is not slowed down")
	}
	b = newBackoff(func() time.Time { return now })
	for i := range freePair {
		b.failed("alice", fmt.Sprintf("2001:db8::%x", i))
	}
	if b.wait("alice", "2001:db8::ffff") != backoffFirst || b.wait("alice", "2001:db8:1::1") != 0 {
		t.Error(b.wait("alice", "2001:db8::ffff"), b.wait("alice", "2001:db8:1::1"))
	}
	b.succeeded("alice", "2001:db8::1")
	if b.wait("alice", "2001:db8::1") != 0 {
		t.Error("after a success")
	}
}
