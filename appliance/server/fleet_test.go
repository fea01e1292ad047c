package server

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"varve/control/state"
)

func TestRenderedConfiguration(t *testing.T) {
	s := state.New()
	index := uint64(0)
	set := func(key, value string) {
		t.Helper()
		index++
		entry, err := state.Encode(&state.SetConfig{Key: key, Value: value}, uuid.New(), state.Time(time.Now().UnixNano()))
		if err == nil {
			_, err = s.Apply(index, entry)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	set("serve.log-level", "debug")
	set("serve.map-size.a", "1GiB")
	set("serve.map-size", "512MiB")
	set("serve.cache-ram", "none of it")
	set("serve.nbd", ":1")
	set("properties.memcached", "x:1")
	set("serve.nbd-tls.b", "required")
	for node, want := range map[string]map[string]string{
		"a": {"log-level": "debug", "map-size": "1GiB"},
		"b": {"log-level": "debug", "map-size": "512MiB", "nbd-tls": "required"},
	} {
		got, wrong := rendered(s.View(), node)
		if diff := cmp.Diff(want, got); diff != "" || len(wrong) != 2 {
			t.Error(node, diff, wrong)
		}
	}
	if !same("1GiB", "1024MiB") || !same("60s", "1m") || same("info", "debug") || same("1GiB", "1m") {
		t.Error("values are compared by their text")
	}
}

func TestConfigOfServeIsChecked(t *testing.T) {
	for key, value := range map[string]string{"serve.log-level": "debug", "serve.map-size.host3": "1GiB", "serve.drain-time": "45s", "anything.else": "loud"} {
		if err := checkConfig(key, value); err != nil {
			t.Errorf("%s=%s: %v", key, value, err)
		}
	}
	for key, value := range map[string]string{"serve.log-level": "loud", "serve.map-size.host3": "1", "serve.drain-time": "soon", "serve.nbd": ":1", "serve.": ""} {
		if e, ok := errors.AsType[*state.Error](checkConfig(key, value)); !ok || !errors.Is(e, state.ErrInvalid) || e.Field != "value" {
			t.Errorf("%s=%s: %v", key, value, e)
		}
	}
}
