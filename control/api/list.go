package api

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"varve/control/bytesize"
)

// Lists: limit, cursor, sort, filter and count of any list of JSON objects, by the objects' own field names.
//
//	sort    "-size,name": fields, - for descending; ties, and lists without a sort, go by the order that the handler gives
//	filter  expr = and { "or" and };  and = not { "and" not };  not = [ "not" ] ( "(" expr ")" | field op value )
//	        op = "=" "!=" "<" "<=" ">" ">=" "~" (contains, without regard to case);  value = word or "quoted"
//	cursor  where the last page ended: the sort fields' values of its last item, and its id; items that come or go meanwhile make no
//	        other item appear twice or be left out

const (
	limitDefault   = 100
	limitMax       = 1000
	filterBytesMax = 1024
	filterDepthMax = 16
	sortFieldsMax  = 4
	cursorBytesMax = 4096
)

// page is a part of a list.
type page[T any] struct {
	items []T
	next  string
	count *int
}

// listPage cuts the page that a request asks for out of all items, whose order is stable and whose key is unique.
func listPage[T any](ctx context.Context, all []T, key func(T) string) (page[T], error) {
	return listPageBy(ctx, all, "", key)
}

// knows says whether the filter and the sort of a request name fields of T alone.
func knows[T any](ctx context.Context) bool {
	q, fields := callOf(ctx).query, fieldsOf(reflect.TypeFor[T]())
	_, err := parseSort(q.Get("sort"), fields)
	if text := q.Get("filter"); err == nil && text != "" {
		_, err = parseFilter(text, fields)
	}
	return err == nil
}

// listPageBy is listPage of items that are in the order of a field already.
func listPageBy[T any](ctx context.Context, all []T, ordered string, key func(T) string) (page[T], error) {
	c := callOf(ctx)
	q := c.query
	limit := limitDefault
	if text := q.Get("limit"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > limitMax {
			return page[T]{}, badQuery("limit", fmt.Sprintf("is not a number from 1 to %d", limitMax))
		}
		limit = n
	}
	fields := fieldsOf(reflect.TypeFor[T]())
	if text := q.Get("filter"); text != "" {
		keep, err := parseFilter(text, fields)
		if err != nil {
			return page[T]{}, badQuery("filter", err.Error())
		}
		all = slices.DeleteFunc(slices.Clone(all), func(t T) bool { return !keep(reflect.ValueOf(t)) })
	}
	out := page[T]{}
	if q.Get("count") == "true" {
		n := len(all)
		out.count = &n
	}
	order, err := parseSort(q.Get("sort"), fields)
	if err != nil {
		return page[T]{}, badQuery("sort", err.Error())
	}
	switch by := q.Get("sort"); {
	case by == "" || by == ordered:
	case by == "-"+ordered:
		all = slices.Clone(all)
		slices.Reverse(all)
	default:
		all = sorted(all, order)
	}
	start := 0
	if text := q.Get("cursor"); text != "" {
		at, err := parseCursor(text, q.Get("sort"), len(order))
		if err != nil {
			return page[T]{}, err
		}
		start = place(all, at, order, key)
	}
	end := min(start+limit, len(all))
	out.items = all[start:end]
	if out.items == nil {
		out.items = []T{}
	}
	if end < len(all) {
		last := all[end-1]
		out.next = makeCursor(q.Get("sort"), order.values(reflect.ValueOf(last)), key(last), end-1)
		next := cloneQuery(q)
		next.Set("cursor", out.next)
		c.header.Add("Link", "<?"+next.Encode()+`>; rel="next"`)
	}
	return out, nil
}

// sorted puts items in an order. Items are large, so their places are sorted, and what is compared is read once of each.
func sorted[T any](all []T, order sorting) []T {
	type place struct {
		at     int
		item   reflect.Value
		values []string
	}
	places := make([]place, len(all))
	for i := range all {
		v := reflect.ValueOf(&all[i]).Elem()
		places[i] = place{i, v, order.values(v)}
	}
	slices.SortStableFunc(places, func(a, b place) int { return order.compareTo(a.item, b.values) })
	out := make([]T, len(all))
	for i, p := range places {
		out[i] = all[p.at]
	}
	return out
}

func cloneQuery(q url.Values) url.Values {
	out := make(url.Values, len(q))
	for k, v := range q {
		out[k] = slices.Clone(v)
	}
	return out
}

func badQuery(parameter, why string) error {
	return refuse(http.StatusBadRequest, "invalid", "the parameter "+parameter+" "+why, "see /api/docs")
}

// place finds where the items after a cursor begin. The item of the cursor is looked for first where it was; where it is gone, the first
// one that sorts after it is taken, or without a sort the one that stands there now.
func place[T any](all []T, at cursor, order sorting, key func(T) string) int {
	if at.At < len(all) && key(all[at.At]) == at.Key {
		return at.At + 1
	}
	for i, t := range all {
		if key(t) == at.Key {
			return i + 1
		}
	}
	if len(order) == 0 {
		return min(at.At, len(all))
	}
	for i, t := range all {
		if order.compareTo(reflect.ValueOf(t), at.Values) > 0 {
			return i
		}
	}
	return len(all)
}

type cursor struct {
	Sort   string   `json:"s,omitempty"`
	Values []string `json:"v,omitempty"`
	Key    string   `json:"k"`
	At     int      `json:"a"`
}

func makeCursor(sort string, values []string, key string, at int) string {
	b, err := json.Marshal(cursor{Sort: sort, Values: values, Key: key, At: at})
	if err != nil {
		return ""
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

func parseCursor(text, sort string, values int) (cursor, error) {
	var c cursor
	bad := badQuery("cursor", "is none of this list's, or the sort has changed")
	if len(text) > cursorBytesMax {
		return c, bad
	}
	b, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil || json.Unmarshal(b, &c) != nil || c.Sort != sort || len(c.Values) != values || c.At < 0 {
		return c, bad
	}
	return c, nil
}

// field is one that may be sorted and filtered by.
type field struct {
	name  string
	index int
	kind  fieldKind
}

type fieldKind int

const (
	textField fieldKind = iota
	numberField
	boolField
	timeField
	listField // of texts
)

// fieldsOf are the fields of a struct that are texts, numbers, booleans, times or lists of texts.
func fieldsOf(t reflect.Type) map[string]field {
	out := make(map[string]field)
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "" || name == "-" {
			continue
		}
		ft := f.Type
		if ft.Kind() == reflect.Pointer {
			ft = ft.Elem()
		}
		kind := textField
		switch {
		case ft == reflect.TypeFor[time.Time]():
			kind = timeField
		case ft.Kind() == reflect.Bool:
			kind = boolField
		case ft.Kind() >= reflect.Int && ft.Kind() <= reflect.Float64:
			kind = numberField
		case ft.Kind() == reflect.String || ft.Implements(reflect.TypeFor[fmt.Stringer]()):
		case ft.Kind() == reflect.Slice && ft.Elem().Kind() == reflect.String:
			kind = listField
		default:
			continue
		}
		out[name] = field{name: name, index: i, kind: kind}
	}
	return out
}

func (f field) of(v reflect.Value) reflect.Value {
	x := v.Field(f.index)
	if x.Kind() == reflect.Pointer {
		if x.IsNil() {
			return reflect.Zero(x.Type().Elem())
		}
		x = x.Elem()
	}
	return x
}

func (f field) text(v reflect.Value) string {
	x := f.of(v)
	if f.kind == timeField {
		t, ok := reflect.TypeAssert[time.Time](x)
		if !ok {
			return ""
		}
		return strconv.FormatInt(t.UnixNano(), 10)
	}
	if s, ok := reflect.TypeAssert[fmt.Stringer](x); ok && f.kind == textField {
		return s.String()
	}
	if f.kind == textField {
		return x.String()
	}
	return fmt.Sprint(x.Interface())
}

func (f field) number(v reflect.Value) float64 {
	x := f.of(v)
	switch {
	case f.kind == timeField:
		n, err := strconv.ParseInt(f.text(v), 10, 64)
		if err != nil {
			return 0
		}
		return float64(n)
	case f.kind == boolField && x.Bool():
		return 1
	case f.kind == boolField:
		return 0
	case x.CanInt():
		return float64(x.Int())
	case x.CanUint():
		return float64(x.Uint())
	}
	return x.Float()
}

// compare orders two values of the field, of which b is as text() gives it.
func (f field) compare(a reflect.Value, b string) int {
	if f.kind == textField || f.kind == listField {
		return strings.Compare(f.text(a), b)
	}
	if f.kind == boolField {
		return cmp.Compare(f.text(a), b) // "false" < "true"
	}
	n, err := strconv.ParseFloat(b, 64)
	if err != nil {
		return 1
	}
	return cmp.Compare(f.number(a), n)
}

type sortBy struct {
	field
	descending bool
}

type sorting []sortBy

func parseSort(text string, fields map[string]field) (sorting, error) {
	if text == "" {
		return nil, nil
	}
	var out sorting
	for name := range strings.SplitSeq(text, ",") {
		name, descending := strings.CutPrefix(strings.TrimSpace(name), "-")
		f, ok := fields[name]
		if !ok {
			return nil, unknownField(name, fields)
		}
		if out = append(out, sortBy{f, descending}); len(out) > sortFieldsMax {
			return nil, fmt.Errorf("names more than %d fields", sortFieldsMax)
		}
	}
	return out, nil
}

func unknownField(name string, fields map[string]field) error {
	names := make([]string, 0, len(fields))
	for n := range fields {
		names = append(names, n)
	}
	slices.Sort(names)
	return fmt.Errorf("names %q, which is none of: %s", clip(name), strings.Join(names, ", "))
}

func (s sorting) values(v reflect.Value) []string {
	var out []string
	for _, by := range s {
		out = append(out, by.text(v))
	}
	return out
}

func (s sorting) compareTo(a reflect.Value, b []string) int {
	for i, by := range s {
		if n := by.compare(a, b[i]); n != 0 {
			if by.descending {
				return -n
			}
			return n
		}
	}
	return 0
}

// parseFilter makes a test of an item.
func parseFilter(text string, fields map[string]field) (func(reflect.Value) bool, error) {
	if len(text) > filterBytesMax {
		return nil, fmt.Errorf("has more than %d bytes", filterBytesMax)
	}
	tokens, err := filterTokens(text)
	if err != nil {
		return nil, err
	}
	p := &filterParser{tokens: tokens, fields: fields}
	keep, err := p.or(0)
	if err != nil {
		return nil, err
	}
	if len(p.tokens) > 0 {
		return nil, fmt.Errorf("goes on with %q after its end", p.tokens[0].text)
	}
	return keep, nil
}

type filterToken struct {
	text   string
	quoted bool
}

const filterSigns = "()=!<>~"

func filterTokens(text string) ([]filterToken, error) {
	var out []filterToken
	for {
		text = strings.TrimLeft(text, " \t")
		if text == "" {
			return out, nil
		}
		switch c := text[0]; {
		case c == '"':
			s, err := strconv.QuotedPrefix(text)
			if err != nil {
				return nil, fmt.Errorf("has a quote that does not end")
			}
			plain, err := strconv.Unquote(s)
			if err != nil {
				return nil, fmt.Errorf("has a quote that is none: %s", s)
			}
			out, text = append(out, filterToken{plain, true}), text[len(s):]
		case strings.IndexByte(filterSigns, c) >= 0:
			n := 1
			if len(text) > 1 && text[1] == '=' && strings.IndexByte("!<>", c) >= 0 {
				n = 2
			}
			out, text = append(out, filterToken{text: text[:n]}), text[n:]
		default:
			n := strings.IndexAny(text, " \t\""+filterSigns)
			if n < 0 {
				n = len(text)
			}
			out, text = append(out, filterToken{text: text[:n]}), text[n:]
		}
	}
}

type filterParser struct {
	tokens []filterToken
	fields map[string]field
}

func (p *filterParser) take(word string) bool {
	if len(p.tokens) > 0 && !p.tokens[0].quoted && strings.EqualFold(p.tokens[0].text, word) {
		p.tokens = p.tokens[1:]
		return true
	}
	return false
}

func (p *filterParser) or(depth int) (func(reflect.Value) bool, error) {
	left, err := p.and(depth)
	for err == nil && p.take("or") {
		var right func(reflect.Value) bool
		if right, err = p.and(depth); err == nil {
			l := left
			left = func(v reflect.Value) bool { return l(v) || right(v) }
		}
	}
	return left, err
}

func (p *filterParser) and(depth int) (func(reflect.Value) bool, error) {
	left, err := p.not(depth)
	for err == nil && p.take("and") {
		var right func(reflect.Value) bool
		if right, err = p.not(depth); err == nil {
			l := left
			left = func(v reflect.Value) bool { return l(v) && right(v) }
		}
	}
	return left, err
}

func (p *filterParser) not(depth int) (func(reflect.Value) bool, error) {
	if depth > filterDepthMax {
		return nil, fmt.Errorf("is nested deeper than %d", filterDepthMax)
	}
	if p.take("not") {
		f, err := p.not(depth + 1)
		return func(v reflect.Value) bool { return !f(v) }, err
	}
	if p.take("(") {
		f, err := p.or(depth + 1)
		if err == nil && !p.take(")") {
			err = fmt.Errorf("lacks a )")
		}
		return f, err
	}
	return p.comparison()
}

func (p *filterParser) comparison() (func(reflect.Value) bool, error) {
	if len(p.tokens) < 3 {
		return nil, fmt.Errorf("ends early: write field, sign, value, such as size>10GiB")
	}
	name, sign, value := p.tokens[0], p.tokens[1].text, p.tokens[2]
	p.tokens = p.tokens[3:]
	f, ok := p.fields[name.text]
	if !ok || name.quoted {
		return nil, unknownField(name.text, p.fields)
	}
	if f.kind == listField {
		has := func(v reflect.Value) bool {
			list, ok := reflect.TypeAssert[[]string](f.of(v))
			return ok && slices.Contains(list, value.text)
		}
		switch sign {
		case "=", "~":
			return has, nil
		case "!=":
			return func(v reflect.Value) bool { return !has(v) }, nil
		}
		return nil, fmt.Errorf("compares the list %s by %s; use = or !=", name.text, clip(sign))
	}
	if sign == "~" {
		part := strings.ToLower(value.text)
		return func(v reflect.Value) bool { return strings.Contains(strings.ToLower(f.text(v)), part) }, nil
	}
	bound, err := f.parse(value.text)
	if err != nil {
		return nil, err
	}
	c := func(v reflect.Value) int { return f.compare(v, bound) }
	switch sign {
	case "=":
		return func(v reflect.Value) bool { return c(v) == 0 }, nil
	case "!=":
		return func(v reflect.Value) bool { return c(v) != 0 }, nil
	case "<":
		return func(v reflect.Value) bool { return c(v) < 0 }, nil
	case "<=":
		return func(v reflect.Value) bool { return c(v) <= 0 }, nil
	case ">":
		return func(v reflect.Value) bool { return c(v) > 0 }, nil
	case ">=":
		return func(v reflect.Value) bool { return c(v) >= 0 }, nil
	}
	return nil, fmt.Errorf("has %q where a sign belongs: = != < <= > >= ~", clip(sign))
}

// parse reads a value of the field and gives it as text() does.
func (f field) parse(s string) (string, error) {
	switch f.kind {
	case numberField:
		if _, err := strconv.ParseFloat(s, 64); err == nil {
			return s, nil
		}
		n, err := bytesize.Parse(s)
		if err != nil {
			return "", fmt.Errorf("compares %s with %q, which is no number", f.name, clip(s))
		}
		return strconv.FormatInt(n, 10), nil
	case boolField:
		b, err := strconv.ParseBool(s)
		if err != nil {
			return "", fmt.Errorf("compares %s with %q, which is neither true nor false", f.name, clip(s))
		}
		return strconv.FormatBool(b), nil
	case timeField:
		for _, layout := range []string{time.RFC3339, "2006-01-02T15:04", time.DateOnly} {
			if t, err := time.Parse(layout, s); err == nil {
				return strconv.FormatInt(t.UnixNano(), 10), nil
			}
		}
		return "", fmt.Errorf("compares %s with %q, which is no time; write 2026-01-31T15:04:05Z", f.name, clip(s))
	}
	return s, nil
}
