package vdisk

import (
	"context"
	"fmt"

	"varve/control/state"
)

// Levels that WaitLevel knows.
const (
	LevelLogged = "logged"
	LevelBacked = "backed"
)

// Ledger says how far what a vDisk has accepted has come.
func (c *Controller) Ledger(ctx context.Context, name string) (Ledger, error) {
	d, err := c.Get(ctx, name)
	if err != nil {
		return Ledger{}, err
	}
	l, err := c.cfg.Engine.Ledger(ctx, d.Volume)
	if err != nil {
		return Ledger{}, fmt.Errorf("ledger of vdisk %s: %w", name, err)
	}
	return l, nil
}

// WaitLevel waits until everything that a vDisk has accepted until now is logged, or on the backend.
func (c *Controller) WaitLevel(ctx context.Context, name, level string) error {
	if level != LevelLogged && level != LevelBacked {
		return &state.Error{Err: state.ErrInvalid, Object: "vdisk " + name, Detail: fmt.Sprintf("level %.20q is unknown", level), Remedy: "use logged or backed"}
	}
	d, err := c.Get(ctx, name)
	if err != nil {
		return err
	}
	if err := c.cfg.Engine.WaitLevel(ctx, d.Volume, level); err != nil {
		return fmt.Errorf("wait until vdisk %s is %s: %w", name, level, err)
	}
	return nil
}
