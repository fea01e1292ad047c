package auth

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"golang.org/x/crypto/argon2"
)

// Parameters of argon2id (OWASP's minimum is 19 MiB, t=2, p=1) and limits of what is taken from a stored hash.
const (
	argonMemoryKiB = 32 << 10
	argonPasses    = 2
	argonLanes     = 1
	argonKeyBytes  = 32
	saltBytes      = 16
	memoryKiBMax   = 256 << 10
	passesMax      = 16
	hashingAtOnce  = 2

	// PasswordBytesMin and Max bound a new password.
	PasswordBytesMin = 12
	PasswordBytesMax = 1024
)

// ErrWeakPassword refuses a new password; the text says why.
var ErrWeakPassword = errors.New("password is too weak")

// hasher runs argon2id for at most hashingAtOnce callers: each takes 32 MiB, and what signs in is not yet known to be anybody.
type hasher struct{ slots chan struct{} }

func newHasher() hasher { return hasher{slots: make(chan struct{}, hashingAtOnce)} }

func (h hasher) key(ctx context.Context, password string, salt []byte, passes, memoryKiB uint32, lanes uint8, n uint32) ([]byte, error) {
	select {
	case h.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-h.slots }()
	return argon2.IDKey([]byte(password), salt, passes, memoryKiB, lanes, n), nil
}

// hash makes a PHC string: $argon2id$v=19$m=…,t=…,p=…$salt$hash.
func (h hasher) hash(ctx context.Context, password string) (string, error) {
	salt := make([]byte, saltBytes)
	rand.Read(salt)
	key, err := h.key(ctx, password, salt, argonPasses, argonMemoryKiB, argonLanes, argonKeyBytes)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, argonMemoryKiB, argonPasses, argonLanes,
		base64.RawStdEncoding.EncodeToString(salt), base64.RawStdEncoding.EncodeToString(key)), nil
}

// phc is a stored hash taken apart.
type phc struct {
	memoryKiB, passes uint32
	lanes             uint8
	salt, key         []byte
}

func parsePHC(s string) (phc, bool) {
	var p phc
	parts := strings.Split(s, "$")
	if len(parts) != 6 || parts[0] != "" || parts[1] != "argon2id" || parts[2] != fmt.Sprintf("v=%d", argon2.Version) {
		return p, false
	}
	if n, err := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &p.memoryKiB, &p.passes, &p.lanes); err != nil || n != 3 {
		return p, false
	}
	var err1, err2 error
	p.salt, err1 = base64.RawStdEncoding.DecodeString(parts[4])
	p.key, err2 = base64.RawStdEncoding.DecodeString(parts[5])
	ok := err1 == nil && err2 == nil && len(p.salt) >= 8 && len(p.key) >= 16 && len(p.key) <= 64 &&
		p.memoryKiB <= memoryKiBMax && p.passes >= 1 && p.passes <= passesMax && p.lanes >= 1 && p.lanes <= 16
	return p, ok
}

// dummy is the hash that is checked where there is no user, so that the answer takes as long as for one.
var dummy = phc{memoryKiB: argonMemoryKiB, passes: argonPasses, lanes: argonLanes, salt: make([]byte, saltBytes), key: make([]byte, argonKeyBytes)}

// verify says whether the password is the one of a stored hash, and whether that was made with other parameters than today's. A
// stored hash that is none takes as long and is never right.
func (h hasher) verify(ctx context.Context, stored, password string) (right, old bool, err error) {
	p, known := parsePHC(stored)
	if !known {
		p = dummy
	}
	if len(password) > PasswordBytesMax {
		password, known = "", false
	}
	key, err := h.key(ctx, password, p.salt, p.passes, p.memoryKiB, p.lanes, uint32(len(p.key)))
	if err != nil {
		return false, false, err
	}
	right = subtle.ConstantTimeCompare(key, p.key) == 1 && known
	return right, right && (p.memoryKiB != argonMemoryKiB || p.passes != argonPasses || p.lanes != argonLanes), nil
}

// common are passwords of at least PasswordBytesMin bytes that lists of stolen ones hold often. Shorter ones are refused anyway.
var common = words(`123456789012 1234567890123 12345678901234 123456789123 1234567890qwe 1q2w3e4r5t6y 1qaz2wsx3edc 1qaz2wsx3edc4rfv
	qwertyuiop12 qwertyuiop123 qwertyuiopas qwertyuiop[] qwertyasdfgh qwerty123456 qwerty1234567 asdfghjkl123 zaq12wsxcde3 q1w2e3r4t5y6
	passwordpassword password1234 password12345 password123456 passw0rd1234 p@ssw0rd1234 p@ssword1234 adminadminadmin administrator
	administrator1 administrator123 admin1234567 admin12345678 rootrootroot changeme1234 changemechangeme letmein12345 letmeinletmein
	welcome12345 welcome123456 iloveyou1234 iloveyouiloveyou unbelievable abcdefghijkl abcdefghijklm abcd12345678 abc123456789
	a1b2c3d4e5f6 aa123456789a sunshine1234 princess1234 football1234 baseball1234 superman1234 michelle1234 correcthorse
	correcthorsebatterystaple trustno1trustno1 dragondragon monkeymonkey masterpassword secretsecret supersecret123 mypassword123
	vmware123456 vmwarevmware storage12345 varvevarvevarve`)

func words(s string) map[string]bool {
	m := make(map[string]bool)
	for w := range strings.FieldsSeq(s) {
		m[w] = true
	}
	return m
}

const differentMin = 5

// CheckPassword refuses a new password that is short, widely known, or made of its user's name.
func CheckPassword(user, password string) error {
	weak := func(why string) error { return fmt.Errorf("%w: %s", ErrWeakPassword, why) }
	switch {
	case len(password) < PasswordBytesMin:
		return weak(fmt.Sprintf("it has fewer than %d characters", PasswordBytesMin))
	case len(password) > PasswordBytesMax:
		return weak(fmt.Sprintf("it has more than %d bytes", PasswordBytesMax))
	case !utf8.ValidString(password):
		return weak("it is not UTF-8")
	}
	lower := strings.ToLower(password)
	different := make(map[rune]bool)
	for _, r := range lower {
		different[r] = true
	}
	rest := strings.ReplaceAll(strings.ReplaceAll(lower, strings.ToLower(user), ""), "varve", "")
	switch {
	case common[lower]:
		return weak("it is one that many use")
	case len(different) < differentMin:
		return weak(fmt.Sprintf("it has fewer than %d different characters", differentMin))
	case isRun(lower):
		return weak("it is a run of neighbours")
	case len(user) >= 3 && len(rest) < PasswordBytesMin/2:
		return weak("it is little more than the user's name")
	}
	return nil
}

// isRun says whether each character follows the one before, up or down.
func isRun(s string) bool {
	for _, step := range []rune{1, -1} {
		run, last := true, rune(-1)
		for _, r := range s {
			if last >= 0 && r != last+step && !(step == 1 && last == '9' && r == '0') && !(step == -1 && last == '0' && r == '9') {
				run = false
				break
			}
			last = r
		}
		if run {
			return true
		}
	}
	return false
}
