// Package layout keeps the directions of imports: they point the way the bytes go, from gateway to volumedriver, with
// control beside them, and only appliance sees all. It also asks for a package comment everywhere and keeps the volume
// driver from touching files, time and the network behind the seams that make it testable.
package layout

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"strings"
	"testing"
)

const root = "../.."

// source is one parsed file; pkg is its directory relative to the repository.
type source struct {
	pkg, file string
	test      bool
	ast       *ast.File
}

func sources(t *testing.T) (*token.FileSet, []source) {
	t.Helper()
	fset := token.NewFileSet()
	var all []source
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && p != root || d.Name() == "testdata" || d.Name() == "node_modules") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		f, err := parser.ParseFile(fset, p, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		all = append(all, source{pkg: path.Dir(rel), file: rel, test: strings.HasSuffix(p, "_test.go"), ast: f})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 10 {
		t.Fatalf("only %d files found below %s", len(all), root)
	}
	return fset, all
}

// below reports whether package p is dir or lies in it.
func below(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

// forbidden gives the rule that an import breaks, or "".
func forbidden(pkg, imported string, test bool) string {
	target, ours := strings.CutPrefix(imported, "varve/")
	if !ours {
		if below(pkg, "control/state") && !test {
			switch imported {
			case "os", "net", "net/http", "log", "log/slog", "math/rand", "math/rand/v2", "crypto/rand":
				return "control/state is pure: no " + imported
			}
		}
		return ""
	}
	rules := []struct{ from, to, why string }{
		{"volumedriver", "gateway", "the volume driver knows no gateway"},
		{"volumedriver", "control", "the volume driver knows no control layer"},
		{"gateway", "control", "gateways know no control layer"},
		{"gateway/nbd", "gateway/nfs", "gateways do not know each other"},
		{"gateway/nfs", "gateway/nbd", "gateways do not know each other"},
		{"control", "gateway", "control knows no gateway"},
		{"control", "volumedriver", "control knows no volume driver"},
		{"volumedriver", "appliance", "only main imports the appliance"},
		{"gateway", "appliance", "only main imports the appliance"},
		{"control", "appliance", "only main imports the appliance"},
		{"control/state", "control/raft", "the state machine knows no raft"},
		{"control/state", "control/api", "the state machine knows no API"},
	}
	for _, r := range rules {
		if below(pkg, r.from) && below(target, r.to) {
			return r.why
		}
	}
	if below(target, "test") && !below(pkg, "test") && !test {
		return "the product does not import its tests"
	}
	return ""
}

func TestImportsPointTheWayTheBytesGo(t *testing.T) {
	fset, all := sources(t)
	for _, s := range all {
		for _, i := range s.ast.Imports {
			name := strings.Trim(i.Path.Value, `"`)
			if why := forbidden(s.pkg, name, s.test); why != "" {
				t.Errorf("%s imports %s: %s", fset.Position(i.Pos()), name, why)
			}
			if name == "C" || name == "unsafe" && below(s.pkg, "control") {
				t.Errorf("%s imports %q", fset.Position(i.Pos()), name)
			}
		}
	}
}

// The rules themselves are tried on imports that must be refused, so that a typing error here cannot pass everything.
func TestForbiddenImportsAreRefused(t *testing.T) {
	for _, c := range []struct {
		pkg, imported string
		refused       bool
	}{
		{"gateway/nbd", "varve/volumedriver", false},
		{"gateway/nbd", "varve/control/state", true},
		{"gateway/nfs/rpc", "varve/gateway/nbd", true},
		{"volumedriver/sco", "varve/gateway/nbd", true},
		{"control/api", "varve/volumedriver/vfs", true},
		{"control/api", "varve/control/state", false},
		{"control/state", "os", true},
		{"appliance/exports", "varve/control/state", false},
		{"appliance/exports", "varve/test/harness", true},
	} {
		if got := forbidden(c.pkg, c.imported, false) != ""; got != c.refused {
			t.Errorf("%s importing %s: refused %v, want %v", c.pkg, c.imported, got, c.refused)
		}
	}
}

func TestEveryPackageHasAComment(t *testing.T) {
	_, all := sources(t)
	documented, name := map[string]bool{}, map[string]string{}
	for _, s := range all {
		if s.test && documented[s.pkg] {
			continue
		}
		if _, seen := name[s.pkg]; !seen || !s.test {
			name[s.pkg] = s.ast.Name.Name
		}
		doc := s.ast.Doc.Text()
		if strings.HasPrefix(doc, "Package ") || strings.HasPrefix(doc, "Command ") || s.ast.Name.Name == "main" && doc != "" {
			documented[s.pkg] = true
		}
	}
	for pkg, n := range name {
		if !documented[pkg] {
			t.Errorf("package %s (%s) has no package comment", n, pkg)
		}
	}
}

// seams names what the volume driver reaches only through an interface, and the packages that implement that interface.
var seams = []struct {
	pkg, selector string
	except        []string
}{
	{"os", "Open OpenFile Create Remove RemoveAll Rename Mkdir MkdirAll Link Symlink ReadFile WriteFile ReadDir Stat Lstat Truncate",
		[]string{"volumedriver/vfs", "volumedriver/backend/s3/s3test"}}, // s3test runs a server for tests
	{"net", "Dial DialTimeout Listen", []string{"volumedriver/backend"}},
	{"rand", "Int IntN Intn Int63 Int64 Uint32 Uint64 Float64 Perm Shuffle Read", []string{"volumedriver/vfs", "volumedriver/backend"}},
}

func TestVolumeDriverGoesThroughItsSeams(t *testing.T) {
	fset, all := sources(t)
	for _, s := range all {
		if s.test || !below(s.pkg, "volumedriver") {
			continue
		}
		ast.Inspect(s.ast, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			x, ok := sel.X.(*ast.Ident)
			if !ok {
				return true
			}
			for _, seam := range seams {
				if x.Name != seam.pkg || !contains(seam.selector, sel.Sel.Name) || exempt(s.pkg, seam.except) || !imports(s.ast, seam.pkg) {
					continue
				}
				t.Errorf("%s: %s.%s goes round the seam", fset.Position(n.Pos()), x.Name, sel.Sel.Name)
			}
			return true
		})
	}
}

func contains(list, word string) bool {
	for _, w := range strings.Fields(list) {
		if w == word {
			return true
		}
	}
	return false
}

func exempt(pkg string, dirs []string) bool {
	for _, d := range dirs {
		if below(pkg, d) {
			return true
		}
	}
	return false
}

// imports reports whether a file imports a package that it calls by this name: `rand` may also be a variable.
func imports(f *ast.File, name string) bool {
	for _, i := range f.Imports {
		p := strings.TrimSuffix(strings.Trim(i.Path.Value, `"`), "/v2")
		if p == "crypto/rand" { // identities and secrets are not part of what a seed repeats
			continue
		}
		if i.Name == nil && path.Base(p) == name || i.Name != nil && i.Name.Name == name {
			return true
		}
	}
	return false
}
