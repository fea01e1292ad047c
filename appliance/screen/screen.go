// Package screen is what an appliance shows on its own screen, VGA and serial alike, in 80 columns of 24 lines of plain ASCII: how
// it is, where its console is, by what fingerprint and with which set-up code; and what has to be possible without a network:
//
//	c  network: tried for a minute, taken back by itself unless somebody says that it works      n  test of the network
//	d  doctor    l  logs    j  join a cluster    b  data disk    p  new password of the administrator
//	s  ssh for an hour      u  updates           r  restart, power off          f  factory reset, by the typed host name
//
// Whoever has the screen has the machine: there is no sign-in. What changes something is confirmed and, where the API does it,
// in the audit log.
//
// Model is pure: keys and facts in, lines out; Machine does everything else, in commands. A network change that is being tried is
// recorded (RUN/network-test.json), so that a screen that starts after one that died takes it back.
package screen

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
)

// Facts are what the screen shows.
type Facts struct {
	Product, Version string
	Hostname         string
	Slot             string
	// State is one word for the appliance: "serving", "starting", "no data disk", …; Good says whether it is as it should be.
	State       string
	Good        bool
	Cluster     string
	Component   string
	URLs        []string
	Fingerprint string // hex pairs
	SetupCode   string // "" once there is an administrator
	Links       []Link
	Disk        string
	Time        string
	Problems    []Problem
	Update      string
}

// Link is a network card.
type Link struct {
	Name, State string
	Addresses   []string
}

// Problem with what helps.
type Problem struct{ What, Remedy string }

// Field of the network form.
type Field struct{ Key, Label, Value, Hint string }

// Choice of a menu.
type Choice struct{ ID, Label string }

// Machine is the appliance below the screen. Methods may take long; each is called from a command of its own.
type Machine interface {
	Facts(ctx context.Context) Facts
	// Fields of the network form, with the settings in force.
	Fields() ([]Field, error)
	// Try puts settings into force without keeping them; Keep keeps what was tried, Revert goes back.
	Try(ctx context.Context, values map[string]string) error
	Keep(ctx context.Context) error
	Revert(ctx context.Context) error
	TestNetwork(ctx context.Context) []string
	Doctor(ctx context.Context) []string
	Logs(ctx context.Context) []string
	Disks() []Choice
	ChooseDisk(id string) error
	Join(ctx context.Context, token string) error
	ResetAdmin(ctx context.Context) (name, password string, err error)
	NewSetupCode(ctx context.Context) error
	SSH(ctx context.Context) (string, error)
	Back(ctx context.Context) (string, error)
	Power(ctx context.Context, off bool) error
	FactoryReset(ctx context.Context) error
}

// Size of the screen: what every terminal has.
const (
	Width  = 80
	Height = 24

	tryFor       = 60 * time.Second
	factsEvery   = 2 * time.Second
	calmEvery    = 10 * time.Second // a look takes handshakes and calls, which are not to cost what guests need
	commandLimit = 3 * time.Minute
	inputMax     = 4096
)

type mode int

const (
	home mode = iota
	form
	trying
	pager
	prompt
	menu
	busy
	message
)

// Model of the screen.
type Model struct {
	ctx     context.Context
	machine Machine
	now     func() time.Time
	facts   Facts
	mode    mode

	fields []Field
	at     int
	until  time.Time // of a trial
	title  string
	lines  []string
	top    int
	input  string
	want   string // what a prompt has to be answered with
	secret bool
	note   string
	bad    bool
	items  []Choice
	then   func(answer string) tea.Cmd
}

// New makes a screen.
func New(ctx context.Context, m Machine) *Model { return &Model{ctx: ctx, machine: m, now: time.Now} }

// Run shows it on a terminal until ctx ends.
func Run(ctx context.Context, m Machine, in io.Reader, out io.Writer, env []string) error {
	p := tea.NewProgram(New(ctx, m), tea.WithContext(ctx), tea.WithInput(in), tea.WithOutput(out), tea.WithEnvironment(env), tea.WithFPS(10),
		tea.WithWindowSize(Width, Height), tea.WithoutSignalHandler())
	_, err := p.Run()
	if errors.Is(err, tea.ErrProgramKilled) || ctx.Err() != nil {
		return nil
	}
	return err
}

type (
	factsMsg  Facts
	tickMsg   time.Time
	fieldsMsg struct {
		fields []Field
		err    error
	}
	linesMsg struct {
		title string
		lines []string
	}
	doneMsg struct {
		note string
		err  error
	}
	triedMsg struct{ err error }
)

// Init implements tea.Model.
func (m *Model) Init() tea.Cmd { return tea.Batch(m.look(), tick()) }

func tick() tea.Cmd { return tea.Tick(time.Second, func(t time.Time) tea.Msg { return tickMsg(t) }) }

func (m *Model) look() tea.Cmd {
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(m.ctx, 10*time.Second)
		defer cancel()
		f := m.machine.Facts(ctx)
		return factsMsg(f)
	}
}

// do runs f and shows what came of it.
func (m *Model) do(what string, f func(ctx context.Context) (string, error)) tea.Cmd {
	m.mode, m.title = busy, what
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(m.ctx, commandLimit)
		defer cancel()
		note, err := f(ctx)
		return doneMsg{note, err}
	}
}

func (m *Model) page(what string, f func(ctx context.Context) []string) tea.Cmd {
	m.mode, m.title = busy, what
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(m.ctx, commandLimit)
		defer cancel()
		return linesMsg{what, f(ctx)}
	}
}

// Update implements tea.Model.
func (m *Model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case factsMsg:
		m.facts = Facts(msg)
		wait := factsEvery
		if m.facts.Good {
			wait = calmEvery
		}
		return m, tea.Tick(wait, func(time.Time) tea.Msg { return m.look()() })
	case tickMsg:
		if m.mode == trying && !m.now().Before(m.until) {
			return m, tea.Batch(tick(), m.do("Taking the network back", func(ctx context.Context) (string, error) {
				return "The network is as it was: nobody confirmed the change within a minute.", m.machine.Revert(ctx)
			}))
		}
		return m, tick()
	case fieldsMsg:
		if msg.err != nil {
			return m, m.tell(msg.err.Error(), true)
		}
		m.mode, m.fields, m.at, m.note = form, msg.fields, 0, ""
	case triedMsg:
		if msg.err != nil {
			m.mode, m.note, m.bad = form, msg.err.Error(), true
			return m, nil
		}
		m.mode, m.until = trying, m.now().Add(tryFor)
	case linesMsg:
		m.mode, m.title, m.lines, m.top = pager, msg.title, nil, 0
		for _, l := range msg.lines { // logs hold what clients sent
			m.lines = append(m.lines, ascii(l))
		}
		if msg.title == titleLogs { // the newest is what one looks for
			m.top = max(0, len(m.lines)-pageLines)
		}
	case doneMsg:
		if msg.err != nil {
			return m, m.tell(msg.err.Error(), true)
		}
		return m, m.tell(msg.note, false)
	case tea.KeyPressMsg:
		return m, m.key(msg.String(), msg.Text)
	case tea.PasteMsg:
		if m.mode == prompt {
			m.typed(strings.TrimSpace(msg.Content))
		}
	}
	return m, nil
}

func (m *Model) tell(note string, bad bool) tea.Cmd {
	m.mode, m.note, m.bad = message, note, bad
	return nil
}

func (m *Model) ask(title, note, want string, secret bool, then func(string) tea.Cmd) tea.Cmd {
	m.mode, m.title, m.note, m.bad, m.want, m.secret, m.input, m.then = prompt, title, note, false, want, secret, "", then
	return nil
}

func (m *Model) choose(title string, items []Choice, then func(string) tea.Cmd) tea.Cmd {
	m.mode, m.title, m.items, m.at, m.then = menu, title, items, 0, then
	return nil
}

func (m *Model) typed(text string) {
	for _, r := range text {
		if r >= ' ' && r != 0x7f && len(m.input) < inputMax {
			m.input += string(r)
		}
	}
}

const (
	titleLogs   = "Logs"
	titleDoctor = "Doctor"
	titleTest   = "Test of the network"
	pageLines   = Height - 4
)

func (m *Model) key(k, text string) tea.Cmd {
	switch m.mode {
	case home:
		return m.homeKey(k)
	case form:
		return m.formKey(k, text)
	case trying:
		switch k {
		case "k":
			return m.do("Keeping the network", func(ctx context.Context) (string, error) {
				return "The network settings are kept.", m.machine.Keep(ctx)
			})
		case "esc", "q":
			return m.do("Taking the network back", func(ctx context.Context) (string, error) { return "The network is as it was.", m.machine.Revert(ctx) })
		}
	case pager:
		last := max(0, len(m.lines)-pageLines)
		switch k {
		case "q", "esc", "enter":
			m.mode = home
		case "down", "j":
			m.top = min(m.top+1, last)
		case "up", "k":
			m.top = max(m.top-1, 0)
		case "space", " ", "pgdown", "f":
			m.top = min(m.top+pageLines, last)
		case "pgup", "b":
			m.top = max(m.top-pageLines, 0)
		case "g", "home":
			m.top = 0
		case "G", "end", "shift+g":
			m.top = last
		}
	case prompt:
		switch k {
		case "esc":
			m.mode = home
		case "backspace", "ctrl+h":
			if r := []rune(m.input); len(r) > 0 {
				m.input = string(r[:len(r)-1])
			}
		case "ctrl+u":
			m.input = ""
		case "enter":
			if answer := strings.TrimSpace(m.input); m.want != "" && answer != m.want {
				m.note, m.bad, m.input = "That is not "+m.want+". Nothing was done.", true, ""
			} else if answer != "" {
				m.input = ""
				return m.then(answer)
			}
		default:
			m.typed(text)
		}
	case menu:
		switch k {
		case "esc", "q":
			m.mode = home
		case "down", "tab":
			m.at = min(m.at+1, len(m.items)-1)
		case "up", "shift+tab":
			m.at = max(m.at-1, 0)
		case "enter":
			if len(m.items) > 0 {
				return m.then(m.items[m.at].ID)
			}
			m.mode = home
		}
	case message:
		m.mode = home
	}
	return nil
}

func (m *Model) homeKey(k string) tea.Cmd {
	mc := m.machine
	switch k {
	case "c", "f2":
		m.mode, m.title = busy, "Network"
		return func() tea.Msg { f, err := mc.Fields(); return fieldsMsg{f, err} }
	case "n":
		return m.page(titleTest, mc.TestNetwork)
	case "d":
		return m.page(titleDoctor, mc.Doctor)
	case "l":
		return m.page(titleLogs, mc.Logs)
	case "j":
		return m.ask("Join a cluster", "Type the token that the other appliance's console, or varve cluster token create, has shown.\n"+
			"The appliance restarts and joins; it must not hold data of its own.", "", false, func(token string) tea.Cmd {
			return m.do("Joining", func(ctx context.Context) (string, error) {
				return "The token is kept; the appliance joins now.", mc.Join(ctx, token)
			})
		})
	case "b":
		return m.choose("Data disk: only one that is empty or was a data disk can be chosen", mc.Disks(), func(id string) tea.Cmd {
			return m.do("Taking disk "+id, func(context.Context) (string, error) {
				return "Disk " + id + " is taken; see the data disk on the first page.", mc.ChooseDisk(id)
			})
		})
	case "p":
		if m.facts.SetupCode != "" {
			return m.choose("There is no administrator yet", []Choice{{"code", "Make a new set-up code"}, {"", "Back"}}, func(id string) tea.Cmd {
				if m.mode = home; id == "" {
					return nil
				}
				return m.do("Making a code", func(ctx context.Context) (string, error) { return "There is a new set-up code.", mc.NewSetupCode(ctx) })
			})
		}
		return m.ask("New password of the administrator",
			"Makes a password that is shown once and takes a second factor away. Type yes.", "yes", false, func(string) tea.Cmd {
				return m.do("Setting a password", func(ctx context.Context) (string, error) {
					name, password, err := mc.ResetAdmin(ctx)
					return fmt.Sprintf("User      %s\nPassword  %s\n\nIt is not shown again. Change it after signing in.", name, password), err
				})
			})
	case "s":
		return m.ask("SSH", "Opens SSH for an hour, for the keys of the settings only. Type yes.", "yes", false, func(string) tea.Cmd {
			return m.do("Opening SSH", mc.SSH)
		})
	case "u":
		return m.ask("Previous version",
			orNone(m.facts.Update, "This machine has no record of updates.")+"\n\nTo start the previous version once, and keep it if it is healthy, type back.", "back", false,
			func(string) tea.Cmd { return m.do("Going back", mc.Back) })
	case "r":
		choices := []Choice{{"", "Back"}, {"restart", "Restart"}, {"off", "Power off"}}
		return m.choose("Guests that use this appliance wait until it is back", choices, func(id string) tea.Cmd {
			if m.mode = home; id == "" {
				return nil
			}
			return m.do("Stopping", func(ctx context.Context) (string, error) {
				return "The appliance is stopping.", mc.Power(ctx, id == "off")
			})
		})
	case "f":
		return m.ask("Factory reset",
			"Erases everything on the data disk: vDisks on local backends, keys, settings.\nWhat lies encrypted on S3 can never be read again.\n\n"+
				"Type the host name to erase it: "+m.facts.Hostname,
			orNone(m.facts.Hostname, "erase"), false, func(string) tea.Cmd {
				return m.do("Resetting", func(ctx context.Context) (string, error) {
					return "The appliance restarts and is erased.", mc.FactoryReset(ctx)
				})
			})
	}
	return nil
}

func orNone(s, none string) string {
	if s == "" {
		return none
	}
	return s
}

func (m *Model) formKey(k, text string) tea.Cmd {
	f := &m.fields[m.at]
	switch k {
	case "esc":
		m.mode = home
	case "down", "tab":
		m.at = min(m.at+1, len(m.fields)-1)
	case "up", "shift+tab":
		m.at = max(m.at-1, 0)
	case "backspace", "ctrl+h":
		if r := []rune(f.Value); len(r) > 0 {
			f.Value = string(r[:len(r)-1])
		}
	case "ctrl+u":
		f.Value = ""
	case "enter":
		if m.at < len(m.fields)-1 {
			m.at++
			return nil
		}
		return m.try()
	case "f10", "ctrl+t":
		return m.try()
	default:
		for _, r := range text {
			if r >= ' ' && r < 0x7f && len(f.Value) < 200 {
				f.Value += string(r)
			}
		}
	}
	return nil
}

func (m *Model) try() tea.Cmd {
	values := make(map[string]string)
	for _, f := range m.fields {
		values[f.Key] = strings.TrimSpace(f.Value)
	}
	m.mode, m.title = busy, "Trying the network"
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(m.ctx, commandLimit)
		defer cancel()
		return triedMsg{m.machine.Try(ctx, values)}
	}
}
