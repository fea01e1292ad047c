package auth

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base32"
	"strings"
	"sync"
)

// setupTriesMax wrong codes lock the set-up until a new code is made.
const setupTriesMax = 10

// setupCode is the one-time code by which whoever reads the appliance's own output makes the first administrator. It lives in memory:
// every start of an appliance without users makes another one.
type setupCode struct {
	// mu guards the fields below.
	mu    sync.Mutex
	code  string
	tries int
}

// renew makes a code of 60 random bits, in three groups of four characters.
func (s *setupCode) renew() string {
	b := make([]byte, 8)
	rand.Read(b)
	text := base32.StdEncoding.EncodeToString(b)[:12]
	s.mu.Lock()
	defer s.mu.Unlock()
	s.code, s.tries = text[:4]+"-"+text[4:8]+"-"+text[8:], 0
	return s.code
}

// check says whether the code is right, and whether no more will be looked at.
func (s *setupCode) check(code string) (right, locked bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.code == "" || s.tries >= setupTriesMax {
		return false, true
	}
	plain := func(c string) []byte {
		return []byte(strings.ReplaceAll(strings.ToUpper(strings.TrimSpace(c)), "-", ""))
	}
	if subtle.ConstantTimeCompare(plain(code), plain(s.code)) == 1 {
		return true, false
	}
	s.tries++
	return false, s.tries >= setupTriesMax
}

// spend takes the code away once it has been used.
func (s *setupCode) spend() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.code = ""
}
