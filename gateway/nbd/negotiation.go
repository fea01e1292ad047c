package nbd

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// handshakeBuffer is the size of the two buffers of a connection in handshake.
const handshakeBuffer = 4 << 10

// errHandshake is what a client did wrong; the connection is closed.
type errHandshake string

func (e errHandshake) Error() string { return string(e) }

// negotiation is one handshake. What the client has negotiated so far is in state, which STARTTLS clears.
type negotiation struct {
	s    *Server
	nc   net.Conn // the TLS connection, once there is one
	r    *bufio.Reader
	w    *bufio.Writer
	peer Peer

	fixed    bool // the client speaks fixed newstyle
	noZeroes bool
	options  int
	state    negotiated
}

// negotiated is what options have set before an export is attached.
type negotiated struct {
	structured bool
	// contextExport is the export that base:allocation, when allocation is true, and changed were set for.
	contextExport string
	allocation    bool
	changed       string
}

// option is one option request; data is complete.
type option struct {
	id   uint32
	data []byte
}

// negotiate does the handshake. It returns a connection ready for transmission, or nil when the client left politely.
func (s *Server) negotiate(ctx context.Context, cancel func(), nc net.Conn, peer Peer) (*conn, error) {
	limited, stop := context.WithTimeout(ctx, s.cfg.Limits.HandshakeTimeout)
	defer stop()
	n := &negotiation{s: s, nc: nc, peer: peer,
		r: bufio.NewReaderSize(nc, handshakeBuffer), w: bufio.NewWriterSize(nc, handshakeBuffer)}
	if err := n.greet(); err != nil {
		return nil, err
	}
	for {
		o, err := n.readOption()
		if err != nil {
			return nil, err
		}
		c, done, err := n.option(limited, o)
		if err == nil {
			err = n.w.Flush()
		}
		if err != nil {
			if c != nil {
				c.release()
			}
			return nil, err
		}
		if c != nil {
			c.ctx, c.cancel = ctx, cancel
			return c, nil
		}
		if done {
			return nil, nil
		}
	}
}

// greet sends the server's hello and reads the client's flags.
func (n *negotiation) greet() error {
	hello := protocol.NegotiationNewstyleHeader{
		OldstyleMagic:  protocol.NEGOTIATION_MAGIC_OLDSTYLE,
		OptionMagic:    protocol.NEGOTIATION_MAGIC_OPTION,
		HandshakeFlags: protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE | handshakeNoZeroes,
	}
	if err := n.send(hello); err != nil {
		return err
	}
	if err := n.w.Flush(); err != nil {
		return fmt.Errorf("send greeting: %w", err)
	}
	var flags uint32
	if err := binary.Read(n.r, binary.BigEndian, &flags); err != nil {
		return fmt.Errorf("read client flags: %w", err)
	}
	if flags&^(clientFixedNewstyle|clientNoZeroes) != 0 {
		return errHandshake(fmt.Sprintf("unknown client flags %#x", flags))
	}
	n.fixed = flags&clientFixedNewstyle != 0 || n.s.cfg.Quirks
	n.noZeroes = flags&clientNoZeroes != 0
	return nil
}

// readOption reads one option and its data, of at most optionMax bytes. A longer one is refused and read past, and if
// it is absurd the connection ends.
func (n *negotiation) readOption() (option, error) {
	for {
		var h protocol.NegotiationOptionHeader
		if err := binary.Read(n.r, binary.BigEndian, &h); err != nil {
			return option{}, fmt.Errorf("read option: %w", err)
		}
		if h.OptionMagic != protocol.NEGOTIATION_MAGIC_OPTION {
			return option{}, errHandshake("bad option magic")
		}
		if n.options++; n.options > optionsMax {
			return option{}, errHandshake("too many options")
		}
		if n.s.cfg.Quirks && h.Length == 0 && h.ID == protocol.NEGOTIATION_ID_OPTION_GO {
			return n.readUncountedGo(h.ID)
		}
		if h.Length <= optionMax {
			o := option{id: h.ID, data: make([]byte, h.Length)}
			if _, err := io.ReadFull(n.r, o.data); err != nil {
				return option{}, fmt.Errorf("read data of option %d: %w", h.ID, err)
			}
			return o, nil
		}
		if h.ID == optExportName {
			return option{}, errHandshake("export name too long")
		}
		if err := n.refuse(option{id: h.ID}, repErrTooBig, "option is too long"); err != nil {
			return option{}, err
		}
		if err := n.w.Flush(); err != nil {
			return option{}, err
		}
		if h.Length > optionSkipMax {
			return option{}, errHandshake("option far too long")
		}
		if _, err := n.r.Discard(int(h.Length)); err != nil {
			return option{}, fmt.Errorf("skip data of option %d: %w", h.ID, err)
		}
	}
}

// readUncountedGo reads the data of a GO whose header says that there is none: go-nbd's client sends it that way.
func (n *negotiation) readUncountedGo(id uint32) (option, error) {
	var length uint32
	if err := binary.Read(n.r, binary.BigEndian, &length); err != nil {
		return option{}, fmt.Errorf("read export name: %w", err)
	}
	if length > nameMax {
		return option{}, errHandshake("export name too long")
	}
	data := binary.BigEndian.AppendUint32(nil, length)
	data = append(data, make([]byte, length+2)...)
	if _, err := io.ReadFull(n.r, data[4:]); err != nil {
		return option{}, fmt.Errorf("read export name: %w", err)
	}
	infos := int(binary.BigEndian.Uint16(data[4+length:]))
	if len(data)+2*infos > optionMax {
		return option{}, errHandshake("too many information requests")
	}
	data = append(data, make([]byte, 2*infos)...)
	if _, err := io.ReadFull(n.r, data[len(data)-2*infos:]); err != nil {
		return option{}, fmt.Errorf("read information requests: %w", err)
	}
	return option{id: id, data: data}, nil
}

// option answers one option. It returns a connection when an export was attached, done when the client wants to leave.
func (n *negotiation) option(ctx context.Context, o option) (c *conn, done bool, err error) {
	if !n.fixed && o.id != optExportName {
		return nil, false, errHandshake("option from a client without fixed newstyle")
	}
	if n.s.cfg.TLS == TLSRequired && !n.peer.TLS {
		switch o.id {
		case optStartTLS, protocol.NEGOTIATION_ID_OPTION_ABORT:
		case optExportName:
			return nil, false, errHandshake("EXPORT_NAME before STARTTLS")
		default:
			return nil, false, n.refuse(o, repErrTLSReqd, "TLS is required")
		}
	}
	switch o.id {
	case optExportName:
		c, err = n.exportName(ctx, o)
	case protocol.NEGOTIATION_ID_OPTION_ABORT:
		// The client may be gone already: nothing hangs on its getting the ACK.
		return nil, true, n.reply(o, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
	case protocol.NEGOTIATION_ID_OPTION_LIST:
		err = n.list(ctx, o)
	case optStartTLS:
		err = n.startTLS(ctx, o)
	case protocol.NEGOTIATION_ID_OPTION_INFO, protocol.NEGOTIATION_ID_OPTION_GO:
		c, err = n.infoOrGo(ctx, o)
	case optStructuredReply:
		err = n.structuredReply(o)
	case optListMetaContext, optSetMetaContext:
		err = n.metaContext(ctx, o)
	default:
		err = n.refuse(o, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED, "unsupported option")
	}
	return c, false, err
}

// exportName attaches the old way, which has no means to say no but to hang up.
func (n *negotiation) exportName(ctx context.Context, o option) (*conn, error) {
	if len(o.data) > nameMax {
		return nil, errHandshake("export name too long")
	}
	name := string(o.data)
	dev, release, err := n.s.cfg.Exports.Open(ctx, name, n.peer)
	if err != nil {
		return nil, fmt.Errorf("open export %q: %w", name, err)
	}
	c := n.conn(name, dev, release, 1)
	answer := binary.BigEndian.AppendUint64(nil, uint64(dev.Size()))
	answer = binary.BigEndian.AppendUint16(answer, c.transmissionFlags())
	if !n.noZeroes {
		answer = append(answer, make([]byte, 124)...)
	}
	_, err = n.w.Write(answer)
	return c, err
}

func (n *negotiation) list(ctx context.Context, o option) error {
	if len(o.data) != 0 {
		return n.refuse(o, repErrInvalid, "LIST has no data")
	}
	exports, err := n.s.cfg.Exports.List(ctx, n.peer)
	if err != nil {
		return n.refuseFor(o, fmt.Errorf("list exports: %w", err))
	}
	for _, e := range exports {
		data := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name)))
		data = append(append(data, e.Name...), e.Description...)
		if err := n.reply(o, protocol.NEGOTIATION_TYPE_REPLY_SERVER, data); err != nil {
			return err
		}
	}
	return n.reply(o, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
}

// startTLS turns the connection into a TLS one. Whatever was negotiated or sent in the clear before may have come from
// somebody else: the first is forgotten, and bytes that were sent ahead of our answer end the connection.
func (n *negotiation) startTLS(ctx context.Context, o option) error {
	switch {
	case n.s.cfg.TLS == TLSOff:
		return n.refuse(o, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED, "TLS is not configured")
	case n.peer.TLS:
		return n.refuse(o, repErrInvalid, "TLS is on already")
	case len(o.data) != 0:
		return n.refuse(o, repErrInvalid, "STARTTLS has no data")
	case n.r.Buffered() > 0:
		return errHandshake("plaintext sent after STARTTLS")
	}
	if err := n.reply(o, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil); err != nil {
		return err
	}
	if err := n.w.Flush(); err != nil {
		return err
	}
	tc := tls.Server(n.nc, n.s.tls)
	if err := tc.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS handshake: %w", err)
	}
	identity, err := n.s.identify(tc.ConnectionState())
	if err != nil {
		return fmt.Errorf("identify TLS client: %w", err)
	}
	n.nc, n.peer.TLS, n.peer.Identity = tc, true, identity
	n.r.Reset(tc)
	n.w.Reset(tc)
	n.state = negotiated{}
	return nil
}

func (s *Server) identify(state tls.ConnectionState) (string, error) {
	if s.cfg.Identify != nil {
		return s.cfg.Identify(state)
	}
	if len(state.VerifiedChains) == 0 {
		return "", nil
	}
	return state.PeerCertificates[0].Subject.CommonName, nil
}

// infoOrGo answers INFO and GO, which differ in that GO keeps the export it opened.
func (n *negotiation) infoOrGo(ctx context.Context, o option) (*conn, error) {
	name, infos, code, problem := parseInfo(o.data)
	if code != 0 {
		return nil, n.refuse(o, code, problem)
	}
	dev, release, err := n.s.cfg.Exports.Open(ctx, name, n.peer)
	if err != nil {
		return nil, n.refuseFor(o, fmt.Errorf("open export %q: %w", name, err))
	}
	minBlock := uint32(1)
	if infos.blockSize && dev.Size()%blockMin == 0 {
		minBlock = blockMin
	}
	c := n.conn(name, dev, release, minBlock)
	err = n.describe(o, c, infos)
	if err == nil {
		err = n.reply(o, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
	}
	if err != nil || o.id == protocol.NEGOTIATION_ID_OPTION_INFO {
		c.release()
		return nil, err
	}
	return c, nil
}

// infoRequests says which pieces of information a client asked for; unknown ones are ignored.
type infoRequests struct {
	name, description, blockSize bool
}

// parseInfo decodes the data of INFO and GO. code is the refusal, or 0.
func parseInfo(data []byte) (name string, infos infoRequests, code uint32, problem string) {
	name, rest, code, problem := parseName(data)
	if code != 0 {
		return "", infos, code, problem
	}
	if len(rest) < 2 || len(rest)-2 != 2*int(binary.BigEndian.Uint16(rest)) {
		return "", infos, repErrInvalid, "number of information requests does not match the length"
	}
	for rest = rest[2:]; len(rest) > 0; rest = rest[2:] {
		switch binary.BigEndian.Uint16(rest) {
		case protocol.NEGOTIATION_TYPE_INFO_NAME:
			infos.name = true
		case protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION:
			infos.description = true
		case protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE:
			infos.blockSize = true
		}
	}
	return name, infos, 0, ""
}

// parseName decodes a string that follows its length. The length is compared with what is there, never added to.
func parseName(data []byte) (name string, rest []byte, code uint32, problem string) {
	if len(data) < 4 {
		return "", nil, repErrInvalid, "option is too short"
	}
	length := binary.BigEndian.Uint32(data)
	switch {
	case uint64(length) > uint64(len(data)-4):
		return "", nil, repErrInvalid, "length of a string is beyond the option"
	case length > nameMax:
		return "", nil, repErrTooBig, "string is too long"
	}
	return string(data[4 : 4+length]), data[4+length:], 0, ""
}

// describe sends the information replies for an opened export.
func (n *negotiation) describe(o option, c *conn, infos infoRequests) error {
	export := protocol.NegotiationReplyInfo{
		Type:              protocol.NEGOTIATION_TYPE_INFO_EXPORT,
		Size:              uint64(c.dev.Size()),
		TransmissionFlags: c.transmissionFlags(),
	}
	if err := n.replyStruct(o, export); err != nil {
		return err
	}
	if infos.name {
		data := binary.BigEndian.AppendUint16(nil, protocol.NEGOTIATION_TYPE_INFO_NAME)
		if err := n.reply(o, protocol.NEGOTIATION_TYPE_REPLY_INFO, append(data, c.export...)); err != nil {
			return err
		}
	}
	if d, ok := c.dev.(Describer); ok && infos.description {
		data := binary.BigEndian.AppendUint16(nil, protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION)
		text := d.Description()
		if err := n.reply(o, protocol.NEGOTIATION_TYPE_REPLY_INFO, append(data, text[:min(len(text), nameMax)]...)); err != nil {
			return err
		}
	}
	if !infos.blockSize {
		return nil
	}
	return n.replyStruct(o, protocol.NegotiationReplyBlockSize{
		Type:               protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE,
		MinimumBlockSize:   c.minBlock,
		PreferredBlockSize: blockPreferred,
		MaximumBlockSize:   payloadMax,
	})
}

func (n *negotiation) structuredReply(o option) error {
	if len(o.data) != 0 {
		return n.refuse(o, repErrInvalid, "STRUCTURED_REPLY has no data")
	}
	n.state.structured = true
	return n.reply(o, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
}

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT. A SET replaces what an earlier one has set, also when it fails.
func (n *negotiation) metaContext(ctx context.Context, o option) error {
	set := o.id == optSetMetaContext
	if set {
		n.state.allocation, n.state.changed, n.state.contextExport = false, "", ""
	}
	if !n.state.structured {
		return n.refuse(o, repErrInvalid, "structured replies come first")
	}
	name, queries, code, problem := parseMetaContext(o.data)
	if code != 0 {
		return n.refuse(o, code, problem)
	}
	dev, release, err := n.s.cfg.Exports.Open(ctx, name, n.peer)
	if err != nil {
		return n.refuseFor(o, fmt.Errorf("open export %q: %w", name, err))
	}
	defer release()
	wanted := !set && len(queries) == 0
	for _, q := range queries {
		wanted = wanted || q == allocationContext || !set && q == "base:"
	}
	if wanted {
		id := allocationID
		if set {
			n.state.allocation, n.state.contextExport = true, name
		} else {
			id = 0
		}
		data := binary.BigEndian.AppendUint32(nil, id)
		if err := n.reply(o, repMetaContext, append(data, allocationContext...)); err != nil {
			return err
		}
	}
	differ, _ := dev.(Differ)
	for _, q := range queries {
		since, ok := strings.CutPrefix(q, changedContext)
		if !ok || differ == nil || since == "" || !differ.Since(since) {
			continue
		}
		id := changedID
		if !set {
			id = 0
		} else if n.state.changed != "" {
			continue // one snapshot for a connection
		} else {
			n.state.changed, n.state.contextExport = since, name
		}
		if err := n.reply(o, repMetaContext, append(binary.BigEndian.AppendUint32(nil, id), q...)); err != nil {
			return err
		}
	}
	return n.reply(o, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
}

func parseMetaContext(data []byte) (name string, queries []string, code uint32, problem string) {
	name, rest, code, problem := parseName(data)
	if code != 0 {
		return "", nil, code, problem
	}
	if len(rest) < 4 {
		return "", nil, repErrInvalid, "option is too short"
	}
	count := binary.BigEndian.Uint32(rest)
	rest = rest[4:]
	if uint64(count)*4 > uint64(len(rest)) {
		return "", nil, repErrInvalid, "number of queries does not match the length"
	}
	for range count {
		var q string
		if q, rest, code, problem = parseName(rest); code != 0 {
			return "", nil, code, problem
		}
		queries = append(queries, q)
	}
	if len(rest) != 0 {
		return "", nil, repErrInvalid, "data after the last query"
	}
	return name, queries, 0, ""
}

// conn makes the connection that transmission goes on with.
func (n *negotiation) conn(name string, dev Device, release func(), minBlock uint32) *conn {
	c := newConn(n.s, n.nc, dev, release)
	c.peer, c.export, c.since = n.peer, name, time.Now()
	c.structured, c.minBlock, c.readOnly = n.state.structured, minBlock, dev.ReadOnly()
	if n.state.structured && n.state.contextExport == name {
		c.allocation, c.diffSince = n.state.allocation, n.state.changed
	}
	c.early = n.r
	return c
}

// send writes a wire struct.
func (n *negotiation) send(v any) error {
	return binary.Write(n.w, binary.BigEndian, v)
}

func (n *negotiation) reply(o option, kind uint32, data []byte) error {
	h := protocol.NegotiationReplyHeader{ReplyMagic: protocol.NEGOTIATION_MAGIC_REPLY, ID: o.id, Type: kind, Length: uint32(len(data))}
	if err := n.send(h); err != nil {
		return err
	}
	_, err := n.w.Write(data)
	return err
}

// replyStruct sends an information reply whose data is a wire struct.
func (n *negotiation) replyStruct(o option, v any) error {
	var data bytes.Buffer
	if err := binary.Write(&data, binary.BigEndian, v); err != nil {
		return err
	}
	return n.reply(o, protocol.NEGOTIATION_TYPE_REPLY_INFO, data.Bytes())
}

// refuse answers with an error; text is for people.
func (n *negotiation) refuse(o option, code uint32, text string) error {
	return n.reply(o, code, []byte(text))
}

// refuseFor answers with what an error of Exports means.
func (n *negotiation) refuseFor(o option, err error) error {
	switch {
	case errors.Is(err, ErrUnknownExport):
		return n.refuse(o, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN, "unknown export")
	case errors.Is(err, ErrNotAllowed):
		return n.refuse(o, repErrPolicy, "not allowed")
	case errors.Is(err, ErrTLSRequired) && n.s.cfg.TLS != TLSOff && !n.peer.TLS:
		return n.refuse(o, repErrTLSReqd, "TLS is required")
	case n.s.draining.Load():
		return n.refuse(o, repErrShutdown, "server stops")
	}
	n.s.log.Warn("NBD export not opened", "peer", n.peer.Addr, "err", err)
	return n.refuse(o, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN, "export is not available here now")
}
