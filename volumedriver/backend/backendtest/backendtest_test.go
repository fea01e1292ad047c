package backendtest

import (
	"testing"

	"varve/volumedriver/backend"
)

func TestMem(t *testing.T) {
	Run(t, func(*testing.T) backend.Backend { return NewMem() })
}
