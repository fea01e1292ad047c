package api

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strconv"
	"sync"
	"time"

	"varve/control/auth"
)

// Limits of streams.
const (
	streamsMax     = 256
	streamsEachMax = 16
	heartbeatEvery = 15 * time.Second
	rightsEvery    = 5 * time.Second
	streamWrite    = 20 * time.Second
)

// streams counts open event streams by caller.
type streams struct {
	// mu guards by and all.
	mu  sync.Mutex
	by  map[string]int
	all int
}

func (s *streams) enter(who string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all >= streamsMax || s.by[who] >= streamsEachMax {
		return false
	}
	if s.by == nil {
		s.by = make(map[string]int)
	}
	s.by[who]++
	s.all++
	return true
}

func (s *streams) leave(who string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all--
	if s.by[who]--; s.by[who] == 0 {
		delete(s.by, who)
	}
}

// resume is where a stream begins: after what its caller saw last, or now.
func resume(now uint64, since *int64, lastEventID string) (uint64, error) {
	if lastEventID != "" {
		seen, err := strconv.ParseUint(lastEventID, 10, 64)
		if err != nil {
			return 0, refuse(http.StatusBadRequest, "invalid", "Last-Event-ID is none of this stream", "leave it out")
		}
		return seen, nil
	}
	if since != nil {
		return uint64(*since), nil
	}
	return now, nil
}

// errStreamOver ends a stream that there is nothing more to say on.
var errStreamOver = errors.New("the stream is over")

// feed is an answer that goes on: server-sent events.
type feed struct {
	ctx    context.Context // of the request, which the answer is part of
	server *Server
	who    auth.Principal
	start  string
	next   func(b *bytes.Buffer) error
}

// stream makes one that begins with start. next waits for what comes, for rightsEvery at most, and writes it down.
func (s *Server) stream(ctx context.Context, start string, next func(b *bytes.Buffer) error) (*feed, error) {
	who := callOf(ctx).who
	if !s.streams.enter(who.Who()) {
		return nil, refuse(http.StatusTooManyRequests, "rate_limited", "too many event streams are open", "close some")
	}
	return &feed{ctx: ctx, server: s, who: who, start: start, next: next}, nil
}

// write sends what comes until the caller goes, its rights end, or the server does.
func (e *feed) write(w http.ResponseWriter) error {
	defer e.server.streams.leave(e.who.Who())
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no")
	w.WriteHeader(http.StatusOK)
	rc := http.NewResponseController(w)
	send := func(b []byte) error {
		if err := rc.SetWriteDeadline(time.Now().Add(streamWrite)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
		return rc.Flush()
	}
	if send([]byte("retry: 2000\n"+e.start+"\n")) != nil {
		return nil
	}
	for beat := time.Now(); e.ctx.Err() == nil && e.server.serving() && e.server.auth.Still(e.who); {
		var b bytes.Buffer
		if err := e.next(&b); err != nil {
			if errors.Is(err, errStreamOver) {
				return nil
			}
			return err
		}
		if b.Len() == 0 && time.Since(beat) >= heartbeatEvery {
			b.WriteString(": alive\n\n")
		}
		if b.Len() > 0 {
			beat = time.Now()
			if send(b.Bytes()) != nil {
				return nil // the caller is gone
			}
		}
	}
	return nil
}
