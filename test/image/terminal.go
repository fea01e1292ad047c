package image

import (
	"strconv"
	"strings"
)

// Size of the appliance's screen.
const (
	columns = 80
	rows    = 24
)

// Screen gives what an 80x24 terminal shows after what has come over the serial line: programs draw differences, so the text as it
// came cannot be searched. It knows the sequences that VT100 programs draw with; all others are passed over.
func Screen(serial string) []string {
	t := terminal{bottom: rows - 1}
	t.clear(0, rows*columns)
	for i := 0; i < len(serial); {
		i += t.feed(serial[i:])
	}
	lines := make([]string, rows)
	for y := range rows {
		lines[y] = strings.TrimRight(string(t.cells[y*columns:(y+1)*columns]), " ")
	}
	return lines
}

type terminal struct {
	cells       [rows * columns]rune
	x, y        int
	top, bottom int // the lines that scroll
	last        rune
}

func (t *terminal) clear(from, to int) {
	for i := max(0, from); i < min(to, len(t.cells)); i++ {
		t.cells[i] = ' '
	}
}

// feed takes one character or sequence and says how many bytes it had.
func (t *terminal) feed(s string) int {
	switch c := s[0]; {
	case c == 0x1b:
		return t.escape(s)
	case c == '\r':
		t.x = 0
	case c == '\n':
		t.newline()
	case c == '\b':
		t.x = max(0, t.x-1)
	case c == '\t':
		t.x = min(columns-1, t.x&^7+8)
	case c >= ' ':
		for n, r := range s {
			if n > 0 {
				return n
			}
			t.put(r)
		}
		return len(s)
	}
	return 1
}

func (t *terminal) put(r rune) {
	if t.x == columns {
		t.x = 0
		t.newline()
	}
	t.cells[t.y*columns+t.x] = r
	t.last = r
	t.x++
}

func (t *terminal) newline() {
	if t.y != t.bottom {
		t.y = min(rows-1, t.y+1)
		return
	}
	copy(t.cells[t.top*columns:], t.cells[(t.top+1)*columns:(t.bottom+1)*columns])
	t.clear(t.bottom*columns, (t.bottom+1)*columns)
}

// back is a newline upwards.
func (t *terminal) back() {
	if t.y != t.top {
		t.y = max(0, t.y-1)
		return
	}
	copy(t.cells[(t.top+1)*columns:(t.bottom+1)*columns], t.cells[t.top*columns:])
	t.clear(t.top*columns, (t.top+1)*columns)
}

func (t *terminal) escape(s string) int {
	if len(s) < 2 {
		return len(s)
	}
	switch s[1] {
	case '[':
	case ']', 'P', '_', '^': // a string up to its end
		for i := 2; i < len(s); i++ {
			if s[i] == 7 {
				return i + 1
			}
			if s[i] == 0x1b && i+1 < len(s) && s[i+1] == '\\' {
				return i + 2
			}
		}
		return len(s)
	case '(', ')', '#', '%':
		return min(3, len(s))
	case 'c':
		t.clear(0, rows*columns)
		t.x, t.y = 0, 0
		return 2
	case 'M':
		t.back()
		return 2
	default:
		return 2
	}
	end := strings.IndexFunc(s[2:], func(r rune) bool { return r >= 0x40 && r <= 0x7e })
	if end < 0 {
		return len(s)
	}
	t.control(s[2:2+end], s[2+end])
	return 3 + end
}

// control carries out CSI arguments final.
func (t *terminal) control(arguments string, final byte) {
	var n [2]int
	for i, a := range strings.SplitN(arguments, ";", 2) {
		n[i], _ = strconv.Atoi(a)
	}
	one := max(1, n[0])
	at := t.y*columns + min(t.x, columns-1)
	switch final {
	case 'H', 'f':
		t.y, t.x = min(one, rows)-1, min(max(1, n[1]), columns)-1
	case 'A':
		t.y = max(0, t.y-one)
	case 'B', 'e':
		t.y = min(rows-1, t.y+one)
	case 'C', 'a':
		t.x = min(columns-1, t.x+one)
	case 'D':
		t.x = max(0, t.x-one)
	case 'G', '`':
		t.x = min(one, columns) - 1
	case 'd':
		t.y = min(one, rows) - 1
	case 'E':
		t.y, t.x = min(rows-1, t.y+one), 0
	case 'F':
		t.y, t.x = max(0, t.y-one), 0
	case 'X':
		t.clear(at, min(at+one, (t.y+1)*columns))
	case 'b':
		for range min(one, columns) {
			t.put(t.last)
		}
	case 'J':
		switch n[0] {
		case 0:
			t.clear(at, rows*columns)
		case 1:
			t.clear(0, at+1)
		default:
			t.clear(0, rows*columns)
		}
	case 'K':
		switch n[0] {
		case 0:
			t.clear(at, (t.y+1)*columns)
		case 1:
			t.clear(t.y*columns, at+1)
		default:
			t.clear(t.y*columns, (t.y+1)*columns)
		}
	case 'r':
		t.top, t.bottom, t.x, t.y = 0, rows-1, 0, 0
		if low := min(n[1], rows) - 1; low > one-1 {
			t.top, t.bottom = one-1, low
		}
	case 'h':
		if arguments == "?1049" {
			t.clear(0, rows*columns)
		}
	}
}
