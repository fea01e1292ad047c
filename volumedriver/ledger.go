package volumedriver

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"time"

	"github.com/google/uuid"
)

const ledgerEvery = 5 * time.Second

// ledgerEntry is how far a volume's log was.
type ledgerEntry struct {
	Logged uint64 `json:"logged"`
	Backed uint64 `json:"backed"`
	Time   int64  `json:"time"` // Unix nanoseconds
}

// keepLedger notes now and then how far each volume with something in the log is. It promises nothing, so it is not synced.
func (d *Driver) keepLedger(ctx context.Context) error {
	if d.cfg.Ledger == "" {
		return nil
	}
	tick := time.NewTicker(ledgerEvery)
	defer tick.Stop()
	entries := d.readLedger()
	if entries == nil {
		entries = make(map[uuid.UUID]ledgerEntry)
	}
	for end := false; !end; {
		select {
		case <-ctx.Done():
			end = true
		case <-tick.C:
		}
		if !d.noteLedger(entries) {
			continue
		}
		if err := d.writeLedger(entries); err != nil {
			d.log.Warn("ledger not written", "path", d.cfg.Ledger, "err", err)
		}
	}
	return nil
}

// noteLedger brings the entries of open volumes up to date; false if nothing moved.
func (d *Driver) noteLedger(entries map[uuid.UUID]ledgerEntry) bool {
	d.mu.RLock()
	volumes := make([]*Volume, 0, len(d.volumes))
	for _, v := range d.volumes {
		volumes = append(volumes, v)
	}
	d.mu.RUnlock()
	changed := false
	for _, v := range volumes {
		e := ledgerEntry{Logged: v.logged.Load(), Backed: v.backed(), Time: d.now().UnixNano()}
		if old := entries[v.id]; old.Logged != e.Logged || old.Backed != e.Backed {
			entries[v.id] = e
			changed = true
		}
	}
	return changed
}

func (d *Driver) writeLedger(entries map[uuid.UUID]ledgerEntry) error {
	b, err := json.Marshal(entries)
	if err != nil {
		return err
	}
	next := d.cfg.Ledger + ".next"
	if err := d.cfg.FS.MkdirAll(path.Dir(next), 0o700); err != nil {
		return err
	}
	f, err := d.cfg.FS.OpenFile(next, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, 0)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", next, err)
	}
	return d.cfg.FS.Rename(next, d.cfg.Ledger)
}

// readLedger gives the entries of the last run, nil if there are none that can be read.
func (d *Driver) readLedger() map[uuid.UUID]ledgerEntry {
	if d.cfg.Ledger == "" {
		return nil
	}
	f, err := d.cfg.FS.OpenFile(d.cfg.Ledger, os.O_RDONLY, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil || size > 256<<20 {
		return nil
	}
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		d.log.Warn("ledger not read", "path", d.cfg.Ledger, "err", err)
		return nil
	}
	var entries map[uuid.UUID]ledgerEntry
	if err := json.Unmarshal(b, &entries); err != nil {
		d.log.Warn("ledger not read", "path", d.cfg.Ledger, "err", err)
		return nil
	}
	return entries
}
