package cli

import (
	"maps"
	"slices"
	"time"

	v1 "varve/control/api/customer"
	"varve/control/bytesize"
)

func size(n v1.Size) string { return bytesize.Format(int64(n)) }

func formatTime(t time.Time) string {
	if t.IsZero() || t.Unix() == 0 {
		return "-"
	}
	return t.Local().Format("2006-01-02 15:04:05")
}

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }

// notNil makes an empty list [] in JSON.
func notNil[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

// must is for mistakes in the definition of the commands themselves.
func must(err error) {
	if err != nil {
		panic(err)
	}
}
