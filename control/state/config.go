package state

import (
	"fmt"
	"slices"
	"unicode/utf8"

	"github.com/google/uuid"
)

// ConfigKey is a setting of the cluster with its former values, the newest first. No secret is kept here.
type ConfigKey struct {
	Key     string        `json:"key"`
	Value   string        `json:"value"`
	Version uint64        `json:"version"`
	By      string        `json:"by,omitempty"`
	At      Time          `json:"at"`
	Former  []ConfigValue `json:"former,omitempty"`
	Rev     uint64        `json:"rev"`
}

// ConfigValue is a former value of a key.
type ConfigValue struct {
	Value   string `json:"value"`
	Version uint64 `json:"version"`
	By      string `json:"by,omitempty"`
	At      Time   `json:"at"`
}

// Limits of config keys.
const (
	ConfigKeysMax       = 1024
	ConfigValueBytesMax = 4 << 10
	configFormerMax     = 16
)

// Branding is how the console presents itself.
type Branding struct {
	ID      uuid.UUID `json:"id"`
	Name    string    `json:"name"`
	Product string    `json:"product"`
	// Colour is "#rrggbb" or "".
	Colour string `json:"colour,omitempty"`
	// Logo is a PNG.
	Logo []byte `json:"logo,omitempty"`
	// Default is the one that is shown; at most one is.
	Default bool   `json:"default,omitempty"`
	Rev     uint64 `json:"rev"`
}

// Limits of brandings.
const (
	BrandingsMax         = 16
	BrandingLogoBytesMax = 64 << 10
)

const (
	tConfig   = "config"
	tBranding = "branding"
)

func configTable(frame byte) object {
	o := rowObject[ConfigKey](frame, tConfig, map[string]index{byID: always(func(k *ConfigKey) []byte { return []byte(k.Key) })})
	o.commands = []func() Command{command[SetConfig], command[DeleteConfig]}
	return o
}

func brandingTable(frame byte) object {
	o := rowObject[Branding](frame, tBranding, map[string]index{
		byID:   always(func(b *Branding) []byte { return b.ID[:] }),
		byName: always(func(b *Branding) []byte { return []byte(b.Name) }),
	})
	o.commands = []func() Command{command[SetBranding], command[DeleteBranding]}
	return o
}

// SetConfig sets a key. Rev 0 sets it whatever is there.
type SetConfig struct {
	Key   string `json:"key"`
	Value string `json:"value"`
	By    string `json:"by,omitempty"`
	Rev   uint64 `json:"rev,omitempty"`
}

func (*SetConfig) kind() (string, int) { return "set_config", 1 }

func (c *SetConfig) check() error {
	object := "config " + quote(c.Key)
	if len(c.Value) > ConfigValueBytesMax || !utf8.ValidString(c.Value) {
		return invalid(object, fmt.Sprintf("value of %d bytes, more than %d, or not UTF-8", len(c.Value), ConfigValueBytesMax))
	}
	if err := checkText(object, c.By); err != nil {
		return err
	}
	return checkLabel("config", c.Key)
}

func (c *SetConfig) apply(t *tx) (Result, error) {
	object := "config " + quote(c.Key)
	row := ConfigKey{Key: c.Key}
	have, found := first[ConfigKey](&t.View, tConfig, byID, []byte(c.Key))
	switch {
	case found:
		row = *have
		if err := fresh(object, c.Rev, row.Rev); err != nil {
			return Result{}, err
		}
		former := append([]ConfigValue{{Value: row.Value, Version: row.Version, By: row.By, At: row.At}}, row.Former...)
		row.Former = slices.Clip(former[:min(len(former), configFormerMax)])
	case c.Rev != 0:
		return Result{}, missing(object)
	case count[ConfigKey](&t.View, tConfig, byID, nil) >= ConfigKeysMax:
		return Result{}, &Error{Err: ErrNoSpace, Object: object, Detail: fmt.Sprintf("%d keys", ConfigKeysMax)}
	}
	row.Value, row.By, row.At, row.Rev = c.Value, c.By, t.at, t.index
	row.Version++
	t.put(tConfig, &row)
	t.emit("config_changed", tConfig, c.Key, struct {
		Version uint64 `json:"version"`
		By      string `json:"by,omitempty"`
	}{row.Version, c.By})
	return Result{Created: !found}, nil
}

// DeleteConfig gives a key its default again.
type DeleteConfig struct {
	Key string `json:"key"`
	Rev uint64 `json:"rev,omitempty"`
}

func (*DeleteConfig) kind() (string, int) { return "delete_config", 1 }

func (c *DeleteConfig) check() error { return nil }

func (c *DeleteConfig) apply(t *tx) (Result, error) {
	object := "config " + quote(c.Key)
	have, ok := first[ConfigKey](&t.View, tConfig, byID, []byte(c.Key))
	if !ok {
		return Result{}, missing(object)
	}
	row := *have
	if err := fresh(object, c.Rev, row.Rev); err != nil {
		return Result{}, err
	}
	t.del(tConfig, &row)
	t.emit("config_changed", tConfig, c.Key, nil)
	return Result{}, nil
}

// SetBranding makes or changes a branding. One that becomes the default takes that from the one that was.
type SetBranding struct {
	ID      uuid.UUID `json:"id"`
	Rev     uint64    `json:"rev,omitempty"`
	Name    string    `json:"name"`
	Product string    `json:"product"`
	Colour  string    `json:"colour,omitempty"`
	Logo    []byte    `json:"logo,omitempty"`
	Default bool      `json:"default,omitempty"`
}

func (*SetBranding) kind() (string, int) { return "set_branding", 1 }

func (c *SetBranding) check() error {
	object := "branding " + quote(c.Name)
	if c.ID == uuid.Nil {
		return invalid(object, "no id")
	}
	if len(c.Logo) > BrandingLogoBytesMax || len(c.Logo) > 0 && (len(c.Logo) < 8 || string(c.Logo[:8]) != "\x89PNG\r\n\x1a\n") {
		return invalid(object, fmt.Sprintf("logo of %d bytes is not a PNG of at most %d", len(c.Logo), BrandingLogoBytesMax))
	}
	if c.Colour != "" && !isColour(c.Colour) {
		return invalid(object, "colour "+quote(c.Colour)+" is not #rrggbb")
	}
	if err := checkText(object, c.Product); err != nil {
		return err
	}
	return checkLabel("branding", c.Name)
}

func isColour(s string) bool {
	if len(s) != 7 || s[0] != '#' {
		return false
	}
	for _, r := range s[1:] {
		if (r < '0' || r > '9') && (r < 'a' || r > 'f') {
			return false
		}
	}
	return true
}

func (c *SetBranding) apply(t *tx) (Result, error) {
	object := "branding " + quote(c.Name)
	have, found := first[Branding](&t.View, tBranding, byID, c.ID[:])
	switch {
	case found:
		if err := fresh(object, c.Rev, have.Rev); err != nil {
			return Result{}, err
		}
	case c.Rev != 0:
		return Result{}, missing(object)
	case count[Branding](&t.View, tBranding, byID, nil) >= BrandingsMax:
		return Result{}, &Error{Err: ErrNoSpace, Object: object, Detail: fmt.Sprintf("%d brandings", BrandingsMax)}
	}
	if other, ok := first[Branding](&t.View, tBranding, byName, []byte(c.Name)); ok && other.ID != c.ID {
		return Result{}, &Error{Err: ErrExist, Object: object}
	}
	for _, b := range t.Brandings() {
		if c.Default && b.Default && b.ID != c.ID {
			b.Default, b.Rev = false, t.index
			t.put(tBranding, &b)
		}
	}
	t.put(tBranding, &Branding{ID: c.ID, Name: c.Name, Product: c.Product, Colour: c.Colour, Logo: slices.Clone(c.Logo), Default: c.Default,
		Rev: t.index})
	t.emit("config_changed", tBranding, c.ID.String(), nil)
	return Result{Object: c.ID, Created: !found}, nil
}

// DeleteBranding takes a branding away.
type DeleteBranding struct {
	ID  uuid.UUID `json:"id"`
	Rev uint64    `json:"rev,omitempty"`
}

func (*DeleteBranding) kind() (string, int) { return "delete_branding", 1 }

func (c *DeleteBranding) check() error { return nil }

func (c *DeleteBranding) apply(t *tx) (Result, error) {
	object := "branding " + c.ID.String()
	have, ok := first[Branding](&t.View, tBranding, byID, c.ID[:])
	if !ok {
		return Result{}, missing(object)
	}
	row := *have
	if err := fresh(object, c.Rev, row.Rev); err != nil {
		return Result{}, err
	}
	t.del(tBranding, &row)
	t.emit("config_changed", tBranding, c.ID.String(), nil)
	return Result{Object: c.ID}, nil
}

// Config returns a key.
func (v *View) Config(key string) (ConfigKey, error) {
	k, ok := first[ConfigKey](v, tConfig, byID, []byte(key))
	if !ok {
		return ConfigKey{}, missing("config " + quote(key))
	}
	return *k, nil
}

// Configs returns all keys that are set, by name.
func (v *View) Configs() []ConfigKey { return all[ConfigKey](v, tConfig, byID, nil) }

// Branding returns one branding.
func (v *View) Branding(id uuid.UUID) (Branding, error) {
	b, ok := first[Branding](v, tBranding, byID, id[:])
	if !ok {
		return Branding{}, missing("branding " + id.String())
	}
	return *b, nil
}

// Brandings returns all brandings, by name.
func (v *View) Brandings() []Branding { return all[Branding](v, tBranding, byName, nil) }
