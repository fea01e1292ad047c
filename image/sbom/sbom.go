// Package sbom lists what is in an appliance as an SPDX 2.3 document in JSON: the Debian packages as dpkg's status file has them, the
// Go modules as the binary itself has them, and the console's npm packages as its lock file has them. Nothing is guessed: what these
// three do not say is NOASSERTION. The document's time and namespace come from the caller, so that the same image has the same list.
package sbom

import (
	"bufio"
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"time"
)

// Package is one component.
type Package struct {
	Name, Version string
	Supplier      string // Organization: …, Person: … or empty
	License       string
	URL           string // a package URL, pkg:deb/… or pkg:golang/…
}

const lineBytesMax = 1 << 20

// Debian reads a dpkg status file; packages that are not installed are left out.
func Debian(r io.Reader) ([]Package, error) {
	var out []Package
	var name, version, arch, status, maintainer, source string
	end := func() {
		if name != "" && strings.HasSuffix(status, " installed") {
			q := url.Values{"arch": {arch}, "distro": {"debian-12"}}
			if source != "" {
				q.Set("upstream", source)
			}
			out = append(out, Package{Name: name, Version: version, Supplier: "Organization: " + maintainer,
				URL: "pkg:deb/debian/" + name + "@" + url.PathEscape(version) + "?" + q.Encode()})
		}
		name, version, arch, status, maintainer, source = "", "", "", "", "", ""
	}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, lineBytesMax)
	for lines.Scan() {
		key, value, ok := strings.Cut(lines.Text(), ": ")
		switch {
		case lines.Text() == "":
			end()
		case !ok || key == "" || key[0] == ' ':
		case key == "Package":
			name = value
		case key == "Version":
			version = value
		case key == "Architecture":
			arch = value
		case key == "Status":
			status = value
		case key == "Maintainer":
			maintainer = value
		case key == "Source":
			source, _, _ = strings.Cut(value, " ")
		}
	}
	end()
	return out, lines.Err()
}

// Go reads the modules that a binary says it is made of.
func Go(binary io.ReaderAt) ([]Package, error) {
	info, err := buildinfo.Read(binary)
	if err != nil {
		return nil, fmt.Errorf("read the binary's modules: %w", err)
	}
	out := []Package{{Name: "go", Version: strings.TrimPrefix(info.GoVersion, "go"), Supplier: "Organization: The Go Authors", License: "BSD-3-Clause",
		URL: "pkg:golang/stdlib@" + strings.TrimPrefix(info.GoVersion, "go")}}
	for _, m := range info.Deps {
		out = append(out, module(m))
	}
	return out, nil
}

func module(m *debug.Module) Package {
	for m.Replace != nil {
		m = m.Replace
	}
	return Package{Name: m.Path, Version: m.Version, URL: "pkg:golang/" + m.Path + "@" + url.PathEscape(m.Version)}
}

// NPM reads the packages of a package-lock.json that are part of what is shipped; those for development alone are left out.
func NPM(lock []byte) ([]Package, error) {
	var l struct {
		Packages map[string]struct {
			Version, License string
			Dev, Link        bool
		}
	}
	if err := json.Unmarshal(lock, &l); err != nil {
		return nil, fmt.Errorf("read package-lock.json: %w", err)
	}
	var out []Package
	for path, p := range l.Packages {
		i := strings.LastIndex(path, "node_modules/")
		if i < 0 || p.Dev || p.Link {
			continue
		}
		name := path[i+len("node_modules/"):]
		out = append(out, Package{Name: name, Version: p.Version, License: p.License, URL: "pkg:npm/" + strings.Replace(name, "@", "%40", 1) + "@" + p.Version})
	}
	slices.SortFunc(out, func(a, b Package) int { return strings.Compare(a.URL, b.URL) })
	return slices.CompactFunc(out, func(a, b Package) bool { return a.URL == b.URL }), nil
}

var notInID = regexp.MustCompile(`[^A-Za-z0-9.-]+`)

// Write writes the document of a product that contains packages.
func Write(w io.Writer, name, version string, when time.Time, packages []Package) error {
	type ref struct {
		Category string `json:"referenceCategory"`
		Type     string `json:"referenceType"`
		Locator  string `json:"referenceLocator"`
	}
	type pkg struct {
		Name     string `json:"name"`
		ID       string `json:"SPDXID"`
		Version  string `json:"versionInfo"`
		Supplier string `json:"supplier"`
		Download string `json:"downloadLocation"`
		Analyzed bool   `json:"filesAnalyzed"`
		Declared string `json:"licenseDeclared"`
		Refs     []ref  `json:"externalRefs,omitempty"`
	}
	type relation struct {
		From string `json:"spdxElementId"`
		Kind string `json:"relationshipType"`
		To   string `json:"relatedSpdxElement"`
	}
	or := func(s, other string) string {
		if s == "" {
			return other
		}
		return s
	}
	const unknown = "NOASSERTION"
	list := []pkg{{Name: name, ID: "SPDXRef-product", Version: version, Supplier: unknown, Download: unknown, Declared: "Apache-2.0"}}
	relations := []relation{{"SPDXRef-DOCUMENT", "DESCRIBES", "SPDXRef-product"}}
	for i, p := range packages {
		id := fmt.Sprintf("SPDXRef-%d-%s", i+1, notInID.ReplaceAllString(p.Name, "-"))
		list = append(list, pkg{Name: p.Name, ID: id, Version: p.Version, Supplier: or(p.Supplier, unknown), Download: unknown, Declared: or(p.License, unknown),
			Refs: []ref{{"PACKAGE-MANAGER", "purl", p.URL}}})
		relations = append(relations, relation{"SPDXRef-product", "CONTAINS", id})
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", " ")
	err := e.Encode(struct {
		SPDX      string         `json:"spdxVersion"`
		License   string         `json:"dataLicense"`
		ID        string         `json:"SPDXID"`
		Name      string         `json:"name"`
		Namespace string         `json:"documentNamespace"`
		Creation  map[string]any `json:"creationInfo"`
		Packages  []pkg          `json:"packages"`
		Relations []relation     `json:"relationships"`
	}{"SPDX-2.3", "CC0-1.0", "SPDXRef-DOCUMENT", name + "-" + version, fmt.Sprintf("https://varve.invalid/spdx/%s-%s-%d", name, version, when.Unix()),
		map[string]any{"created": when.UTC().Format(time.RFC3339), "creators": []string{"Tool: varve-image"}}, list, relations})
	if err != nil {
		return fmt.Errorf("write SPDX: %w", err)
	}
	_, err = w.Write(b.Bytes())
	return err
}
