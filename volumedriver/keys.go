package volumedriver

import (
	"github.com/google/uuid"

	"varve/volumedriver/sco"
)

// sealOptions say how the objects of a volume are made.
func (d *Driver) sealOptions(volume uuid.UUID) sco.Options { return sco.Options{} }

// keys finds the keys of a volume's objects.
func (d *Driver) keys(volume uuid.UUID) sco.KeySource { return nil }
