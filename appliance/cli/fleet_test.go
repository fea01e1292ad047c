package cli

import (
	"testing"

	v1 "varve/control/api/customer"
)

func TestLineDiff(t *testing.T) {
	for _, c := range []struct{ a, b, want string }{
		{"x", "x", " x\n"},
		{"a\nb\nc", "a\nc\nd", " a\n-b\n c\n+d\n"},
		{"", "new", "-\n+new\n"},
	} {
		got := lineDiff(v1.ConfigValue{Version: 1, Value: c.a}, v1.ConfigValue{Version: 2, Value: c.b})
		if got != "--- version 1, -\n+++ version 2, -\n"+c.want && got[len(got)-len(c.want):] != c.want {
			t.Errorf("%q to %q: %q", c.a, c.b, got)
		}
	}
	list := []v1.ConfigValue{{Version: 7}, {Version: 6}, {Version: 4}}
	for _, c := range []struct {
		version uint64
		def     int
		want    uint64
		fails   bool
	}{{0, 0, 7, false}, {0, 1, 6, false}, {4, 0, 4, false}, {5, 0, 0, true}, {0, 9, 0, true}} {
		v, err := pickVersion("k", list, c.version, c.def)
		if (err != nil) != c.fails || v.Version != c.want {
			t.Errorf("%+v: %+v %v", c, v, err)
		}
	}
}
