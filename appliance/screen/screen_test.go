package screen

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
)

// fake is a machine that does nothing and remembers what it was asked.
type fake struct {
	calls []string
	fail  error
	facts Facts
}

func (f *fake) called(what string, args ...any) error {
	f.calls = append(f.calls, strings.TrimSpace(what+" "+fmt.Sprintln(args...)))
	return f.fail
}

func (f *fake) Facts(context.Context) Facts { return f.facts }
func (f *fake) Fields() ([]Field, error) {
	return []Field{{"hostname", "Host name", "store1", "a name"}, {"mgmt_ip", "Management IP", "", "an address"}}, f.fail
}
func (f *fake) Try(_ context.Context, v map[string]string) error { return f.called("try", v) }
func (f *fake) Keep(context.Context) error                       { return f.called("keep") }
func (f *fake) Revert(context.Context) error                     { return f.called("revert") }
func (f *fake) TestNetwork(context.Context) []string             { return []string{"  ok    gateway"} }
func (f *fake) Doctor(context.Context) []string {
	return strings.Split(strings.Repeat("  OK check\n", 100), "\n")
}
func (f *fake) Logs(context.Context) []string {
	return []string{"a\x1b[2Jb\x00", strings.Repeat("long ", 60)}
}
func (f *fake) Disks() []Choice                            { return []Choice{{"sdb", "sdb 64 GiB"}, {"sdc", "sdc 65 GiB"}} }
func (f *fake) ChooseDisk(id string) error                 { return f.called("disk", id) }
func (f *fake) Join(_ context.Context, token string) error { return f.called("join", token) }
func (f *fake) ResetAdmin(context.Context) (string, string, error) {
	return "admin", "abcdef-ghijkl", f.called("admin")
}
func (f *fake) NewSetupCode(context.Context) error      { return f.called("code") }
func (f *fake) SSH(context.Context) (string, error)     { return "open", f.called("ssh") }
func (f *fake) Back(context.Context) (string, error)    { return "back", f.called("back") }
func (f *fake) Power(_ context.Context, off bool) error { return f.called("power", off) }
func (f *fake) FactoryReset(context.Context) error      { return f.called("reset") }

// seat is somebody in front of a screen.
type seat struct {
	t    *testing.T
	m    *Model
	f    *fake
	time time.Time
}

func sit(t *testing.T) *seat {
	f := &fake{facts: Facts{Version: "1.2.3", Hostname: "store1", State: "serving", Good: true, URLs: []string{"https://10.0.0.1/"}, Fingerprint: strings.Repeat("AB:", 31) + "AB",
		Links: []Link{{"eth0", "up", []string{"10.0.0.1/24"}}}}}
	s := &seat{t: t, f: f, time: time.Unix(1e9, 0)}
	s.m = New(t.Context(), f)
	s.m.now = func() time.Time { return s.time }
	s.m.facts = f.facts
	return s
}

// press types keys and lets what they start end.
func (s *seat) press(keys ...string) {
	s.t.Helper()
	for _, k := range keys {
		msg := tea.KeyPressMsg{Code: []rune(k)[0], Text: k}
		if code, ok := map[string]rune{"enter": tea.KeyEnter, "esc": tea.KeyEscape, "down": tea.KeyDown, "up": tea.KeyUp, "backspace": tea.KeyBackspace, "f10": tea.KeyF10}[k]; ok {
			msg = tea.KeyPressMsg{Code: code}
		}
		s.send(msg)
	}
}

func (s *seat) send(msg tea.Msg) {
	s.t.Helper()
	_, cmd := s.m.Update(msg)
	if cmd != nil {
		if next := cmd(); next != nil {
			if _, batch := next.(tea.BatchMsg); !batch {
				s.send(next)
			}
		}
	}
	s.fits()
}

func (s *seat) typed(text string) {
	for _, r := range text {
		s.press(string(r))
	}
}

// fits says that the screen is within 80x24 and that nothing in it but colours moves the terminal.
func (s *seat) fits() string {
	s.t.Helper()
	lines := s.m.Lines()
	if len(lines) > Height {
		s.t.Fatalf("%d lines", len(lines))
	}
	for _, l := range lines {
		text := l
		for _, a := range []string{plain, bold, reverse, red, green} {
			text = strings.ReplaceAll(text, a, "")
		}
		if len(text) >= Width || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' }) {
			s.t.Fatalf("%d characters: %q", len(text), text)
		}
	}
	return strings.Join(lines, "\n")
}

func (s *seat) wants(calls ...string) {
	s.t.Helper()
	if !reflect.DeepEqual(s.f.calls, calls) && len(s.f.calls)+len(calls) > 0 {
		s.t.Fatalf("the machine was asked %q, want %q", s.f.calls, calls)
	}
}

func (s *seat) shows(text string) {
	s.t.Helper()
	if got := s.fits(); !strings.Contains(got, text) {
		s.t.Fatalf("the screen does not show %q:\n%s", text, got)
	}
}

func TestNetworkIsTakenBackUnlessKept(t *testing.T) {
	s := sit(t)
	s.press("c", "down")
	s.typed("10.0.0.9/24")
	s.shows("10.0.0.9/24")
	s.press("f10")
	s.wants("try map[hostname:store1 mgmt_ip:10.0.0.9/24]")
	s.shows("60 seconds unless you press k")
	s.time = s.time.Add(59 * time.Second)
	s.m.Update(tickMsg(s.time))
	s.wants("try map[hostname:store1 mgmt_ip:10.0.0.9/24]")
	s.time = s.time.Add(time.Second)
	_, cmd := s.m.Update(tickMsg(s.time))
	for _, c := range cmd().(tea.BatchMsg)[1:] {
		s.send(c())
	}
	s.wants("try map[hostname:store1 mgmt_ip:10.0.0.9/24]", "revert")
	s.shows("nobody confirmed")

	s = sit(t)
	s.press("c", "f10", "k")
	s.wants("try map[hostname:store1 mgmt_ip:]", "keep")
	s = sit(t)
	s.press("c", "f10", "esc")
	s.wants("try map[hostname:store1 mgmt_ip:]", "revert")
	s = sit(t)
	s.press("c")
	s.f.fail = errors.New("gateway is not in the network")
	s.press("f10")
	s.shows("gateway is not in the network")
	s.shows("Host name")
}

func TestFactoryResetNeedsTheName(t *testing.T) {
	s := sit(t)
	s.press("f")
	s.shows("store1")
	s.press("enter")
	s.typed("yes")
	s.press("enter")
	s.shows("Nothing was done")
	s.typed("store2")
	s.press("enter")
	s.wants()
	s.typed("store1")
	s.press("enter")
	s.wants("reset")
}

func TestWhatChangesSomethingIsConfirmed(t *testing.T) {
	for keys, want := range map[string][]string{
		"p|enter": nil, "p|n|o|enter": nil, "p|y|e|s|enter": {"admin"}, "r|enter": nil, "r|esc": nil, "r|down|enter": {"power false"}, "r|down|down|down|enter": {"power true"},
		"s|enter": nil, "s|y|e|s|enter": {"ssh"}, "u|y|e|s|enter": nil, "u|b|a|c|k|enter": {"back"}, "b|down|enter": {"disk sdc"}, "b|esc": nil, "j|esc": nil,
	} {
		s := sit(t)
		s.press(strings.Split(keys, "|")...)
		s.wants(want...)
	}
	s := sit(t)
	s.press("j")
	s.send(tea.PasteMsg{Content: "VARVE-TOKEN\n"})
	s.press("enter")
	s.wants("join VARVE-TOKEN")
	s = sit(t)
	s.press("p", "y", "e", "s", "enter")
	s.shows("abcdef-ghijkl")
	s.press("x")
	s.shows("Console")
	s.m.facts.SetupCode = "AAAA-BBBB-CCCC"
	s.shows("AAAA-BBBB-CCCC")
	s.press("p", "enter")
	s.wants("admin", "code")
}

func TestPages(t *testing.T) {
	s := sit(t)
	s.press("d")
	s.shows("20 of 101")
	s.press("b", "f", "f", "f", "f", "f", "f", "f")
	s.shows("101 of 101")
	s.press("q", "l")
	s.shows("a [2Jb")
	s.press("esc", "n")
	s.shows("gateway")
}

func TestHomeFitsWhateverIsShown(t *testing.T) {
	s := sit(t)
	s.fits()
	long := strings.Repeat("é\x1b[2Jlong\n ", 100)
	s.m.facts = Facts{Product: long, Version: long, Hostname: long, Slot: long, State: long, Cluster: long, Component: long, URLs: []string{long, long, long, long, long},
		Fingerprint: long, SetupCode: long, Disk: long, Time: long, Update: long}
	for range 30 {
		s.m.facts.Links = append(s.m.facts.Links, Link{long, long, []string{long}})
		s.m.facts.Problems = append(s.m.facts.Problems, Problem{long, long})
	}
	for _, keys := range []string{"", "u", "esc", "f"} {
		if keys != "" {
			s.press(keys)
		}
		s.fits()
	}
}

func TestURLs(t *testing.T) {
	links := []Link{{"eth0", "up", []string{"fd00::2/64", "10.0.2.15/24", "fe80::1/64"}}, {"eth1", "up", []string{"10.0.2.15/24", "nonsense"}}}
	if got := urls(links, "443"); !reflect.DeepEqual(got, []string{"https://10.0.2.15/", "https://[fd00::2]/"}) {
		t.Error(got)
	}
	if got := urls(links, "8443"); !reflect.DeepEqual(got, []string{"https://10.0.2.15:8443/", "https://[fd00::2]:8443/"}) {
		t.Error(got)
	}
}
