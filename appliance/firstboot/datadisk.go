package firstboot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/control/durable"
)

// The data disk is a whole disk with one XFS, labelled varve-data. A file in its root says that it is complete. `varve firstboot data`
// waits until there is one and leaves the symlink RUN/data-disk, by which the service manager mounts it; here it is mounted only
// for a moment, to look at it and to grow it.
//
// A disk is one of
//
//	system   it has a partition of the appliance's system
//	ours     XFS labelled varve-data
//	blank    no partition, no holder, no signature that blkid knows, and only zeros: the first 16 MiB, the last 4 MiB and 256
//	         samples between
//	foreign  anything else: it is never written to, whatever anybody confirms
//
// and what is done with them:
//
//	STATE/disk.json names the disk in use -> that one is used; if it is missing nothing else takes its place by itself: an
//	    empty appliance in place of a full one would look like lost data. If it is there twice, as with a copy, it is asked
//	no disk known, one ours               -> used (a new system disk with an old data disk)
//	no disk known, none ours, one blank   -> formatted
//	otherwise                             -> asked on the screen
//
// Formatting, each step on disk before the next:
//
//	disk.json {formatting: which disk} -> mkfs -> mark file -> disk.json {uuid} -> RUN/data-disk
//
// Power lost in between leaves disk.json with "formatting": the same disk, if it is still blank or ours without a file, is formatted
// again.

// Kinds of disks.
const (
	DiskSystem  = "system"
	DiskOurs    = "ours"
	DiskBlank   = "blank"
	DiskForeign = "foreign"
)

// Disk is a block device.
type Disk struct {
	Name   string `json:"name"` // sdb
	Size   int64  `json:"size"`
	Serial string `json:"serial,omitempty"`
	Model  string `json:"model,omitempty"`
	Kind   string `json:"kind"`
	// Why it is of that kind.
	Why  string `json:"why,omitempty"`
	UUID string `json:"uuid,omitempty"` // of our file system
}

// States of the data disk.
const (
	DataReady   = "ready"
	DataNone    = "none"    // there is no disk to use
	DataAsk     = "ask"     // somebody has to choose
	DataMissing = "missing" // the disk of before is not there
)

// DiskReport says what became of the data disk.
type DiskReport struct {
	State     string `json:"state"`
	Device    string `json:"device,omitempty"`
	Formatted bool   `json:"formatted,omitempty"` // this boot did
	Disks     []Disk `json:"disks,omitempty"`
	Advice    string `json:"advice,omitempty"`
	Error     string `json:"error,omitempty"`
}

// diskRecord is STATE/disk.json.
type diskRecord struct {
	UUID       string `json:"uuid,omitempty"`
	Formatting *Disk  `json:"formatting,omitempty"`
}

const (
	diskFile   = "disk.json"
	choiceFile = "data-choice"
	dataLink   = "data-disk"
	diskEvery  = 2 * time.Second
	markFile   = "varve-data.json"
	diskLabel  = "varve-data"
	diskMin    = 4 << 30
	headBytes  = 16 << 20
	tailBytes  = 4 << 20
	samples    = 256
	sampleSize = 64 << 10
	sectorSize = 512
)

// mark is the file in the root of a data disk.
type mark struct {
	ID   uuid.UUID `json:"id"`
	Made time.Time `json:"made"`
}

// WaitForData returns when there is a data disk and RUN/data-disk leads to it. It looks again every few seconds, since a disk can be
// added and a choice be made while it waits. RUN/disk.json tells the screen how things are.
func WaitForData(ctx context.Context, cfg Config) (DiskReport, error) {
	if err := durable.MakeDir(cfg.Paths.State); err != nil {
		return DiskReport{}, err
	}
	if err := os.MkdirAll(cfg.Paths.Run, 0o755); err != nil { // first boot makes it, unless it failed
		return DiskReport{}, fmt.Errorf("make %s: %w", cfg.Paths.Run, err)
	}
	tick := time.NewTicker(diskEvery)
	defer tick.Stop()
	last := ""
	for {
		r, err := findData(ctx, cfg)
		if err != nil {
			r.Error = err.Error()
		}
		b, e := json.Marshal(r)
		if e != nil {
			return r, e
		}
		if string(b) != last {
			last = string(b)
			cfg.Log.Info("data disk", "state", r.State, "device", r.Device, "advice", r.Advice, "err", r.Error)
			if err := durable.Replace(cfg.Paths.Run, diskFile, b, 0o600); err != nil {
				return r, err
			}
		}
		if r.State == DataReady {
			return r, link(r.Device, filepath.Join(cfg.Paths.Run, dataLink))
		}
		select {
		case <-ctx.Done():
			return r, ctx.Err()
		case <-tick.C:
		}
	}
}

// LastDisk is what WaitForData last found.
func LastDisk(p Paths) (DiskReport, error) {
	var r DiskReport
	err := readJSON(filepath.Join(p.Run, diskFile), &r)
	return r, err
}

// Choose names the disk to use where that has to be asked: WaitForData takes it up.
func Choose(p Paths, device string) error {
	return durable.Replace(p.Run, choiceFile, []byte(device+"\n"), 0o600)
}

// findData looks once, and formats where that is safe.
func findData(ctx context.Context, cfg Config) (DiskReport, error) {
	disks, err := listDisks(ctx, cfg)
	r := DiskReport{State: DataNone, Disks: disks}
	if err != nil {
		return r, err
	}
	rec, err := loadDisk(cfg.Paths)
	if err != nil {
		return r, err
	}
	if b, err := readBounded(filepath.Join(cfg.Paths.Run, choiceFile), 1<<10); err == nil {
		if err := os.Remove(filepath.Join(cfg.Paths.Run, choiceFile)); err != nil {
			return r, err
		}
		return r.chosen(ctx, cfg, strings.TrimSpace(string(b)))
	}
	if f := rec.Formatting; f != nil {
		i := slices.IndexFunc(disks, func(d Disk) bool { return d.Name == f.Name && d.Size == f.Size && d.Serial == f.Serial })
		if i >= 0 && unfinished(cfg, disks[i]) {
			return r.format(ctx, cfg, disks[i])
		}
	}
	ours, blank := ofKind(disks, DiskOurs), ofKind(disks, DiskBlank)
	known, twins := -1, 0
	for i, d := range ours {
		if d.UUID == rec.UUID {
			known, twins = i, twins+1
		}
	}
	switch {
	case twins > 1:
		r.State, r.Advice = DataAsk, "the data disk is there twice, one is a copy: choose the one to use, or detach the other"
	case rec.UUID != "" && known >= 0:
		return r.use(ctx, cfg, ours[known])
	case rec.UUID != "":
		r.State = DataMissing
		r.Advice = "the data disk of before is not there: attach it again, or choose another disk"
	case len(ours) == 1:
		return r.use(ctx, cfg, ours[0])
	case len(ours) > 1:
		r.State, r.Advice = DataAsk, "more than one data disk is attached: choose the one to use, or detach the others"
	case len(blank) == 1:
		return r.format(ctx, cfg, blank[0])
	case len(blank) > 1:
		r.State, r.Advice = DataAsk, "more than one empty disk is attached: choose the one for data"
	default:
		r.Advice = "attach an empty disk for data, of 64 GiB or more"
	}
	return r, nil
}

// chosen uses the disk that the administrator has named. One with anything foreign on it is refused.
func (r DiskReport) chosen(ctx context.Context, cfg Config, name string) (DiskReport, error) {
	i := slices.IndexFunc(r.Disks, func(d Disk) bool { return d.Name == strings.TrimPrefix(name, "/dev/") })
	r.State = DataAsk
	switch {
	case i < 0:
		return r, fmt.Errorf("disk %s: %w", clip(name), fs.ErrNotExist)
	case r.Disks[i].Kind == DiskOurs:
		return r.use(ctx, cfg, r.Disks[i])
	case r.Disks[i].Kind == DiskBlank:
		return r.format(ctx, cfg, r.Disks[i])
	}
	return r, fmt.Errorf("disk %s is not empty (%s) and is not touched: attach an empty one, or wipe it where it comes from", r.Disks[i].Name, r.Disks[i].Why)
}

func loadDisk(p Paths) (diskRecord, error) {
	var rec diskRecord
	err := readJSON(filepath.Join(p.State, diskFile), &rec)
	if errors.Is(err, fs.ErrNotExist) {
		return diskRecord{}, nil
	}
	return rec, err
}

// settingsOfDataDisk gives a new system disk the settings that the data disk has kept. It writes nothing.
func settingsOfDataDisk(ctx context.Context, cfg Config) (Settings, error) {
	disks, err := listDisks(ctx, cfg)
	ours := ofKind(disks, DiskOurs)
	if err != nil || len(ours) != 1 {
		return nil, err
	}
	var s Settings
	_, err = mounted(cfg, filepath.Join(cfg.Paths.Dev, ours[0].Name), "xfs", true, func(root string) (bool, error) {
		var err error
		s, err = keptSettings(filepath.Join(root, keptDir))
		return true, err
	})
	return s, err
}

func ofKind(disks []Disk, kind string) []Disk {
	var out []Disk
	for _, d := range disks {
		if d.Kind == kind {
			out = append(out, d)
		}
	}
	return out
}

// unfinished says whether a disk is what an interrupted format leaves.
func unfinished(cfg Config, d Disk) bool {
	if d.Kind != DiskOurs {
		return d.Kind == DiskBlank
	}
	empty := false
	_, err := mounted(cfg, filepath.Join(cfg.Paths.Dev, d.Name), "xfs", true, func(root string) (bool, error) {
		list, err := os.ReadDir(root)
		empty = err == nil && len(list) == 0
		return true, err
	})
	return err != nil || empty // what mkfs has not finished does not mount
}

func (r DiskReport) format(ctx context.Context, cfg Config, d Disk) (DiskReport, error) {
	rec, err := json.Marshal(diskRecord{Formatting: &d})
	if err != nil {
		return r, err
	}
	if err := durable.Replace(cfg.Paths.State, diskFile, rec, 0o600); err != nil {
		return r, err
	}
	dev := filepath.Join(cfg.Paths.Dev, d.Name)
	cfg.Log.Info("format the data disk", "device", dev, "bytes", d.Size, "serial", d.Serial)
	// -f: what an interrupted mkfs left is in the way otherwise. The disk was found blank, or ours and empty, a moment ago.
	if _, err := cfg.Host.Run(ctx, "mkfs.xfs", "-q", "-f", "-K", "-L", diskLabel, dev); err != nil {
		return r, fmt.Errorf("format %s: %w", dev, err)
	}
	tags, err := probe(ctx, cfg.Host, dev)
	if err != nil || tags["LABEL"] != diskLabel {
		return r, fmt.Errorf("format %s: it does not show as a data disk afterwards: %v %w", dev, tags, err)
	}
	d.Kind, d.UUID = DiskOurs, tags["UUID"]
	r.Formatted = true
	return r.use(ctx, cfg, d)
}

// use looks at a disk of ours once more, completes it, and records it as the one in use.
func (r DiskReport) use(ctx context.Context, cfg Config, d Disk) (DiskReport, error) {
	dev := filepath.Join(cfg.Paths.Dev, d.Name)
	whole := false
	_, err := mounted(cfg, dev, "xfs", false, func(root string) (bool, error) {
		whole = true
		if err := complete(cfg, root, d); err != nil {
			return true, err
		}
		if _, err := cfg.Host.Run(ctx, "xfs_growfs", root); err != nil { // it takes what the hypervisor has added
			cfg.Log.Warn("the data disk's file system was not grown", "err", err)
		}
		return true, nil
	})
	if err != nil {
		r.State, r.Advice = DataAsk, "the data disk does not mount: look at the log, restore it, or choose another"
		if whole {
			r.Advice = "the disk labelled varve-data cannot be used: detach it, or choose another"
		}
		return r, err
	}
	rec, err := json.Marshal(diskRecord{UUID: d.UUID})
	if err != nil {
		return r, err
	}
	if err := durable.Replace(cfg.Paths.State, diskFile, rec, 0o600); err != nil {
		return r, err
	}
	r.State, r.Device, r.Advice = DataReady, dev, ""
	return r, nil
}

// complete sees that what is below root is a data disk, marks it, and leaves it a copy of the settings.
func complete(cfg Config, root string, d Disk) error {
	if resetAsked(cfg.Paths) {
		cfg.Log.Warn("factory reset: the data disk is emptied", "device", d.Name)
		if err := erase(root); err != nil {
			return err
		}
		if err := resetDone(cfg.Paths); err != nil {
			return err
		}
	}
	var m mark
	err := readJSON(filepath.Join(root, markFile), &m)
	if errors.Is(err, fs.ErrNotExist) {
		list, err := os.ReadDir(root)
		if err != nil {
			return err
		}
		if _, e := os.Stat(filepath.Join(root, "control")); len(list) > 0 && e != nil {
			return fmt.Errorf("%s has files and none of an appliance", d.Name)
		}
		b, err := json.Marshal(mark{ID: uuid.New(), Made: time.Now().UTC()})
		if err != nil {
			return err
		}
		if err := durable.Replace(root, markFile, append(b, '\n'), 0o644); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	s, err := keptSettings(cfg.Paths.State)
	if err != nil || s == nil {
		return err
	}
	return keepIn(filepath.Join(root, keptDir), s)
}

// listDisks gives the disks that data could lie on, each with its kind.
func listDisks(ctx context.Context, cfg Config) ([]Disk, error) {
	dir := filepath.Join(cfg.Paths.Sys, "block")
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []Disk
	for _, e := range list {
		name := e.Name()
		if slices.ContainsFunc([]string{"loop", "ram", "zram", "sr", "fd", "dm-", "md", "nbd"}, func(p string) bool { return strings.HasPrefix(name, p) }) {
			continue
		}
		read := func(file string) string {
			b, err := readBounded(filepath.Join(dir, name, file), 4<<10)
			if err != nil {
				return ""
			}
			return strings.TrimSpace(string(b))
		}
		sectors, err := strconv.ParseInt(read("size"), 10, 64)
		if err != nil || sectors <= 0 || read("removable") == "1" {
			continue
		}
		d := Disk{Name: name, Size: sectors * sectorSize, Model: read("device/model")}
		for _, f := range []string{"device/wwid", "wwid", "serial", "device/serial"} {
			if d.Serial = read(f); d.Serial != "" {
				break
			}
		}
		d.classify(ctx, cfg, read)
		out = append(out, d)
	}
	return out, nil
}

// classify looks at everything that could mean that a disk is in use.
func (d *Disk) classify(ctx context.Context, cfg Config, read func(string) string) {
	dir := filepath.Join(cfg.Paths.Sys, "block", d.Name)
	d.Kind = DiskForeign
	if list, err := os.ReadDir(dir); err == nil {
		for _, e := range list {
			b, err := readBounded(filepath.Join(dir, e.Name(), "uevent"), 4<<10)
			if err != nil || !strings.HasPrefix(e.Name(), d.Name) {
				continue
			}
			d.Why = "it has partitions"
			if strings.Contains(string(b), "PARTNAME=varve-") {
				d.Kind, d.Why = DiskSystem, "the appliance's system"
				return
			}
		}
	}
	if d.Why != "" {
		return
	}
	if list, err := os.ReadDir(filepath.Join(dir, "holders")); err == nil && len(list) > 0 {
		d.Why = "it is in use by " + list[0].Name()
		return
	}
	if read("ro") == "1" {
		d.Why = "it is read-only"
		return
	}
	dev := filepath.Join(cfg.Paths.Dev, d.Name)
	tags, err := probe(ctx, cfg.Host, dev)
	switch {
	case err != nil:
		d.Why = "it cannot be examined: " + err.Error()
	case tags["TYPE"] == "xfs" && tags["LABEL"] == diskLabel:
		d.Kind, d.UUID = DiskOurs, tags["UUID"]
	case len(tags) > 0:
		d.Why = "it holds " + strings.TrimSpace(tags["TYPE"]+tags["PTTYPE"]+" "+tags["LABEL"])
	case d.Size < diskMin:
		d.Why = fmt.Sprintf("it is smaller than %d GiB", diskMin>>30)
	default:
		if at, err := nonZero(dev, d.Size); err != nil {
			d.Why = "it cannot be read: " + err.Error()
		} else if at >= 0 {
			d.Why = fmt.Sprintf("it is not empty: there is data at byte %d", at)
		} else {
			d.Kind = DiskBlank
		}
	}
}

// exitCoder is an error with a program's exit code.
type exitCoder interface {
	error
	ExitCode() int
}

const (
	blkidNothing   = 2
	blkidAmbiguous = 8
)

// probe gives what blkid finds by looking at the device itself; nothing if there is no signature. More than one signature is an
// error, since a disk with two owners is not ours to judge.
func probe(ctx context.Context, h Host, dev string) (map[string]string, error) {
	b, err := h.Run(ctx, "blkid", "-p", "-o", "export", dev)
	if e, ok := errors.AsType[exitCoder](err); ok {
		switch e.ExitCode() {
		case blkidNothing:
			if _, err := os.Stat(dev); err != nil { // the same code
				return nil, err
			}
			return nil, nil
		case blkidAmbiguous:
			return nil, errors.New("there is more than one signature on it")
		}
	}
	if err != nil {
		return nil, err
	}
	tags := make(map[string]string)
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && k != "DEVNAME" && !strings.HasPrefix(k, "PART_ENTRY") {
			tags[k] = v
		}
	}
	return tags, nil
}

// nonZero looks for a byte that is not zero: in the head, the tail and samples. -1 means that none was found.
func nonZero(dev string, size int64) (int64, error) {
	f, err := os.Open(dev)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b := make([]byte, 1<<20)
	look := func(off, n int64) (int64, error) {
		for n > 0 {
			part := b[:min(n, int64(len(b)), size-off)]
			if len(part) == 0 {
				return -1, nil
			}
			if _, err := f.ReadAt(part, off); err != nil && !errors.Is(err, io.EOF) {
				return 0, err
			}
			for i, c := range part {
				if c != 0 {
					return off + int64(i), nil
				}
			}
			off, n = off+int64(len(part)), n-int64(len(part))
		}
		return -1, nil
	}
	if at, err := look(0, min(headBytes, size)); err != nil || at >= 0 {
		return at, err
	}
	tail := max(0, size-tailBytes)
	if at, err := look(tail, size-tail); err != nil || at >= 0 {
		return at, err
	}
	for i := range int64(samples) {
		off := size / samples * i / sectorSize * sectorSize
		if at, err := look(off, sampleSize); err != nil || at >= 0 {
			return at, err
		}
	}
	return -1, nil
}
