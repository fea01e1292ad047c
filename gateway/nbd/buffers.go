package nbd

import (
	"math/bits"
	"sync"
)

const (
	// burstBytes is what a connection reads at once, and what it gathers of small read replies before it sends them.
	burstBytes = 256 << 10
	// burstBytesTLS is the same for a TLS connection, which keeps its input buffer while idle.
	burstBytesTLS = 64 << 10
	// bufferRoom is what every buffer holds beyond its power of two: room for a reply header before the data.
	bufferRoom = 64

	smallestClass = 12 // 4 KiB
	largestClass  = 25 // 32 MiB
)

// buffer is a pooled piece of memory of one size class: 2^class + bufferRoom bytes.
type buffer struct {
	data  []byte // what is in use of it
	class int
	// held bytes of the node's payload budget go back with the buffer.
	held int64
}

// buffers are the pools, one a class. Idle connections own no buffer.
type buffers struct {
	pools [largestClass + 1]sync.Pool
}

// get returns an empty buffer with room for n bytes and a header.
func (p *buffers) get(n int) *buffer {
	class := smallestClass
	if n > 1<<smallestClass {
		class = bits.Len(uint(n - 1))
	}
	if b, ok := p.pools[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{data: make([]byte, 0, 1<<class+bufferRoom), class: class}
}

// put takes b back.
func (p *buffers) put(b *buffer) {
	if cap(b.data) != 1<<b.class+bufferRoom {
		return // it grew beyond its class
	}
	b.data = b.data[:0]
	p.pools[b.class].Put(b)
}
