package nbd

import (
	"encoding/binary"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// Numbers of the NBD protocol (doc/proto.md of NetworkBlockDevice/nbd) that go-nbd's protocol package lacks.
const (
	handshakeNoZeroes uint16 = 1 << 1

	clientFixedNewstyle uint32 = 1 << 0
	clientNoZeroes      uint32 = 1 << 1

	optExportName      uint32 = 1
	optStartTLS        uint32 = 5
	optStructuredReply uint32 = 8
	optListMetaContext uint32 = 9
	optSetMetaContext  uint32 = 10

	repMetaContext uint32 = 4
	repErrPolicy   uint32 = 1<<31 | 2
	repErrInvalid  uint32 = 1<<31 | 3
	repErrTLSReqd  uint32 = 1<<31 | 5
	repErrShutdown uint32 = 1<<31 | 7
	repErrTooBig   uint32 = 1<<31 | 9
)

// Transmission flags, as an export announces them.
const (
	flagHasFlags               = protocol.NEGOTIATION_REPLY_FLAGS_HAS_FLAGS
	flagCanMultiConn           = protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN
	flagReadOnly        uint16 = 1 << 1
	flagSendFlush       uint16 = 1 << 2
	flagSendFUA         uint16 = 1 << 3
	flagSendTrim        uint16 = 1 << 5
	flagSendWriteZeroes uint16 = 1 << 6
	flagSendDF          uint16 = 1 << 7
	flagSendCache       uint16 = 1 << 10
	flagSendFastZero    uint16 = 1 << 11
)

// Commands. The numbers index the tables of metrics.go.
const (
	cmdRead        = protocol.TRANSMISSION_TYPE_REQUEST_READ
	cmdWrite       = protocol.TRANSMISSION_TYPE_REQUEST_WRITE
	cmdDisc        = protocol.TRANSMISSION_TYPE_REQUEST_DISC
	cmdFlush       = uint16(3)
	cmdTrim        = uint16(4)
	cmdCache       = uint16(5)
	cmdWriteZeroes = uint16(6)
	cmdBlockStatus = uint16(7)
	cmdCount       = 8
)

// Command flags.
const (
	cmdFlagFUA      uint16 = 1 << 0
	cmdFlagNoHole   uint16 = 1 << 1
	cmdFlagDF       uint16 = 1 << 2
	cmdFlagReqOne   uint16 = 1 << 3
	cmdFlagFastZero uint16 = 1 << 4
)

// Error numbers of replies.
const (
	errnoPerm     = protocol.TRANSMISSION_ERROR_EPERM
	errnoIO       = uint32(5)
	errnoInval    = protocol.TRANSMISSION_ERROR_EINVAL
	errnoNoSpace  = uint32(28)
	errnoOverflow = uint32(75)
	errnoShutdown = uint32(108)
)

// Structured replies.
const (
	structuredMagic uint32 = 0x668e33ef

	chunkDone uint16 = 1 << 0

	chunkNone        uint16 = 0
	chunkOffsetData  uint16 = 1
	chunkBlockStatus uint16 = 5
	chunkError       uint16 = 1<<15 | 1

	stateHole uint32 = 1 << 0
	stateZero uint32 = 1 << 1
)

const (
	requestBytes    = 28 // magic 4, flags 2, command 2, cookie 8, offset 8, length 4
	simpleBytes     = 16 // magic 4, error 4, cookie 8
	chunkBytes      = 20 // magic 4, flags 2, type 2, cookie 8, length 4
	dataHeaderBytes = chunkBytes + 8

	// allocationContext and, with the name of a snapshot behind it, changedContext are the metadata contexts there are; the
	// IDs are what we call them on every connection.
	allocationContext        = "base:allocation"
	changedContext           = "varve:changed/"
	allocationID      uint32 = 1
	changedID         uint32 = 2
	stateChanged      uint32 = 1
)

// request is a decoded request header.
type request struct {
	flags  uint16
	cmd    uint16
	cookie uint64
	off    uint64
	length uint32
}

// decodeRequest reads a header of requestBytes. ok is false when the magic is wrong: the stream is out of step.
func decodeRequest(b []byte) (q request, ok bool) {
	_ = b[requestBytes-1]
	q.flags = binary.BigEndian.Uint16(b[4:])
	q.cmd = binary.BigEndian.Uint16(b[6:])
	q.cookie = binary.BigEndian.Uint64(b[8:])
	q.off = binary.BigEndian.Uint64(b[16:])
	q.length = binary.BigEndian.Uint32(b[24:])
	return q, binary.BigEndian.Uint32(b) == protocol.TRANSMISSION_MAGIC_REQUEST
}

// appendSimple appends a simple reply; errno 0 is success.
func appendSimple(b []byte, cookie uint64, errno uint32) []byte {
	b = binary.BigEndian.AppendUint32(b, protocol.TRANSMISSION_MAGIC_REPLY)
	b = binary.BigEndian.AppendUint32(b, errno)
	return binary.BigEndian.AppendUint64(b, cookie)
}

// appendChunk appends the header of the only chunk of a structured reply.
func appendChunk(b []byte, cookie uint64, kind uint16, length uint32) []byte {
	b = binary.BigEndian.AppendUint32(b, structuredMagic)
	b = binary.BigEndian.AppendUint16(b, chunkDone)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	return binary.BigEndian.AppendUint32(b, length)
}

// appendChunkError appends a whole structured reply that says nothing but errno.
func appendChunkError(b []byte, cookie uint64, errno uint32) []byte {
	b = appendChunk(b, cookie, chunkError, 6)
	b = binary.BigEndian.AppendUint32(b, errno)
	return binary.BigEndian.AppendUint16(b, 0)
}

// appendDataHeader appends what stands before the n bytes of a read at off: a simple reply's header, or one chunk's.
func appendDataHeader(b []byte, structured bool, cookie, off uint64, n int) []byte {
	if !structured {
		return appendSimple(b, cookie, 0)
	}
	if n == 0 {
		return appendChunk(b, cookie, chunkNone, 0)
	}
	b = appendChunk(b, cookie, chunkOffsetData, uint32(n)+8)
	return binary.BigEndian.AppendUint64(b, off)
}

// flagsAllowed says which command flags cmd understands. FUA is legal on every command: clients are known to set it
// where it means nothing.
func flagsAllowed(cmd uint16, structured bool) uint16 {
	switch cmd {
	case cmdRead:
		if structured {
			return cmdFlagFUA | cmdFlagDF
		}
	case cmdWriteZeroes:
		return cmdFlagFUA | cmdFlagNoHole | cmdFlagFastZero
	case cmdBlockStatus:
		return cmdFlagFUA | cmdFlagReqOne
	}
	return cmdFlagFUA
}
