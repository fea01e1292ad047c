package vpool

import (
	"errors"
	"strings"
	"testing"

	"varve/control/state"
)

func TestBackendURLs(t *testing.T) {
	for text, want := range map[string]state.Backend{
		"local:///srv/fast":                                {Kind: state.BackendLocal, Dir: "/srv/fast"},
		"local:///srv//a/../b/":                            {Kind: state.BackendLocal, Dir: "/srv/b"},
		"s3://bucket?endpoint=https://s3.example.com:443/": {Kind: state.BackendS3, Bucket: "bucket", Endpoint: "https://s3.example.com"},
		"s3://my-bucket/vp/one/?endpoint=http://10.0.0.1:9000&region=eu-west-1": {Kind: state.BackendS3, Bucket: "my-bucket", Prefix: "vp/one",
			Endpoint: "http://10.0.0.1:9000", Region: "eu-west-1"},
		"s3://bucket/a?endpoint=HTTPS://[2001:db8::1]:443": {Kind: state.BackendS3, Bucket: "bucket", Prefix: "a", Endpoint: "https://[2001:db8::1]"},
	} {
		b, err := ParseBackend(text)
		if err != nil || b != want {
			t.Errorf("%s: %+v %v", text, b, err)
		}
		if again, err := ParseBackend(URL(b)); err != nil || again != want {
			t.Errorf("%s written as %s is read as %+v %v", text, URL(b), again, err)
		}
	}
	for _, text := range []string{"", "/srv", "local://srv", "local:///a?x=1", "s3://bucket", "s3:///p?endpoint=http://h", "s3://b?endpoint=http://h",
		"s3://Bucket/x?endpoint=http://h", "s3://bucket?endpoint=ftp://h", "s3://bucket?endpoint=http://h/path", "s3://bucket?endpoint=h:9000",
		"s3://bucket?endpoint=http://h&endpoint=http://i", "s3://bucket?endpoint=http://h&key=x", "s3://key:topsecret@bucket?endpoint=http://h",
		"s3://bucket/a/../../b?endpoint=http://h", "s3://bucket?endpoint=http://u:topsecret@h", "nfs://x"} {
		_, err := ParseBackend(text)
		if e, ok := errors.AsType[*state.Error](err); !ok || e.Err != state.ErrInvalid {
			t.Errorf("%q: %v", text, err)
		} else if strings.Contains(text, "//key:") && strings.Contains(err.Error()+e.Remedy, "topsecret") {
			t.Errorf("%q: the error tells the secret: %v", text, err)
		}
	}
}
