//go:build !release

package console

import "embed"

// Without the console being built there is only a README in it.
//
//go:embed all:dist
var built embed.FS
