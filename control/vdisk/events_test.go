package vdisk_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"varve/control/events"
	"varve/control/vdisk"
)

// What changes a vDisk beyond its name is told.
func TestEvents(t *testing.T) {
	w := newWorld(t)
	var got []string
	disks := vdisk.New(vdisk.Config{Raft: w.log, Store: w.log.Store, Engine: w.engine, Emit: func(typ, topic, key string, data any) {
		b, err := json.Marshal(data)
		if err != nil || !strings.Contains(string(b), "default/a") || key == "" {
			t.Errorf("%s of %q: %s, %v", typ, key, b, err)
		}
		got = append(got, topic+" "+typ)
	}})
	w.create("default/a")
	if _, err := disks.Resize(t.Context(), "default/a", 2<<30, false); err != nil {
		t.Fatal(err)
	}
	if _, err := disks.Snapshot(t.Context(), "default/a", vdisk.SnapshotSpec{Name: "s"}); err != nil {
		t.Fatal(err)
	}
	if err := disks.DeleteSnapshot(t.Context(), "default/a", "s", false); err != nil {
		t.Fatal(err)
	}
	want := []string{events.TopicVolume + " " + events.VolumeResize, events.TopicSnapshot + " " + events.SnapshotCreate,
		events.TopicSnapshot + " " + events.SnapshotDelete}
	if !slices.Equal(got, want) {
		t.Errorf("events %q", got)
	}
}
