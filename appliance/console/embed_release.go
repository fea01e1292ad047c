//go:build release

package console

import "embed"

// A release is not built without the console: these patterns have to match.
//
//go:embed dist/index.html.gz dist/theme.js.gz dist/assets
var built embed.FS
