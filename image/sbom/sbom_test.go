package sbom

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"
)

const status = `Package: libc6
Status: install ok installed
Source: glibc
Architecture: amd64
Maintainer: GNU Libc Maintainers <debian-glibc@lists.debian.org>
Description: libraries
 Package: not-a-package
Version: 2.36-9+deb12u10

Package: gone
Status: deinstall ok config-files
Version: 1

Package: linux-base
Status: install ok installed
Architecture: all
Version: 4.9
`

func TestEverySourceIsListed(t *testing.T) {
	debs, err := Debian(strings.NewReader(status))
	if err != nil || len(debs) != 2 || debs[0].URL != "pkg:deb/debian/libc6@2.36-9+deb12u10?arch=amd64&distro=debian-12&upstream=glibc" {
		t.Fatalf("%v %+v", err, debs)
	}
	self, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	mods, err := Go(self)
	if err != nil || len(mods) == 0 || mods[0].Name != "go" || mods[0].Version == "" {
		t.Fatalf("%v %+v", err, mods)
	}
	npm, err := NPM([]byte(`{"packages":{"":{"version":"1"},"node_modules/@tanstack/query":{"version":"5.1.0","license":"MIT"},
		"node_modules/vite":{"version":"8","dev":true},"node_modules/a/node_modules/react":{"version":"19.0.0"},"node_modules/react":{"version":"19.0.0"}}}`))
	if err != nil || len(npm) != 2 || npm[0].URL != "pkg:npm/%40tanstack/query@5.1.0" {
		t.Fatalf("%v %+v", err, npm)
	}
	all := append(append(debs, mods...), npm...)
	var a, b bytes.Buffer
	when := time.Unix(1_700_000_000, 0)
	for _, w := range []*bytes.Buffer{&a, &b} {
		if err := Write(w, "varve", "1.0", when, all); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(a.Bytes(), b.Bytes()) {
		t.Error("two lists of the same differ")
	}
	var doc struct {
		SPDXVersion   string
		Packages      []struct{ SPDXID, Name string }
		Relationships []struct{ RelatedSpdxElement string }
	}
	if err := json.Unmarshal(a.Bytes(), &doc); err != nil || doc.SPDXVersion != "SPDX-2.3" || len(doc.Packages) != len(all)+1 ||
		len(doc.Relationships) != len(doc.Packages) {
		t.Fatalf("%v %+v", err, doc)
	}
	seen := map[string]bool{}
	for _, p := range doc.Packages {
		if seen[p.SPDXID] {
			t.Errorf("%s twice", p.SPDXID)
		}
		seen[p.SPDXID] = true
	}
}
