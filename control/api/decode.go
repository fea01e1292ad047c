package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"reflect"
	"slices"
	"strings"

	"github.com/labstack/echo/v4"

	v1 "varve/control/api/customer"
)

// strictBinder reads the bodies that the generated code asks for. Queries, paths and forms are read by the generated code itself.
type strictBinder struct{}

// Bind implements echo.Binder.
func (strictBinder) Bind(into any, c echo.Context) error { return decode(c.Request(), into) }

// decode reads a request's JSON strictly: the right content type, one value of bounded size and depth, no unknown field.
func decode(r *http.Request, into any) error {
	if ct := r.Header.Get("Content-Type"); ct != "" {
		if media, _, err := mime.ParseMediaType(ct); err != nil || media != "application/json" {
			return refuse(http.StatusUnsupportedMediaType, "invalid", "the body must be application/json", "")
		}
	}
	body, err := io.ReadAll(r.Body)
	if _, over := errors.AsType[*http.MaxBytesError](err); over {
		return refuse(http.StatusRequestEntityTooLarge, "too_large", fmt.Sprintf("the body has more than %d bytes", bodyBytesMax), "")
	}
	if err != nil {
		return refuse(http.StatusBadRequest, "invalid", "the body broke off", "")
	}
	if depth(body) > jsonDepthMax {
		return refuse(http.StatusBadRequest, "invalid", fmt.Sprintf("the JSON is nested deeper than %d", jsonDepthMax), "")
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		p := refuse(http.StatusBadRequest, "invalid", "the JSON does not fit: "+err.Error(), "see the documentation of this call")
		p.Errors = misfits(body, into)
		return p
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return refuse(http.StatusBadRequest, "invalid", "the body holds more than one JSON value", "")
	}
	return nil
}

// misfits says which fields of a body do not fit.
func misfits(body []byte, into any) (out []v1.FieldError) {
	t := reflect.TypeOf(into)
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	var given map[string]json.RawMessage
	if t.Kind() != reflect.Struct || json.Unmarshal(body, &given) != nil {
		return nil
	}
	known := make(map[string]reflect.Type)
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		known[name] = t.Field(i).Type
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		message := "there is no such field"
		if of, ok := known[name]; ok {
			d := json.NewDecoder(bytes.NewReader(given[name]))
			d.DisallowUnknownFields()
			err := d.Decode(reflect.New(of).Interface())
			if err == nil {
				continue
			}
			message = strings.TrimPrefix(err.Error(), "json: ")
		}
		if len(out) < fieldErrorsMax {
			out = append(out, v1.FieldError{Pointer: "/" + pointerEscape.Replace(clip(name)), Message: message})
		}
	}
	return out
}

const fieldErrorsMax = 32

var pointerEscape = strings.NewReplacer("~", "~0", "/", "~1")

// depth is the deepest nesting of objects and arrays, found without building them.
func depth(b []byte) int {
	deepest, now := 0, 0
	inString, escaped := false, false
	for _, c := range b {
		switch {
		case escaped:
			escaped = false
		case inString && c == '\\':
			escaped = true
		case c == '"':
			inString = !inString
		case inString:
		case c == '{' || c == '[':
			now++
			deepest = max(deepest, now)
		case c == '}' || c == ']':
			now--
		}
	}
	return deepest
}
