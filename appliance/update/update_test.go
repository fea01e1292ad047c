package update

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"varve/test/harness"
)

// disk is a machine's system disk in memory. Every call that changes something is a step; at step cut the power fails: before the
// change, in the middle of it where it is not one sector, or right after.
type disk struct {
	slots   map[Slot][]byte
	boot    BootState
	running Slot
	step    int
	cut     int // -1: never
	after   bool
}

var errPower = errors.New("power is cut")

const slotBytes = 64 << 10

func (d *disk) Running() (Slot, error)   { return d.running, nil }
func (d *disk) Boot() (BootState, error) { return d.boot, nil }
func (d *disk) Size(Slot) (int64, error) { return slotBytes, nil }
func (d *disk) fails() (now, later bool) {
	d.step++
	hit := d.step-1 == d.cut
	return hit && !d.after, hit && d.after
}
func (d *disk) SetBoot(b BootState) error {
	now, later := d.fails()
	if now {
		return errPower
	}
	d.boot = b
	if later {
		return errPower
	}
	return nil
}

func (d *disk) Write(_ context.Context, s Slot, r io.Reader) error {
	if s == d.running {
		panic("the running slot is written to")
	}
	buf := make([]byte, 700)
	for off := 0; ; {
		n, err := io.ReadFull(r, buf)
		if n > 0 {
			now, later := d.fails()
			if now {
				n /= 2
			}
			copy(d.slots[s][off:], buf[:n])
			off += n
			if now || later {
				return errPower
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (d *disk) Read(s Slot, n int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(d.slots[s][:n])), nil
}

// start is what the boot loader does, as image/ has it for grub.
func (d *disk) start() {
	d.running = d.boot.Slot
	if d.boot.Try != "" && d.boot.Tries > 0 {
		d.boot.Tries--
		d.running = d.boot.Try
	}
	d.cut, d.step = -1, 0
}

var testKey = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))

func keys(k ...ed25519.PrivateKey) (out []ed25519.PublicKey) {
	for _, k := range k {
		out = append(out, k.Public().(ed25519.PublicKey))
	}
	return out
}

// image is a system: its version repeated.
func image(version string) []byte { return bytes.Repeat([]byte(version+"\n"), 1000) }

func bundle(t *testing.T, m Manifest, signers ...ed25519.PrivateKey) []byte {
	t.Helper()
	if len(signers) == 0 {
		signers = []ed25519.PrivateKey{testKey}
	}
	var b bytes.Buffer
	if _, err := Pack(&b, m, bytes.NewReader(image(m.Version)), signers...); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func newDisk(version string) *disk {
	d := &disk{slots: map[Slot][]byte{SlotA: make([]byte, slotBytes), SlotB: make([]byte, slotBytes)}, boot: BootState{Slot: SlotA}, running: SlotA, cut: -1}
	copy(d.slots[SlotA], image(version))
	return d
}

func (d *disk) config(t *testing.T, state string) Config {
	t.Helper()
	v := d.version()
	if v == "" {
		t.Fatalf("slot %s was started and holds no complete system", d.running)
	}
	return Config{State: state, Slots: d, Keys: keys(testKey), Version: v, LevelMax: 1, Level: 1, Log: slog.New(slog.DiscardHandler)}
}

// version of the complete system in the running slot, "" if there is none.
func (d *disk) version() string {
	v, _, _ := strings.Cut(string(d.slots[d.running][:32]), "\n")
	if v != "" && bytes.HasPrefix(d.slots[d.running], image(v)) {
		return v
	}
	return ""
}

func healthy(context.Context) error { return nil }

// TestPowerCutAtEveryStep cuts the power at every change that an update makes, before, in and after it, then starts the machine as
// often as it takes. Whatever is started is complete; in the end there is one good system, and the update can be done again.
func TestPowerCutAtEveryStep(t *testing.T) {
	b := bundle(t, Manifest{Version: "2.0", LevelMin: 1, LevelMax: 1})
	cuts := 0
	for _, fit := range []bool{true, false} {
		for _, after := range []bool{false, true} {
			for cut := 0; ; cut++ {
				d, state := newDisk("1.0"), t.TempDir()
				d.cut, d.after = cut, after
				_, err := d.config(t, state).Apply(t.Context(), bytes.NewReader(b), nil)
				if err == nil && cut > 0 && d.step <= cut { // past the last step: cut the power in Confirm instead
					d.start()
					d.cut, d.after = cut-d.step, after
					break
				}
				if err != nil && !errors.Is(err, errPower) {
					t.Fatal(err)
				}
				cuts++
				settled(t, d, state, fit)
				d.start()
				if _, err := d.config(t, state).Apply(t.Context(), bytes.NewReader(bundle(t, Manifest{Version: "3.0", LevelMin: 1, LevelMax: 1})), nil); err != nil {
					t.Fatalf("the update after cut %d: %v", cut, err)
				}
				if settled(t, d, state, true); d.version() != "3.0" {
					t.Fatalf("after cut %d the next update leads to %q", cut, d.version())
				}
			}
			for cut := range 3 { // in Confirm
				d, state := newDisk("1.0"), t.TempDir()
				if _, err := d.config(t, state).Apply(t.Context(), bytes.NewReader(b), nil); err != nil {
					t.Fatal(err)
				}
				d.start()
				d.cut, d.after = cut, after
				d.config(t, state).Confirm(t.Context(), health(fit, d))
				cuts++
				settled(t, d, state, fit)
			}
		}
	}
	harness.Show("update: power cut at %d points of apply and confirm, healthy and broken: a complete system came up every time", cuts)
}

// health of version 2.0 is fit's.
func health(fit bool, d *disk) func(context.Context) error {
	return func(context.Context) error {
		if !fit && d.version() == "2.0" {
			return errors.New("it does not serve")
		}
		return nil
	}
}

// settled starts the machine until nothing is being tried.
func settled(t *testing.T, d *disk, state string, fit bool) {
	t.Helper()
	for range 2 * (TriesMax + 2) {
		d.start()
		v, err := d.config(t, state).Confirm(t.Context(), health(fit, d))
		if err != nil {
			t.Fatal(err)
		}
		if v != Bad && d.boot.Try == "" {
			if !fit && d.version() == "2.0" {
				t.Fatal("a broken version stays")
			}
			return
		}
	}
	t.Fatalf("it does not settle: %+v", d.boot)
}

func TestUpdateThatNeverComesUp(t *testing.T) {
	d, state := newDisk("1.0"), t.TempDir()
	if _, err := d.config(t, state).Apply(t.Context(), bytes.NewReader(bundle(t, Manifest{Version: "2.0", LevelMin: 1, LevelMax: 1, Floor: 5})), nil); err != nil {
		t.Fatal(err)
	}
	starts := 0
	for d.start(); d.version() == "2.0"; d.start() { // hangs before it can say anything
		if starts++; starts > TriesMax {
			t.Fatal("it is tried for ever")
		}
	}
	v, err := d.config(t, state).Confirm(t.Context(), healthy)
	st, err2 := d.config(t, state).Status()
	if v != Returned || err != nil || err2 != nil || st.Last == nil || st.Last.Done || st.Last.Version != "2.0" || st.Floor != 0 || st.Boot != (BootState{Slot: SlotA}) {
		t.Fatalf("%s %v %+v %v", v, err, st, err2)
	}
	if starts != TriesMax {
		t.Errorf("tried %d times", starts)
	}
}

func TestForthAndBack(t *testing.T) {
	d, state := newDisk("1.0"), t.TempDir()
	do := func(m Manifest) {
		t.Helper()
		if _, err := d.config(t, state).Apply(t.Context(), bytes.NewReader(bundle(t, m)), nil); err != nil {
			t.Fatal(err)
		}
		if v, _ := d.config(t, state).Confirm(t.Context(), healthy); v != Nothing {
			t.Fatalf("before the restart Confirm says %s", v)
		}
		d.start()
		if _, err := d.config(t, state).Apply(t.Context(), bytes.NewReader(bundle(t, m)), nil); !errors.Is(err, ErrRefused) {
			t.Fatalf("an update while one is being tried: %v", err)
		}
		if v, err := d.config(t, state).Confirm(t.Context(), healthy); v != Good || err != nil {
			t.Fatal(v, err)
		}
	}
	if _, err := d.config(t, state).Back(); !errors.Is(err, ErrRefused) {
		t.Fatalf("back to an empty slot: %v", err)
	}
	do(Manifest{Version: "2.0", LevelMin: 1, LevelMax: 2, Floor: 3})
	if d.version() != "2.0" || d.running != SlotB {
		t.Fatal(d.version(), d.running)
	}
	if sys, err := d.config(t, state).Back(); err != nil || sys.Version != "1.0" {
		t.Fatal(sys, err)
	}
	d.start()
	if v, err := d.config(t, state).Confirm(t.Context(), healthy); v != Good || err != nil || d.version() != "1.0" {
		t.Fatal(v, err, d.version())
	}
	// What was confirmed once keeps older ones away.
	if _, err := d.config(t, state).Apply(t.Context(), bytes.NewReader(bundle(t, Manifest{Version: "1.9", LevelMin: 1, LevelMax: 1, Floor: 2})), nil); !errors.Is(err, ErrRefused) {
		t.Fatal(err)
	}
	do(Manifest{Version: "2.1", LevelMin: 1, LevelMax: 2, Floor: 3})
	// Data that has become newer than the old system is not given to it.
	c := d.config(t, state)
	c.Level, c.LevelMax = 2, 2
	if _, err := c.Back(); !errors.Is(err, ErrRefused) {
		t.Fatal(err)
	}
}

func TestRefusedBundles(t *testing.T) {
	good := Manifest{Version: "2.0", LevelMin: 1, LevelMax: 1}
	other := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{9}, ed25519.SeedSize))
	with := func(change func(*Manifest)) []byte { m := good; change(&m); return bundle(t, m) }
	whole := bundle(t, good)
	flip := func(at int) []byte { b := bytes.Clone(whole); b[at] ^= 1; return b }
	for name, c := range map[string]struct {
		b    []byte
		want error
	}{
		"another's key":         {bundle(t, good, other), ErrRefused},
		"no signature":          {bundle(t, good, nil...)[:0], ErrDamaged},
		"needs a newer level":   {with(func(m *Manifest) { m.LevelMin, m.LevelMax = 2, 3 }), ErrRefused},
		"reads older data only": {with(func(m *Manifest) { m.LevelMin, m.LevelMax = 0, 0 }), ErrRefused},
		"a bit of the manifest": {flip(512 + 60), ErrRefused},
		"a bit of the system":   {flip(4096), ErrDamaged},
		"cut short":             {whole[:len(whole)-3000], nil},
		"empty":                 {nil, ErrDamaged},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDisk("1.0")
			_, err := d.config(t, t.TempDir()).Apply(t.Context(), bytes.NewReader(c.b), nil)
			if err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			if d.boot != (BootState{Slot: SlotA}) {
				t.Fatalf("it would be started: %+v", d.boot)
			}
		})
	}
	d := newDisk("1.0")
	if m, err := d.config(t, t.TempDir()).Apply(t.Context(), bytes.NewReader(bundle(t, good, other, testKey)), nil); err != nil || m.Version != "2.0" {
		t.Errorf("with a second signature: %v", err)
	}
	if !bytes.Equal(bundle(t, good), whole) {
		t.Error("packing twice gives other bytes")
	}
}

func TestAgent(t *testing.T) {
	d, state, dir := newDisk("1.0"), t.TempDir(), t.TempDir()
	reboots := 0
	reboot := func(context.Context) error { reboots++; return nil }
	name := BundleName(strings.Repeat("ab", 32))
	if err := os.WriteFile(filepath.Join(dir, name), bundle(t, Manifest{Version: "2.0", LevelMin: 1, LevelMax: 1}), 0o600); err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(t.TempDir(), "x")
	os.WriteFile(outside, nil, 0o600)
	os.Symlink(outside, filepath.Join(dir, "link.varve"))
	for _, bad := range []Request{{ID: "1", Action: "format"}, {ID: "2", Action: ActionApply, Bundle: "../x"}, {ID: "3", Action: ActionApply, Bundle: "link.varve"},
		{ID: "4", Action: ActionApply, Bundle: "none.varve"}, {ID: "5", Action: ActionBack, Reboot: true}, {ID: strings.Repeat("x", 100), Action: ActionCancel}} {
		if err := Ask(dir, bad); err != nil {
			t.Fatal(err)
		}
		err := d.config(t, state).Serve(t.Context(), dir, reboot)
		if st, _ := Answer(dir); err == nil || st.State != StateFailed || st.ID != bad.ID || reboots > 0 {
			t.Fatalf("%+v: %v, %+v, %d restarts", bad, err, st, reboots)
		}
	}
	want := Request{ID: "6", Action: ActionApply, Bundle: name, Reboot: true}
	if err := Ask(dir, want); err != nil {
		t.Fatal(err)
	}
	if err := Ask(dir, want); !errors.Is(err, ErrRefused) {
		t.Fatal(err)
	}
	stopped, stop := context.WithCancel(t.Context())
	stop()
	d.config(t, state).Serve(stopped, dir, reboot)
	if _, pending, _ := Asked(dir); !pending {
		t.Fatal("a stopped agent forgot the request")
	}
	if err := d.config(t, state).Serve(t.Context(), dir, reboot); err != nil || reboots != 1 {
		t.Fatal(err, reboots)
	}
	st, err := Answer(dir)
	if _, pending, _ := Asked(dir); pending || err != nil || st.State != StateDone || st.Now == nil || st.Now.Trying != "2.0" {
		t.Fatalf("%+v %v", st, err)
	}
	if err := d.config(t, state).Serve(t.Context(), dir, reboot); err != nil || reboots != 1 {
		t.Fatal("without a request it does something", err)
	}
}

func TestGrubEnvironment(t *testing.T) {
	dir := t.TempDir()
	g := Grub{Env: filepath.Join(dir, "grubenv"), Devices: dir, Cmdline: filepath.Join(dir, "cmdline")}
	text := envHead + "slot=b\nsaved_entry=x\\\\y\ntry=a\ntries=2\n"
	os.WriteFile(g.Env, []byte(text+strings.Repeat("#", envSize-len(text))), 0o600)
	os.WriteFile(g.Cmdline, []byte("BOOT_IMAGE=/vmlinuz root=PARTUUID=1 ro varve.slot=b quiet\n"), 0o600)
	if st, err := g.Boot(); err != nil || st != (BootState{SlotB, SlotA, 2}) {
		t.Fatal(st, err)
	}
	if s, err := g.Running(); s != SlotB || err != nil {
		t.Fatal(s, err)
	}
	want := BootState{Slot: SlotA, Try: SlotB, Tries: 3}
	if err := g.SetBoot(want); err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(g.Env)
	if len(b) != envSize || !strings.HasPrefix(string(b), envHead+"slot=a\ntry=b\ntries=3\nsaved_entry=x\\\\y\n#") {
		t.Fatalf("%q", b[:120])
	}
	if st, err := g.Boot(); err != nil || st != want {
		t.Fatal(st, err)
	}
	os.WriteFile(filepath.Join(dir, "varve-b"), make([]byte, 8192), 0o600)
	if err := g.Write(t.Context(), SlotB, strings.NewReader("system")); err != nil {
		t.Fatal(err)
	}
	if n, err := g.Size(SlotB); n != 8192 || err != nil {
		t.Fatal(n, err)
	}
	r, err := g.Read(SlotB, 6)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, _ := io.ReadAll(r); string(got) != "system" {
		t.Fatalf("%q", got)
	}
}

func FuzzEnvironment(f *testing.F) {
	f.Add([]byte("slot=b\ntry=\ntries=9\n"))
	f.Add([]byte("try=a\nx=#\ny"))
	f.Fuzz(func(t *testing.T, body []byte) {
		b := append([]byte(envHead), body...)
		b = append(b, bytes.Repeat([]byte("#"), max(0, envSize-len(b)))...)
		vars, err := parseEnv(b)
		if err != nil {
			return
		}
		st := stateOf(vars)
		again, err := formatEnv(st, vars)
		if err != nil {
			return
		}
		vars2, err := parseEnv(again)
		if err != nil || stateOf(vars2) != st {
			t.Fatalf("%+v reads back as %+v, %v", st, stateOf(vars2), err)
		}
	})
}

func FuzzBundle(f *testing.F) {
	var b bytes.Buffer
	if _, err := Pack(&b, Manifest{Version: "1", Built: time.Unix(1, 0)}, strings.NewReader("x"), testKey); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, in []byte) {
		m, root, err := OpenBundle(bytes.NewReader(in), keys(testKey))
		if err != nil {
			return
		}
		if fmt.Sprint(m.Version) != "1" {
			t.Fatalf("a manifest that nobody signed: %+v", m)
		}
		io.Copy(io.Discard, root)
		root.Whole()
	})
}
