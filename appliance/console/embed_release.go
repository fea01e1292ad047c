//go:build release

package console

import "embed"

// A release is not built without the console: these patterns have to match.
//
//go:embed dist/index.html.gz dist/theme.js.gz dist/favicon.svg.gz dist/assets
var built embed.FS
