package server

import (
	"runtime"
	"sync"

	"varve/gateway/nbd"
)

// nbdSeats are the process's seats for busy NBD connections, one for two cores, and the processors that go with them: the
// rest of the process has as many as it had.
var nbdSeats = sync.OnceValue(func() *nbd.Seats {
	cores := runtime.GOMAXPROCS(0)
	n := max(1, cores/2)
	runtime.GOMAXPROCS(cores + n)
	return nbd.NewSeats(n)
})
