//go:build race

package sco

// raceEnabled says that the race detector is in: under it a sync.Pool drops things.
const raceEnabled = true
