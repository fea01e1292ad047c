package exports

import (
	"context"
	"reflect"
	"testing"

	"github.com/google/uuid"

	"varve/control/peer"
	"varve/control/state"
	"varve/control/vdisk"
)

// The control unit has no engine: whatever is asked of one there goes to the gateway, and is an error while that is away.
func TestDistantEngineHasNoneOfItsOwn(t *testing.T) {
	self := uuid.New()
	r := NewDistant(state.New(), self, peer.New(peer.Config{Self: self, DialSelf: true}), silence)
	engine, methods := reflect.ValueOf(vdisk.Engine(r)), reflect.TypeFor[vdisk.Engine]()
	for i := range methods.NumMethod() {
		m := methods.Method(i)
		var in []reflect.Value
		for k := range m.Type.NumIn() {
			arg := reflect.New(m.Type.In(k)).Elem()
			if m.Type.In(k) == reflect.TypeFor[context.Context]() {
				arg.Set(reflect.ValueOf(t.Context()))
			}
			in = append(in, arg)
		}
		out := engine.MethodByName(m.Name).Call(in)
		last := out[len(out)-1]
		if last.Type() == reflect.TypeFor[error]() && last.IsNil() && m.Name != "SnapshotGroup" { // of nothing
			t.Errorf("%s without an engine and without a gateway succeeds", m.Name)
		}
	}
}
