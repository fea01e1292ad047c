// Package bytesize reads and writes sizes as people do: "10GiB", "512M" (binary as well), "1.5TiB", "4096", "2GB" (decimal).
package bytesize

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

var units = map[string]int64{
	"": 1, "b": 1,
	"k": 1 << 10, "kib": 1 << 10, "kb": 1e3,
	"m": 1 << 20, "mib": 1 << 20, "mb": 1e6,
	"g": 1 << 30, "gib": 1 << 30, "gb": 1e9,
	"t": 1 << 40, "tib": 1 << 40, "tb": 1e12,
}

// Parse returns the number of bytes that s stands for. A fraction must come out as whole bytes.
func Parse(s string) (int64, error) {
	text := strings.TrimSpace(s)
	end := strings.LastIndexAny(text, "0123456789.") + 1
	unit, ok := units[strings.ToLower(strings.TrimSpace(text[end:]))]
	if !ok || end == 0 || end > 20 {
		return 0, fmt.Errorf("size %q: write a number with B, KiB, MiB, GiB, TiB, KB, MB, GB or TB", clip(s))
	}
	whole, fraction, _ := strings.Cut(text[:end], ".")
	n, err := strconv.ParseUint(whole, 10, 63)
	if err != nil || int64(n) > math.MaxInt64/unit {
		return 0, fmt.Errorf("size %q: not a number of bytes below 8 EiB", clip(s))
	}
	size := int64(n) * unit
	if fraction == "" {
		if strings.Contains(text[:end], ".") {
			return 0, fmt.Errorf("size %q: digits are missing after the point", clip(s))
		}
		return size, nil
	}
	f, err := strconv.ParseUint(fraction, 10, 63)
	scale := int64(1)
	for range fraction {
		scale *= 10
	}
	if err != nil || len(fraction) > 6 || int64(f)*(unit/gcd(unit, scale))%(scale/gcd(unit, scale)) != 0 {
		return 0, fmt.Errorf("size %q: not a whole number of bytes", clip(s))
	}
	return size + int64(f)*(unit/gcd(unit, scale))/(scale/gcd(unit, scale)), nil
}

func gcd(a, b int64) int64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

func clip(s string) string {
	if len(s) > 40 {
		return s[:40] + "…"
	}
	return s
}

// Format writes n with a binary unit and at most two decimals: "10 GiB", "1.5 TiB", "700 B".
func Format(n int64) string {
	for _, u := range []struct {
		size int64
		name string
	}{{1 << 40, "TiB"}, {1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}} {
		if n >= u.size {
			v := strconv.FormatFloat(float64(n)/float64(u.size), 'f', 2, 64)
			return strings.TrimSuffix(strings.TrimRight(v, "0"), ".") + " " + u.name
		}
	}
	return strconv.FormatInt(n, 10) + " B"
}
