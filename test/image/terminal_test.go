package image

import (
	"strings"
	"testing"
)

func TestScreenShowsWhatATerminalWould(t *testing.T) {
	for _, c := range []struct{ in, line0, line1 string }{
		{"one\r\ntwo", "one", "two"},
		{"\x1b[1;31mred\x1b[0m", "red", ""},
		{"hello\x1b[1;2HEL", "hELlo", ""},
		{"hello\x1b[3D\x1b[K", "he", ""},
		{"x\x1b[5b\x1b[2;1Hy", "xxxxxx", "y"},
		{"a\x1b]0;title\x07b\x1b(Bc", "abc", ""},
		{strings.Repeat("w", 81), strings.Repeat("w", 80), "w"},
		{"old\x1b[?1049hnew", "   new", ""},
		{"abcdef\x1b[1;3H\x1b[2X", "ab  ef", ""},
		{"half\x1b[", "half", ""},
		{"one\r\ntwo\x1b[1;2r\x1b[1;1H\x1bMnew\x1b[1;24r", "new", "one"},
		{"a\r\nb\r\nc\x1b[2;3r\x1b[3;1H\n\x1b[r", "a", "c"},
	} {
		s := Screen(c.in)
		if s[0] != c.line0 || s[1] != c.line1 {
			t.Errorf("%q shows %q, %q", c.in, s[0], s[1])
		}
	}
	if s := Screen(strings.Repeat("line\r\n", 40) + "end"); s[rows-1] != "end" || s[0] != "line" {
		t.Errorf("scrolled: %q", s)
	}
}
