//go:build !race

package sco

const raceEnabled = false
