package auth

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha1"
	"crypto/subtle"
	"encoding/base32"
	"encoding/binary"
	"fmt"
	"net/url"
	"time"
)

// Parameters of RFC 6238 that every authenticator app takes: SHA-1, 6 digits, 30 s; one step of skew each way.
const (
	totpKeyBytes = 20
	totpStep     = 30
	totpDigits   = 6
	totpSkew     = 1
)

func newTOTPKey() []byte {
	key := make([]byte, totpKeyBytes)
	rand.Read(key)
	return key
}

func totpCode(key []byte, step int64) string {
	mac := hmac.New(sha1.New, key)
	mac.Write(binary.BigEndian.AppendUint64(nil, uint64(step)))
	sum := mac.Sum(nil)
	at := sum[len(sum)-1] & 0xf
	n := binary.BigEndian.Uint32(sum[at:]) & 0x7fffffff
	return fmt.Sprintf("%0*d", totpDigits, n%1_000_000)
}

// totpMatch returns the step of the code, which must be later than last, or 0.
func totpMatch(key []byte, code string, now time.Time, last int64) int64 {
	at := now.Unix() / totpStep
	var found int64
	for step := at - totpSkew; step <= at+totpSkew; step++ {
		if subtle.ConstantTimeCompare([]byte(totpCode(key, step)), []byte(code)) == 1 && step > last && found == 0 {
			found = step
		}
	}
	return found
}

// totpURI is what a QR code for an authenticator app holds.
func totpURI(key []byte, user, issuer string) string {
	q := url.Values{"secret": {base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(key)}, "issuer": {issuer}}
	return (&url.URL{Scheme: "otpauth", Host: "totp", Path: "/" + issuer + ":" + user, RawQuery: q.Encode()}).String()
}

// CodeOf is the code that an authenticator app would show for a key given as URI, at a time.
func CodeOf(uri string, at time.Time) (string, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return "", fmt.Errorf("read key: %w", err)
	}
	key, err := base32.StdEncoding.WithPadding(base32.NoPadding).DecodeString(u.Query().Get("secret"))
	if err != nil {
		return "", fmt.Errorf("read key: %w", err)
	}
	return totpCode(key, at.Unix()/totpStep), nil
}
