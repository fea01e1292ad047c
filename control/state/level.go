package state

import "fmt"

// A data level says which formats may be written: those of the log, of objects and maps on backends, and of the commands here. A
// binary writes what the cluster's level allows and reads everything from LevelMin on. The level is raised by one command, when
// every node runs a binary that knows the new one; until then each of them can go back to the binary of before. What a new
// version wants to write (a command, a field, a format) that the previous one does not read waits for its level.
//
// A node keeps the level beside its data (appliance/server, LEVEL) and a binary that does not know it opens nothing there. One
// that meets the command all the same halts as at any entry that it does not know.
const (
	LevelMin = 1
	LevelMax = 1
)

// levelMax is LevelMax but in tests.
var levelMax = LevelMax

// Level is the data level of the cluster.
func (v *View) Level() int {
	c, ok := v.Cluster()
	if !ok {
		return LevelMin
	}
	return max(c.Level, LevelMin)
}

// LevelReady is the level that every node of the cluster knows, and the nodes that know no more than the present one.
func (v *View) LevelReady() (level int, behind []string) {
	now := v.Level()
	level = levelMax
	for _, n := range v.Nodes() {
		knows := max(n.LevelMax, LevelMin)
		if knows <= now {
			behind = append(behind, n.Name)
		}
		level = min(level, knows)
	}
	return max(level, now), behind
}

// RaiseLevel lets all nodes write the formats of a level. There is no way back.
type RaiseLevel struct {
	To int `json:"to"`
}

func (*RaiseLevel) kind() (string, int) { return "raise_level", 1 }

func (c *RaiseLevel) check() error {
	if c.To < LevelMin || c.To > levelMax {
		return &Error{Err: ErrInvalid, Object: "data level", Detail: fmt.Sprintf("level %d, this binary knows %d to %d", c.To, LevelMin, levelMax),
			Remedy: "run the version that raised it"}
	}
	return nil
}

func (c *RaiseLevel) apply(t *tx) (Result, error) {
	have, ok := t.Cluster()
	if !ok {
		return Result{}, missing("cluster")
	}
	if now := t.Level(); c.To <= now {
		if c.To == now {
			return Result{}, nil
		}
		return Result{}, &Error{Err: ErrConflict, Object: "data level", Detail: fmt.Sprintf("is %d already", now)}
	}
	for _, n := range t.Nodes() {
		if max(n.LevelMax, LevelMin) < c.To {
			return Result{}, &Error{Err: ErrConflict, Object: "data level", Detail: fmt.Sprintf("node %s runs version %s, which knows level %d", quote(n.Name),
				n.Version, max(n.LevelMax, LevelMin)), Remedy: "update it, or remove it from the cluster, first"}
		}
	}
	have.Level, have.Rev = c.To, t.index
	t.put(tCluster, &have)
	t.emit("data_level_raised", tCluster, have.ID.String(), struct {
		Level int `json:"level"`
	}{c.To})
	return Result{}, nil
}
