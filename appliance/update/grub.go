package update

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Grub keeps the slots in two partitions and the boot state in grub's environment block:
//
//	"# GRUB Environment Block\n", then NAME=VALUE\n …, then # up to 1024 bytes
//
// grub writes the block in place, by the disk's sectors, so it is overwritten in place here too. Our three values come first:
// they lie in the first sector, which the disk writes whole or not at all.
type Grub struct {
	Env     string // grubenv
	Devices string // a directory with varve-a and varve-b
	Cmdline string // /proc/cmdline
}

const (
	envSize   = 1024
	envHead   = "# GRUB Environment Block\n"
	envSector = 512
	slotKey   = "varve.slot="
)

// Running implements Slots.
func (g Grub) Running() (Slot, error) {
	b, err := os.ReadFile(g.Cmdline)
	if err != nil {
		return "", err
	}
	for _, w := range strings.Fields(string(b)) {
		if v, ok := strings.CutPrefix(w, slotKey); ok && (Slot(v) == SlotA || Slot(v) == SlotB) {
			return Slot(v), nil
		}
	}
	return "", errors.New("this machine was not started from one of two slots: it is no appliance image")
}

// Boot implements Slots.
func (g Grub) Boot() (BootState, error) {
	b, err := readEnv(g.Env)
	if err != nil {
		return BootState{}, err
	}
	vars, err := parseEnv(b)
	if err != nil {
		return BootState{}, fmt.Errorf("%s: %w", g.Env, err)
	}
	return stateOf(vars), nil
}

// stateOf reads the variables as grub.cfg does: what makes no sense is nothing.
func stateOf(vars []variable) BootState {
	st := BootState{Slot: SlotA}
	for _, v := range vars {
		switch {
		case v.name == "slot" && v.value == string(SlotB):
			st.Slot = SlotB
		case v.name == "try" && (v.value == string(SlotA) || v.value == string(SlotB)):
			st.Try = Slot(v.value)
		case v.name == "tries":
			if n, err := strconv.Atoi(v.value); err == nil && n > 0 && n <= TriesMax {
				st.Tries = n
			}
		}
	}
	if st.Try == "" {
		st.Tries = 0
	}
	return st
}

// SetBoot implements Slots.
func (g Grub) SetBoot(st BootState) error {
	b, err := readEnv(g.Env)
	if err != nil {
		return err
	}
	vars, err := parseEnv(b)
	if err != nil {
		return fmt.Errorf("%s: %w", g.Env, err)
	}
	block, err := formatEnv(st, vars)
	if err != nil {
		return fmt.Errorf("%s: %w", g.Env, err)
	}
	f, err := os.OpenFile(g.Env, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(block, 0)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func readEnv(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, envSize+1))
}

// variable of an environment block. Values hold what the block holds: escapes are left as they are.
type variable struct{ name, value string }

func parseEnv(b []byte) ([]variable, error) {
	if len(b) != envSize || !bytes.HasPrefix(b, []byte(envHead)) {
		return nil, fmt.Errorf("not an environment block of %d bytes", envSize)
	}
	var out []variable
	for line := range strings.Lines(string(b[len(envHead):])) {
		if strings.HasPrefix(line, "#") || line == "\n" {
			continue
		}
		name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		if !ok || name == "" || !strings.HasSuffix(line, "\n") {
			return nil, fmt.Errorf("a line that is no variable: %q", clip(line))
		}
		out = append(out, variable{name, value})
	}
	return out, nil
}

func clip(s string) string { return s[:min(len(s), 40)] }

// formatEnv writes st first and keeps what else is there.
func formatEnv(st BootState, vars []variable) ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%sslot=%s\ntry=%s\ntries=%d\n", envHead, st.Slot, st.Try, st.Tries)
	if b.Len() > envSector {
		return nil, errors.New("the boot state does not fit a sector")
	}
	for _, v := range vars {
		if !slices.Contains([]string{"slot", "try", "tries"}, v.name) {
			fmt.Fprintf(&b, "%s=%s\n", v.name, v.value)
		}
	}
	if b.Len() > envSize {
		return nil, errors.New("the environment block is full")
	}
	return append(b.Bytes(), bytes.Repeat([]byte("#"), envSize-b.Len())...), nil
}

func (g Grub) device(s Slot) string { return filepath.Join(g.Devices, "varve-"+string(s)) }

// Size implements Slots.
func (g Grub) Size(s Slot) (int64, error) {
	f, err := os.Open(g.device(s))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

const copyBytes = 1 << 20

// Write implements Slots. A slot that is mounted cannot be opened.
func (g Grub) Write(ctx context.Context, s Slot, r io.Reader) error {
	f, err := os.OpenFile(g.device(s), os.O_WRONLY|unix.O_EXCL, 0)
	if err != nil {
		return err
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{f}, struct{ io.Reader }{untilDone{ctx, r}}, make([]byte, copyBytes))
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// untilDone ends reading when ctx ends.
type untilDone struct {
	ctx context.Context
	r   io.Reader
}

func (u untilDone) Read(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.r.Read(p)
}

// Read implements Slots.
func (g Grub) Read(s Slot, n int64) (io.ReadCloser, error) {
	f, err := os.Open(g.device(s))
	if err != nil {
		return nil, err
	}
	// What was written is on the medium by now: let the kernel forget it, so that it is read from there.
	if err := unix.Fadvise(int(f.Fd()), 0, n, unix.FADV_DONTNEED); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return struct {
		io.Reader
		io.Closer
	}{io.LimitReader(f, n), f}, nil
}

var _ Slots = Grub{}
