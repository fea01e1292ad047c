package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"

	"varve/volumedriver/blockio"
)

// refusal is the error number of a request that is wrong by itself, or 0.
func (c *conn) refusal(q request) uint32 {
	if q.cmd >= cmdCount || q.flags&^flagsAllowed(q.cmd, c.structured) != 0 {
		return errnoInval
	}
	if q.cmd == cmdFlush {
		return 0
	}
	writes := q.cmd == cmdWrite || q.cmd == cmdWriteZeroes || q.cmd == cmdTrim
	size := uint64(c.dev.Size())
	switch {
	case writes && c.readOnly:
		return errnoPerm
	case q.off%uint64(c.minBlock) != 0 || q.length%c.minBlock != 0:
		return errnoInval
	case q.off > size || uint64(q.length) > size-q.off:
		return beyondEnd(q.cmd)
	case q.cmd == cmdRead && q.length > payloadMax && q.flags&cmdFlagDF != 0:
		return errnoOverflow
	case q.cmd == cmdRead && q.length > payloadMax:
		return errnoInval
	case q.cmd == cmdBlockStatus && (!c.allocation && c.diffSince == "" || q.length == 0):
		return errnoInval
	}
	return 0
}

// plainRequest serves a request without payload; its header is consumed.
func (c *conn) plainRequest(q request) error {
	if errno := c.refusal(q); errno != 0 {
		c.refuse(q, errno)
		return nil
	}
	switch q.cmd {
	case cmdRead:
		return c.readRequest(q)
	case cmdFlush:
		return c.flushRequest(q)
	case cmdTrim, cmdWriteZeroes:
		return c.zeroRequest(q)
	case cmdCache:
		return c.cacheRequest(q)
	default:
		return c.blockStatusRequest(q)
	}
}

// readRequest answers from memory where it can: a short read into the buffer that the burst's replies share, a long
// one into its own.
func (c *conn) readRequest(q request) error {
	n := int(q.length)
	if n > inlineReadMax {
		return c.longRead(q)
	}
	b := c.replyRoom(dataHeaderBytes + n)
	start := len(b.data)
	b.data = appendDataHeader(b.data, c.structured, q.cookie, q.off, n)
	header := len(b.data)
	b.data = b.data[:header+n]
	if n == 0 {
		return nil
	}
	err := c.dev.TryRead(b.data[header:], int64(q.off))
	if err == nil {
		return nil
	}
	b.data = b.data[:start]
	if !errors.Is(err, blockio.ErrBusy) {
		return c.readFailed(q, err)
	}
	held, err := c.hold(n)
	if err != nil {
		return err
	}
	return c.readLater(q, held)
}

// longRead is readRequest for reads with a buffer of their own, paid from the payload budget.
func (c *conn) longRead(q request) error {
	b, err := c.hold(int(q.length))
	if err != nil {
		return err
	}
	b.data = appendDataHeader(b.data, c.structured, q.cookie, q.off, int(q.length))
	header := len(b.data)
	b.data = b.data[:header+int(q.length)]
	switch err = c.dev.TryRead(b.data[header:], int64(q.off)); {
	case err == nil:
		c.push(b)
		return nil
	case errors.Is(err, blockio.ErrBusy):
		return c.readLater(q, b)
	}
	c.srv.putBuffer(c, b)
	return c.readFailed(q, err)
}

// readLater hands a read that has to wait to a worker.
func (c *conn) readLater(q request, b *buffer) error {
	err := c.later(q, func() { c.finishRead(q, b) })
	if err != nil {
		c.srv.putBuffer(c, b)
	}
	return err
}

// finishRead is the blocking rest of a read, in a worker.
func (c *conn) finishRead(q request, b *buffer) {
	b.data = appendDataHeader(b.data[:0], c.structured, q.cookie, q.off, int(q.length))
	header := len(b.data)
	b.data = b.data[:header+int(q.length)]
	if err := c.dev.Read(c.ctx, b.data[header:], int64(q.off)); err != nil {
		c.srv.putBuffer(c, b)
		c.workerFailed(q, err)
		return
	}
	c.push(b)
}

// readFailed answers a failed read from the reader.
func (c *conn) readFailed(q request, err error) error {
	if errors.Is(err, blockio.ErrFenced) {
		return c.fenced(err)
	}
	c.logFailed(q, err)
	c.refuse(q, errnoOf(err, q.cmd))
	return nil
}

// writeRequest serves a write whose header is at c.r. complete is false when more of it has to arrive first: payloads that
// fit into the input buffer are submitted from there, longer ones are read into a buffer of their own.
func (c *conn) writeRequest(q request) (complete bool, err error) {
	n := int64(q.length)
	if n > payloadMax {
		return false, errOversized
	}
	errno := c.refusal(q)
	fits := requestBytes+n <= int64(cap(c.in.data))
	if errno == 0 && fits && int64(c.w-c.r) < requestBytes+n {
		return false, nil
	}
	c.r += requestBytes
	c.count(q)
	if errno != 0 {
		if err := c.discard(n); err != nil {
			return false, err
		}
		c.refuse(q, errno)
		return true, nil
	}
	tag, err := c.slot(q)
	if err != nil {
		return false, err
	}
	if !fits {
		return true, c.longWrite(q, tag)
	}
	p := c.in.data[c.r : c.r+int(n)]
	c.r += int(n)
	err = c.dev.TryWrite(p, int64(q.off), fua(q), c, uint64(tag))
	if err == nil {
		c.accepted(q)
		return true, nil
	}
	if !errors.Is(err, blockio.ErrBusy) {
		return true, c.notAccepted(q, tag, err)
	}
	b, err := c.hold(int(n))
	if err != nil {
		c.unslot(tag)
		return true, err
	}
	b.data = append(b.data, p...)
	c.finishWriteLater(q, tag, b)
	return true, nil
}

// longWrite reads the rest of a payload into its own buffer and submits it.
func (c *conn) longWrite(q request, tag uint16) error {
	b, err := c.hold(int(q.length))
	if err != nil {
		c.unslot(tag)
		return err
	}
	b.data = b.data[:q.length]
	if err := c.readPayload(b.data); err != nil {
		c.unslot(tag)
		c.srv.putBuffer(c, b)
		return err
	}
	err = c.dev.TryWrite(b.data, int64(q.off), fua(q), c, uint64(tag))
	if errors.Is(err, blockio.ErrBusy) {
		c.finishWriteLater(q, tag, b)
		return nil
	}
	c.srv.putBuffer(c, b)
	if err != nil {
		return c.notAccepted(q, tag, err)
	}
	c.accepted(q)
	return nil
}

func (c *conn) finishWriteLater(q request, tag uint16, b *buffer) {
	c.work(func() {
		err := c.dev.Write(c.ctx, b.data, int64(q.off), fua(q))
		c.srv.putBuffer(c, b)
		c.finished(tag, err)
	})
}

// zeroRequest serves TRIM and WRITE_ZEROES, which are the same to a log: both leave zeros, at once whatever the length.
// NO_HOLE asks for space to be kept, which a log never does nor needs to: a write to it may fail as any other.
func (c *conn) zeroRequest(q request) error {
	tag, err := c.slot(q)
	if err != nil {
		return err
	}
	if q.length == 0 {
		c.finished(tag, nil)
		return nil
	}
	err = c.dev.TryZero(int64(q.off), int64(q.length), fua(q), c, uint64(tag))
	switch {
	case err == nil:
		c.accepted(q)
		return nil
	case errors.Is(err, blockio.ErrBusy):
		c.work(func() { c.finished(tag, c.dev.Zero(c.ctx, int64(q.off), int64(q.length), fua(q))) })
		return nil
	}
	return c.notAccepted(q, tag, err)
}

// flushRequest flushes. A client that sends one request at a time is served on this goroutine, which saves it two
// switches; nothing of this connection is held up, since there is nothing.
func (c *conn) flushRequest(q request) error {
	if c.alone >= aloneBursts && c.decoded == 1 && c.r == c.w && c.flying.Load() == 0 {
		err := c.dev.FlushInline()
		if errors.Is(err, blockio.ErrFenced) {
			return c.fenced(err)
		}
		c.refuse(q, errnoOf(err, q.cmd))
		return nil
	}
	tag, err := c.slot(q)
	if err != nil {
		return err
	}
	err = c.dev.TryFlush(c, uint64(tag))
	switch {
	case err == nil:
		c.accepted(q)
		return nil
	case errors.Is(err, blockio.ErrBusy):
		c.work(func() { c.finished(tag, c.dev.Flush(c.ctx)) })
		return nil
	}
	return c.notAccepted(q, tag, err)
}

// cacheRequest brings a range nearer by reading it. Ranges beyond payloadMax are acknowledged and not read: it is a hint.
func (c *conn) cacheRequest(q request) error {
	n := int(min(q.length, payloadMax))
	if n == 0 || q.length > payloadMax {
		c.refuse(q, 0)
		return nil
	}
	b, err := c.hold(min(n, burstBytes))
	if err != nil {
		return err
	}
	tag, err := c.slot(q)
	if err != nil {
		c.srv.putBuffer(c, b)
		return err
	}
	c.work(func() {
		var err error
		for done := 0; done < n && err == nil; done += burstBytes {
			err = c.dev.Read(c.ctx, b.data[:min(burstBytes, n-done)], int64(q.off)+int64(done))
		}
		c.srv.putBuffer(c, b)
		c.finished(tag, err)
	})
	return nil
}

// blockStatusRequest may have to fetch cold parts of a map, so a worker does it.
func (c *conn) blockStatusRequest(q request) error {
	return c.later(q, func() {
		limit := extentsMax
		if q.flags&cmdFlagReqOne != 0 {
			limit = 1
		}
		var allocation, changed []blockio.Extent
		var err error
		if c.allocation {
			if allocation, err = c.dev.Extents(c.ctx, int64(q.off), int64(q.length), limit); err == nil && len(allocation) == 0 {
				err = fmt.Errorf("no extents at %d", q.off)
			}
		}
		if differ, ok := c.dev.(Differ); err == nil && c.diffSince != "" && ok {
			if changed, err = differ.Changed(c.ctx, c.diffSince, int64(q.off), int64(q.length), limit); err == nil && len(changed) == 0 {
				err = fmt.Errorf("no extents at %d", q.off)
			}
		}
		if err != nil {
			c.workerFailed(q, err)
			return
		}
		b := c.srv.pool.get(2*(chunkBytes+4) + 8*(len(allocation)+len(changed)))
		if c.allocation {
			b.data = appendBlockStatus(b.data, q, allocationID, allocation, limit)
		}
		if c.diffSince != "" {
			if c.allocation {
				clearDone(b.data)
			}
			b.data = appendBlockStatus(b.data, q, changedID, changed, limit)
		}
		c.push(b)
	})
}

// statusOf is an extent's status in a metadata context.
func statusOf(context uint32, e blockio.Extent) (state uint32) {
	if context == changedID {
		if !e.Hole {
			state = stateChanged
		}
		return state
	}
	if e.Hole {
		state |= stateHole
	}
	if e.Zero {
		state |= stateZero
	}
	return state
}

// clearDone says of a chunk that another one follows it.
func clearDone(chunk []byte) {
	flags := binary.BigEndian.Uint16(chunk[4:])
	binary.BigEndian.PutUint16(chunk[4:], flags&^chunkDone)
}

// appendBlockStatus appends the reply for extents in one context: merged, clipped to the request, at most limit of them.
func appendBlockStatus(b []byte, q request, context uint32, extents []blockio.Extent, limit int) []byte {
	start := len(b)
	b = appendChunk(b, q.cookie, chunkBlockStatus, 0)
	b = binary.BigEndian.AppendUint32(b, context)
	left, count, last := int64(q.length), 0, uint32(0)
	for _, e := range extents {
		n := min(e.Length, left)
		state := statusOf(context, e)
		if n <= 0 {
			break
		}
		if count > 0 && state == last {
			at := len(b) - 8
			binary.BigEndian.PutUint32(b[at:], binary.BigEndian.Uint32(b[at:])+uint32(n))
		} else {
			if count == limit {
				break
			}
			b = binary.BigEndian.AppendUint32(b, uint32(n))
			b = binary.BigEndian.AppendUint32(b, state)
			count, last = count+1, state
		}
		left -= n
	}
	binary.BigEndian.PutUint32(b[start+16:], uint32(len(b)-start-chunkBytes))
	return b
}

func fua(q request) blockio.Flags {
	if q.flags&cmdFlagFUA != 0 {
		return blockio.FUA
	}
	return 0
}

// refuse answers q from the reader with errno, which is 0 for requests that are done without further ado.
func (c *conn) refuse(q request, errno uint32) {
	if errno != 0 && q.cmd < cmdCount {
		c.srv.metrics.errors[q.cmd].Inc()
	}
	b := c.replyRoom(dataHeaderBytes)
	if c.structured && (q.cmd == cmdRead || q.cmd == cmdBlockStatus) {
		b.data = appendChunkError(b.data, q.cookie, errno)
		return
	}
	b.data = appendSimple(b.data, q.cookie, errno)
}

// replyRoom returns the burst's reply buffer with room for n bytes more.
func (c *conn) replyRoom(n int) *buffer {
	if c.replies != nil && cap(c.replies.data)-len(c.replies.data) < n {
		c.push(c.replies)
		c.replies = nil
	}
	if c.replies == nil {
		c.replies = c.srv.pool.get(burstBytes)
	}
	return c.replies
}

// later runs f in a worker that holds a slot, for requests whose reply is not a simple one. f answers.
func (c *conn) later(q request, f func()) error {
	tag, err := c.slot(q)
	if err != nil {
		return err
	}
	c.work(func() {
		f()
		c.free(tag)
	})
	return nil
}

// work runs f on a goroutine of its own. There are as many at most as there are slots.
func (c *conn) work(f func()) {
	c.srv.metrics.busy.Inc()
	c.workers.Go(f)
}

// workerFailed answers a failed request whose slot its worker holds.
func (c *conn) workerFailed(q request, err error) {
	if c.over(err) {
		return
	}
	c.logFailed(q, err)
	c.srv.metrics.errors[q.cmd].Inc()
	b := c.srv.pool.get(dataHeaderBytes)
	if c.structured {
		b.data = appendChunkError(b.data, q.cookie, errnoOf(err, q.cmd))
	} else {
		b.data = appendSimple(b.data, q.cookie, errnoOf(err, q.cmd))
	}
	c.push(b)
}

func (c *conn) logFailed(q request, err error) {
	c.srv.log.Debug("NBD request failed",
		"export", c.export, "command", commandNames[q.cmd], "offset", q.off, "length", q.length, "err", err)
}

// over says that err means the end of the connection, without an answer: the outcome is unknown.
func (c *conn) over(err error) bool {
	if errors.Is(err, blockio.ErrFenced) {
		c.fail(fmt.Errorf("export %q: %w", c.export, err))
		return true
	}
	return c.ctx.Err() != nil
}

// fenced fails the connection from the reader.
func (c *conn) fenced(err error) error {
	err = fmt.Errorf("export %q: %w", c.export, err)
	c.fail(err)
	return err
}

// accepted notes that the device has taken q and wants a Kick.
func (c *conn) accepted(q request) {
	c.submitted = true
	c.durable = c.durable || q.cmd == cmdFlush || q.flags&cmdFlagFUA != 0
}

// notAccepted answers a request that the device refused at once: nothing was applied.
func (c *conn) notAccepted(q request, tag uint16, err error) error {
	c.unslot(tag)
	return c.readFailed(q, err)
}

// unslot takes back a slot whose request was never submitted.
func (c *conn) unslot(tag uint16) {
	c.slotCache = append(c.slotCache, tag)
	c.flying.Add(-1)
}

// finished ends a request of a worker as Done and Settle end those of the device.
func (c *conn) finished(tag uint16, err error) {
	c.Done(uint64(tag), err)
	c.Settle(true)
}
