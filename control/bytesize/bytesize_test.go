package bytesize

import "testing"

func TestParse(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "4096": 4096, "10GiB": 10 << 30, "10 GiB": 10 << 30, "512M": 512 << 20, "1.5TiB": 3 << 39, "2GB": 2e9, "1k": 1024,
		"0.5k": 512, "64tib": 64 << 40, "7B": 7, "8388607T": 8388607 << 40,
	} {
		if got, err := Parse(s); err != nil || got != want {
			t.Errorf("Parse(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "GiB", "-1", "1.2.3G", "1XB", "1.", "0.3B", "9223372036854775808", "8388608T", "1e3", "0x10",
		"1.0000001G", "99999999999999999999999999", ".5G", "1 2G", "١"} {
		if got, err := Parse(s); err == nil {
			t.Errorf("Parse(%q) = %d, want an error", s, got)
		}
	}
}

func TestFormat(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 700: "700 B", 10 << 30: "10 GiB", 3 << 39: "1.5 TiB", 1234567: "1.18 MiB", 1000 << 20: "1000 MiB"} {
		if got := Format(n); got != want {
			t.Errorf("Format(%d) = %q, want %q", n, got, want)
		}
	}
}
