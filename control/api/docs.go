package api

import (
	"bytes"
	"encoding/json"
	"fmt"
	"html/template"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/labstack/echo/v4"

	v1 "varve/control/api/customer"
	"varve/control/api/internal"
)

func writeJSON(w http.ResponseWriter, status int, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, err = w.Write(b)
	return err
}

func (s *Server) healthz(c echo.Context) error { return c.String(http.StatusOK, "ok\n") }

func (s *Server) readyz(c echo.Context) error {
	if err := s.notReady(); err != nil {
		return &v1.Problem{Status: http.StatusServiceUnavailable, Code: "unavailable", Title: "Not ready", Detail: err.Error()}
	}
	return c.String(http.StatusOK, "ready\n")
}

func (s *Server) notReady() error {
	if err := s.cfg.Store.Halted(); err != nil {
		return err
	}
	if s.cfg.Ready == nil {
		return nil
	}
	return s.cfg.Ready()
}

// discover says what is here, to anybody.
func (s *Server) discover(c echo.Context) error {
	type version struct {
		Version       string `json:"version"`
		Path          string `json:"path"`
		Specification string `json:"specification"`
		Stability     string `json:"stability"`
	}
	out := struct {
		Name     string    `json:"name"`
		Version  string    `json:"version"`
		Cluster  string    `json:"cluster,omitempty"`
		Node     string    `json:"node,omitempty"`
		Versions []version `json:"versions"`
		Sign     []string  `json:"authentication"`
		Docs     string    `json:"documentation"`
		Setup    bool      `json:"setup_needed"`
	}{Name: "Varve", Version: s.cfg.Version, Docs: "/api/docs", Setup: s.auth.NeedsSetUp(),
		Sign: []string{"bearer", "oauth2 client_credentials", "session"},
		Versions: []version{
			{"v1", v1.Prefix, v1.Prefix + "/openapi.json", "stable"},
			{"internal", internal.Prefix, internal.Prefix + "/openapi.json", "none"},
		}}
	if cl, ok := s.cfg.Store.View().Cluster(); ok {
		out.Cluster = cl.ID.String()
	}
	if n, err := s.cfg.Nodes.Self(); err == nil {
		out.Node = n.ID.String()
	}
	return writeJSON(c.Response(), http.StatusOK, out)
}

func (s *Server) serveSpec(contentType string, body []byte) echo.HandlerFunc {
	return func(c echo.Context) error { return c.Blob(http.StatusOK, contentType, body) }
}

// docs is one page about every operation, made from the specification. It needs no script and nothing from elsewhere.
func (s *Server) docs(c echo.Context) error {
	var b bytes.Buffer
	if err := docsPage.Execute(&b, docsOf(s.customer)); err != nil {
		return fmt.Errorf("make the documentation page: %w", err)
	}
	c.Response().Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'")
	return c.HTMLBlob(http.StatusOK, b.Bytes())
}

type docsOperation struct {
	operation
	Description string
	Parameters  []docsParameter
	Body        string // name of its schema
	Answers     []docsAnswer
}

type docsParameter struct{ Name, In, Type, Description string }

type docsAnswer struct{ Status, Description, Schema string }

type docsField struct {
	Name, Type, Description string
	Required                bool
}

type docsSchema struct {
	Name, Description string
	Fields            []docsField
}

type docsGroup struct {
	Tag        string
	Operations []docsOperation
}

type docsData struct {
	Title, Description string
	Groups             []docsGroup
	Schemas            []docsSchema
}

// tree is a node of a specification.
type tree map[string]any

func (t tree) sub(name string) tree { m, _ := t[name].(map[string]any); return m }

func (t tree) text(name string) string { s, _ := t[name].(string); return s }

func (t tree) list(name string) []tree {
	var out []tree
	items, _ := t[name].([]any)
	for _, i := range items {
		if m, ok := i.(map[string]any); ok {
			out = append(out, m)
		}
	}
	return out
}

// resolved follows a reference inside the document.
func (t tree) resolved(root tree) tree {
	ref, ok := strings.CutPrefix(t.text("$ref"), "#/")
	if !ok {
		return t
	}
	at := root
	for part := range strings.SplitSeq(ref, "/") {
		at = at.sub(part)
	}
	return at
}

func schemaName(s tree) string {
	if ref := s.text("$ref"); ref != "" {
		return ref[strings.LastIndexByte(ref, '/')+1:]
	}
	switch kind := s["type"].(type) {
	case string:
		if kind == "array" {
			return "list of " + schemaName(s.sub("items"))
		}
		if format := s.text("format"); format != "" {
			return kind + " (" + format + ")"
		}
		return kind
	case []any:
		var names []string
		for _, k := range kind {
			names = append(names, fmt.Sprint(k))
		}
		return strings.Join(names, " or ")
	}
	return "object"
}

func contentSchema(t tree) string {
	for _, media := range slices.Sorted(maps.Keys(t.sub("content"))) {
		return schemaName(t.sub("content").sub(media).sub("schema"))
	}
	return ""
}

func docsOf(d *document) docsData {
	root := tree(d.tree)
	out := docsData{Title: root.sub("info").text("title"), Description: root.sub("info").text("description")}
	byTag := make(map[string]int)
	for _, t := range root.list("tags") {
		byTag[t.text("name")] = len(out.Groups)
		out.Groups = append(out.Groups, docsGroup{Tag: t.text("name") + ": " + t.text("description")})
	}
	for _, o := range d.operations {
		item := root.sub("paths").sub(strings.TrimPrefix(o.Path, v1.Prefix))
		y := item.sub(strings.ToLower(o.Method))
		op := docsOperation{operation: o, Description: y.text("description"), Body: contentSchema(y.sub("requestBody"))}
		for _, p := range append(item.list("parameters"), y.list("parameters")...) {
			p = p.resolved(root)
			op.Parameters = append(op.Parameters, docsParameter{p.text("name"), p.text("in"), schemaName(p.sub("schema")), p.text("description")})
		}
		for _, status := range slices.Sorted(maps.Keys(y.sub("responses"))) {
			r := y.sub("responses").sub(status).resolved(root)
			op.Answers = append(op.Answers, docsAnswer{status, r.text("description"), contentSchema(r)})
		}
		if i, ok := byTag[o.Tag]; ok {
			out.Groups[i].Operations = append(out.Groups[i].Operations, op)
		}
	}
	schemas := root.sub("components").sub("schemas")
	for _, name := range slices.Sorted(maps.Keys(schemas)) {
		y := schemas.sub(name)
		required, _ := y["required"].([]any)
		s := docsSchema{Name: name, Description: y.text("description")}
		for _, f := range slices.Sorted(maps.Keys(y.sub("properties"))) {
			p := y.sub("properties").sub(f)
			s.Fields = append(s.Fields, docsField{f, schemaName(p), p.text("description"), slices.Contains(required, any(f))})
		}
		out.Schemas = append(out.Schemas, s)
	}
	return out
}

var docsPage = template.Must(template.New("docs").Parse(`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{.Title}}</title><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#151515;background:#fff}
code,pre{font:14px/1.4 ui-monospace,monospace;background:#f2f2f2;padding:.1em .3em;border-radius:3px}
section{border-top:1px solid #d2d2d2;padding:.5rem 0}h3{margin:.5rem 0}table{border-collapse:collapse;margin:.5rem 0}
td,th{border:1px solid #d2d2d2;padding:.2rem .5rem;text-align:left;vertical-align:top}.m{font-weight:700}a{color:#004d99}
@media(prefers-color-scheme:dark){body{background:#151515;color:#f2f2f2}code,pre{background:#333}a{color:#92c5f9}}
</style></head><body>
<a href="#operations">Skip to the operations</a><h1>{{.Title}}</h1><p style="white-space:pre-line">{{.Description}}</p>
<p>The specification: <a href="/api/customer/v1/openapi.json">openapi.json</a>, <a href="/api/customer/v1/openapi.yaml">openapi.yaml</a></p>
<h2 id="deprecation">Deprecation</h2><p>v1 only grows. What is to go is marked by the headers Deprecation and Sunset for at least 12 months, and goes
with v2 alone; v1 is served for at least 24 months beside v2.</p>
<h2 id="operations">Operations</h2>
{{range .Groups}}<h2>{{.Tag}}</h2><ul>{{range .Operations}}<li><a href="#{{.ID}}"><code>{{.Method}} {{.Path}}</code></a> {{.Summary}}</li>{{end}}</ul>
{{range .Operations}}<section id="{{.ID}}"><h3><code class="m">{{.Method}} {{.Path}}</code></h3><p>{{.Summary}}. {{.Description}}</p>
<p>Roles: {{range $i,$r := .Roles}}{{if $i}}, {{end}}{{$r}}{{end}}. Command line: <code>{{.CLI}}</code></p>
{{if .Parameters}}<table><tr><th>Parameter</th><th>In</th><th>Type</th><th>Meaning</th></tr>{{range .Parameters}}<tr><td><code>{{.Name}}</code></td>
<td>{{.In}}</td><td>{{.Type}}</td><td>{{.Description}}</td></tr>{{end}}</table>{{end}}
{{if .Body}}<p>Body: <a href="#schema-{{.Body}}">{{.Body}}</a></p>{{end}}
<table><tr><th>Status</th><th>Answer</th><th>Meaning</th></tr>{{range .Answers}}<tr><td>{{.Status}}</td><td>{{if .Schema}}<a
href="#schema-{{.Schema}}">{{.Schema}}</a>{{end}}</td><td>{{.Description}}</td></tr>{{end}}</table></section>{{end}}{{end}}
<h2>Objects</h2>{{range .Schemas}}<section id="schema-{{.Name}}"><h3>{{.Name}}</h3><p>{{.Description}}</p>
{{if .Fields}}<table><tr><th>Field</th><th>Type</th><th>Meaning</th></tr>{{range .Fields}}<tr><td><code>{{.Name}}</code>{{if .Required}} *{{end}}</td>
<td>{{.Type}}</td><td>{{.Description}}</td></tr>{{end}}</table>{{end}}</section>{{end}}
</body></html>
`))
