package api

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
)

// A page of a long list of vDisks costs its own length: names are read when one has changed, the engine is asked for the page alone.
func TestPageOfManyVDisks(t *testing.T) {
	w := newWorld(t)
	pool, err := w.log.Store.View().VPool("default")
	if err != nil {
		t.Fatal(err)
	}
	const many = 2000
	for i := range many {
		if _, err := w.log.Apply(t.Context(), &state.CreateInode{FSID: pool.FSID, Parent: state.RootIno, Name: fmt.Sprintf("d%04d.raw", i), Kind: state.File,
			How: state.Guarded, Mode: 0o644, Volume: uuid.New(), Size: 1 << 20}); err != nil {
			t.Fatal(err)
		}
	}
	type list struct {
		Items []struct{ Name, File string }
		Next  string
		Count *int
	}
	get := func(query string) (out list) {
		t.Helper()
		status, body, _ := w.do("GET", "/api/customer/v1/vdisks?"+query, "")
		if status != 200 {
			t.Fatalf("%s: %d %s", query, status, body)
		}
		if err := json.Unmarshal([]byte(body), &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	get("limit=1")
	asked := w.engine.Asked()
	first := get("limit=3&count=true")
	if len(first.Items) != 3 || first.Items[0].Name != "default/d0000" || first.Items[0].File != "/d0000.raw" || *first.Count != many || first.Next == "" {
		t.Errorf("first page: %+v", first)
	}
	if n := w.engine.Asked() - asked; n > 3 {
		t.Errorf("the engine was asked about %d vDisks for a page of 3", n)
	}
	if second := get("limit=3&cursor=" + first.Next); second.Items[0].Name != "default/d0003" {
		t.Errorf("second page: %+v", second)
	}
	if last := get("limit=2&sort=-name"); last.Items[0].Name != "default/d1999" || last.Items[1].Name != "default/d1998" {
		t.Errorf("from the end: %+v", last)
	}
	if found := get("filter=name~d123&count=true"); *found.Count != 10 || found.Items[0].Name != "default/d1230" {
		t.Errorf("found: %+v", found)
	}
	if sized := get("filter=size>1KiB&sort=-size,name&limit=2&count=true"); *sized.Count != many || sized.Items[1].Name != "default/d0001" {
		t.Errorf("by what the engine knows: %+v", sized)
	}
	if status, body, _ := w.do("POST", "/api/customer/v1/vdisks", `{"name":"default/a","size":"1MiB"}`); status != 201 {
		t.Fatal(status, body)
	}
	if now := get("limit=1"); now.Items[0].Name != "default/a" {
		t.Errorf("a new name is not seen: %+v", now)
	}
	begin := time.Now()
	for range 20 {
		get("limit=100&sort=-name")
	}
	t.Logf("a page of 100 of %d takes %s", many, time.Since(begin)/20)
}
