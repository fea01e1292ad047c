package vpool

import (
	"net/url"
	"path"
	"strconv"
	"strings"

	"varve/control/state"
)

// URL names a backend as an operator does: local:///dir, or s3://bucket/prefix?endpoint=…&region=….
func URL(b state.Backend) string {
	if b.Kind != state.BackendS3 {
		return (&url.URL{Scheme: b.Kind, Path: b.Dir}).String()
	}
	u := "s3://" + b.Bucket
	if b.Prefix != "" {
		u += "/" + (&url.URL{Path: b.Prefix}).EscapedPath()
	}
	u += "?endpoint=" + b.Endpoint
	if b.Region != "" {
		u += "&region=" + url.QueryEscape(b.Region)
	}
	return u
}

const s3Form = "s3://bucket/prefix?endpoint=https://host:port&region=name"

// ParseBackend reads what URL writes.
func ParseBackend(text string) (state.Backend, error) {
	shown := text
	if len(shown) > 80 {
		shown = shown[:80] + "…"
	}
	object := "backend " + strconv.Quote(shown)
	if strings.Contains(text, "@") {
		return state.Backend{}, &state.Error{Err: state.ErrInvalid, Object: "backend", Field: "backend", Detail: "credentials do not belong into the URL",
			Remedy: "set VARVE_S3_ACCESS_KEY and VARVE_S3_SECRET_KEY, or give --credentials-file"}
	}
	u, err := url.Parse(text)
	if err != nil || u.Fragment != "" || u.Opaque != "" {
		return state.Backend{}, &state.Error{Err: state.ErrInvalid, Object: object, Field: "backend", Detail: "not a backend", Remedy: "use local:///absolute/directory or " + s3Form}
	}
	switch u.Scheme {
	case state.BackendLocal:
		if u.Host != "" || u.RawQuery != "" || u.User != nil || !path.IsAbs(u.Path) {
			return state.Backend{}, &state.Error{Err: state.ErrInvalid, Object: object, Field: "backend", Detail: "not a directory", Remedy: "use local:///absolute/directory"}
		}
		return state.Backend{Kind: state.BackendLocal, Dir: path.Clean(u.Path)}, nil
	case state.BackendS3:
		return parseS3(u, object)
	}
	return state.Backend{}, &state.Error{Err: state.ErrInvalid, Object: object, Field: "backend", Detail: "not a backend", Remedy: "use local:///absolute/directory or " + s3Form}
}

func parseS3(u *url.URL, object string) (state.Backend, error) {
	refuse := func(detail, remedy string) (state.Backend, error) {
		return state.Backend{}, &state.Error{Err: state.ErrInvalid, Object: object, Field: "backend", Detail: detail, Remedy: remedy}
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return refuse("its query cannot be read", "use "+s3Form)
	}
	for k, v := range q {
		if k != "endpoint" && k != "region" || len(v) != 1 {
			return refuse("parameter "+strconv.Quote(k)+" is unknown or given twice", "use "+s3Form)
		}
	}
	if q.Get("endpoint") == "" {
		return refuse("no endpoint", "use "+s3Form)
	}
	b := state.Backend{Kind: state.BackendS3, Bucket: u.Host, Prefix: strings.Trim(u.Path, "/"), Region: q.Get("region"), Endpoint: cleanEndpoint(q.Get("endpoint"))}
	if err := b.Check(object); err != nil {
		return state.Backend{}, err
	}
	return b, nil
}

// cleanEndpoint gives an endpoint its one spelling. What is no endpoint is left as it is, for check to refuse.
func cleanEndpoint(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return s
	}
	u.Scheme, u.Host = strings.ToLower(u.Scheme), strings.ToLower(u.Host)
	if u.Scheme == "http" && u.Port() == "80" || u.Scheme == "https" && u.Port() == "443" {
		u.Host = strings.TrimSuffix(u.Host, ":"+u.Port())
	}
	if u.Path == "/" {
		u.Path = ""
	}
	return u.String()
}
