//go:build race

package nbd

// raceEnabled says that the race detector is in, which allocates.
const raceEnabled = true
