package server

import (
	"runtime"
	"sync"

	"varve/gateway/seat"
)

// seats are the process's for busy connections, one for two cores, and the processors that go with them: the rest of the process
// has as many as it had.
var seats = sync.OnceValue(func() *seat.Seats {
	cores := runtime.GOMAXPROCS(0)
	n := max(1, cores/2)
	runtime.GOMAXPROCS(cores + n)
	return seat.New(n, seat.Rules{})
})
