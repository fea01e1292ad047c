package screen

import (
	"fmt"
	"strings"

	tea "charm.land/bubbletea/v2"
)

// Attributes of text, as every terminal since the VT100 has them.
const (
	plain   = "\x1b[0m"
	bold    = "\x1b[1m"
	reverse = "\x1b[7m"
	red     = "\x1b[1;31m"
	green   = "\x1b[32m"
)

// View implements tea.Model.
func (m *Model) View() tea.View {
	v := tea.NewView(strings.Join(m.Lines(), "\n"))
	v.AltScreen = true
	return v
}

// Lines are the screen: at most Height lines of at most Width characters.
func (m *Model) Lines() []string {
	var body []string
	keys := "any key: back"
	switch m.mode {
	case home:
		body = m.homeLines()
		keys = "c network   n test of it   d doctor   l logs   j join a cluster   b data disk\np password   s ssh   u update   r restart, off   f factory reset"
	case form:
		body, keys = m.formLines(), "up/down: field   F10 or ctrl+T: try for a minute   esc: leave"
	case trying:
		body, keys = m.tryingLines(), "k: keep these settings   esc: take them back now"
	case pager:
		body, keys = m.lines[min(m.top, len(m.lines)):min(m.top+pageLines, len(m.lines))], fmt.Sprintf("up/down, space, b: move   %d of %d   q: back",
			min(m.top+pageLines, len(m.lines)), len(m.lines))
	case prompt:
		body, keys = m.promptLines(), "enter: go on   esc: leave"
	case menu:
		body, keys = m.menuLines(), "up/down, enter: choose   esc: leave"
	case busy:
		body, keys = []string{"", "  " + m.title + " ..."}, ""
	case message:
		body = append([]string{""}, m.noteLines()...)
	}
	out, foot := []string{m.header()}, strings.Split(keys, "\n")
	room := Height - 1 - len(foot)
	for _, l := range body {
		if len(out) == room {
			break
		}
		out = append(out, fit(l))
	}
	for len(out) < room {
		out = append(out, "")
	}
	out = append(out, strings.Repeat("-", Width-1))
	for _, k := range foot {
		out = append(out, fit(" "+k))
	}
	return out
}

func (m *Model) header() string {
	left := " " + orNone(m.facts.Product, "Varve") + " " + m.facts.Version
	right := m.facts.Hostname + " "
	if m.facts.Slot != "" {
		right = m.facts.Hostname + "  slot " + m.facts.Slot + " "
	}
	left = clip(ascii(left), Width-1-len(right)-1)
	return reverse + left + strings.Repeat(" ", max(1, Width-1-len(left)-len(right))) + clip(ascii(right), Width-2) + plain
}

// fit cuts a line to the screen; escapes take no room.
func fit(s string) string {
	var b strings.Builder
	room, inEscape, cut := Width-1, false, false
	for _, r := range s {
		switch {
		case r == 0x1b:
			inEscape = true
			b.WriteRune(r)
		case inEscape:
			b.WriteRune(r)
			inEscape = r != 'm'
		case r < ' ' || r == 0x7f:
		case room > 0:
			if r > '~' {
				r = '?'
			}
			b.WriteRune(r)
			room--
		default:
			cut = true
		}
	}
	if cut || strings.Contains(s, "\x1b") {
		b.WriteString(plain)
	}
	return b.String()
}

// ascii drops what could move the cursor and what a console's font may lack.
func ascii(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '…' {
			return '~'
		}
		if r < ' ' || r == 0x7f {
			return ' '
		}
		if r > '~' {
			return '?'
		}
		return r
	}, s)
}

func clip(s string, n int) string {
	if n < 0 {
		n = 0
	}
	return s[:min(len(s), n)]
}

// wrap breaks text at blanks.
func wrap(text string, width int) []string {
	var out []string
	for _, para := range strings.Split(text, "\n") {
		line := ""
		for _, w := range strings.Fields(ascii(para)) {
			for len(w) > width {
				if line != "" {
					out, line = append(out, line), ""
				}
				out, w = append(out, w[:width]), w[width:]
			}
			if line != "" && len(line)+1+len(w) > width {
				out, line = append(out, line), ""
			}
			if line != "" {
				line += " "
			}
			line += w
		}
		out = append(out, line)
	}
	return out
}

func (m *Model) homeLines() []string {
	f := m.facts
	var out []string
	row := func(label, text string) { out = append(out, fmt.Sprintf("  %-12s %s", label, text)) }
	colour := red
	if f.Good {
		colour = green
	}
	row("State", colour+ascii(orNone(f.State, "looking ..."))+plain)
	if f.Cluster != "" {
		row("Cluster", ascii(f.Cluster))
	}
	for i, u := range f.URLs {
		if i == 3 {
			break
		}
		label := ""
		if i == 0 {
			label = "Console"
		}
		row(label, bold+ascii(u)+plain)
	}
	if len(f.URLs) == 0 {
		row("Console", "no address yet")
	}
	if f.SetupCode != "" {
		row("Set-up code", bold+ascii(f.SetupCode)+plain+"   the console asks for it")
	}
	if fp := ascii(f.Fingerprint); fp != "" {
		row("Fingerprint", clip(fp, 47))
		if len(fp) > 48 {
			row("(SHA-256)", fp[48:])
		}
	}
	for i, l := range f.Links {
		if i == 4 {
			break
		}
		label := ""
		if i == 0 {
			label = "Network"
		}
		row(label, ascii(fmt.Sprintf("%-8s %-12s %s", l.Name, l.State, strings.Join(l.Addresses, " "))))
	}
	row("Data disk", ascii(orNone(f.Disk, "-")))
	row("Time", ascii(orNone(f.Time, "-")))
	if f.Component != "" {
		row("Component", ascii(f.Component))
	}
	for _, p := range f.Problems {
		left := Height - 4 - len(out)
		if left < 2 {
			break
		}
		out = append(out, "  "+red+"! "+plain+clip(ascii(p.What), Width-6))
		if p.Remedy != "" {
			out = append(out, "    "+clip(ascii(p.Remedy), Width-6))
		}
	}
	return out
}

func (m *Model) formLines() []string {
	out := []string{"", "  " + bold + "Network" + plain + "   what is left empty comes from the hypervisor's settings, or by DHCP", ""}
	for i, f := range m.fields {
		mark, value := "  ", ascii(f.Value)
		if i == m.at {
			mark = "> "
			value = tail(value, 40) + reverse + " " + plain
		} else {
			value = clip(value, 41)
		}
		hint := ""
		if i == m.at {
			hint = "   " + f.Hint
		}
		out = append(out, fmt.Sprintf("%s%-18s %s%s", mark, f.Label, value, hint))
	}
	out = append(out, "")
	return append(out, m.noteLines()...)
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

func (m *Model) tryingLines() []string {
	left := max(0, int(m.until.Sub(m.now()).Seconds()))
	out := []string{"", "  " + bold + "The new network settings are in force" + plain, "",
		fmt.Sprintf("  They are taken back in %d seconds unless you press k.", left), "",
		"  Look whether the console opens at one of these addresses from your desk:"}
	for _, u := range m.facts.URLs {
		out = append(out, "    "+ascii(u))
	}
	out = append(out, "")
	for _, l := range m.facts.Links {
		out = append(out, ascii(fmt.Sprintf("    %-8s %-12s %s", l.Name, l.State, strings.Join(l.Addresses, " "))))
	}
	return out
}

func (m *Model) noteLines() []string {
	var out []string
	for _, para := range strings.Split(m.note, "\n") {
		lines := []string{ascii(para)}
		if len(para) > Width-4 {
			lines = wrap(para, Width-4)
		}
		for _, l := range lines {
			if m.bad {
				l = red + l + plain
			}
			out = append(out, "  "+l)
		}
	}
	return out
}

func (m *Model) promptLines() []string {
	out := append([]string{"", "  " + bold + m.title + plain, ""}, m.noteLines()...)
	shown := ascii(m.input)
	if m.secret {
		shown = strings.Repeat("*", len(shown))
	}
	return append(out, "", "  > "+tail(shown, Width-8)+reverse+" "+plain)
}

func (m *Model) menuLines() []string {
	out := []string{"", "  " + bold + ascii(m.title) + plain, ""}
	if len(m.items) == 0 {
		return append(out, "  There is nothing to choose from.")
	}
	for i, it := range m.items {
		mark := "    "
		if i == m.at {
			mark = "  > "
		}
		out = append(out, mark+ascii(it.Label))
	}
	return out
}
