package api

import (
	"slices"
	"testing"
)

// A form shows what was wrong beside the field: every refusal of a body says which fields.
func TestProblemsNameTheirFields(t *testing.T) {
	w := newWorld(t)
	if status, body, _ := w.do("POST", "/api/customer/v1/vdisks", `{"name":"default/taken","size":"1MiB"}`); status != 201 {
		t.Fatal(status, body)
	}
	for _, c := range []struct {
		path, body string
		status     int
		code       string
		fields     []string
	}{
		{"/vdisks", `{"name":"default/a","size":"7"}`, 400, "invalid", []string{"/size"}},
		{"/vdisks", `{"name":"nothing","size":"1MiB"}`, 400, "invalid", []string{"/name"}},
		{"/vdisks", `{"name":"default/taken","size":"1MiB"}`, 409, "exists", []string{"/name"}},
		{"/vdisks", `{"name":7,"size":"soon","a/b~c":1}`, 400, "invalid", []string{"/a~1b~0c", "/name", "/size"}},
		{"/vpools", `{"name":"Not Good","backend":"local:///b"}`, 400, "invalid", []string{"/name"}},
		{"/vpools", `{"name":"b","backend":"ftp://b"}`, 400, "invalid", []string{"/backend"}},
		{"/vpools", `{"name":"b","backend":"local:///b","clients":["here"]}`, 400, "invalid", []string{"/clients"}},
		{"/vpools", `{"name":"b","backend":"local:///b","compression":"much"}`, 400, "invalid", []string{"/compression"}},
		{"/users", `{"name":"ann","password":"short","roles":["viewer"]}`, 400, "invalid", []string{"/password"}},
		{"/sinks", `{"name":"s","kind":"webhook","url":"gopher://x"}`, 400, "invalid", []string{"/url"}},
	} {
		p := w.problem("POST", "/api/customer/v1"+c.path, c.body, c.status, c.code)
		var fields []string
		for _, f := range p.Errors {
			if f.Message == "" {
				t.Errorf("%s %s: %s has no message", c.path, c.body, f.Pointer)
			}
			fields = append(fields, f.Pointer)
		}
		if !slices.Equal(fields, c.fields) {
			t.Errorf("%s %s: the fields %q are named, want %q (%s)", c.path, c.body, fields, c.fields, p.Detail)
		}
	}
}
