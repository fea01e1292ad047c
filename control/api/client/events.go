package client

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	v1 "varve/control/api/customer"
)

// EventFilter chooses events. Since is the seq of the last one that was seen, "" for new ones only.
type EventFilter struct {
	Since         string
	Types, Topics []string
}

const (
	reconnectPause = 2 * time.Second
	reconnectTries = 30
	eventBytesMax  = 1 << 20
)

// Events calls f with the JSON of each event until ctx ends, f fails or the appliance refuses. After a lost connection it goes on
// behind the last event that f has taken.
func (c *Client) Events(ctx context.Context, filter EventFilter, f func(data []byte) error) error {
	for failures := 0; ; {
		last, err := c.stream(ctx, filter, f)
		if last != "" {
			filter.Since, failures = last, 0
		}
		var stop *stopError
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.As(err, &stop):
			return stop.error
		case err != nil && !errors.Is(err, ErrUnreachable):
			return err
		}
		if failures++; failures > reconnectTries {
			return err
		}
		select {
		case <-time.After(reconnectPause):
		case <-ctx.Done():
			return nil
		}
	}
}

// stopError is f's own.
type stopError struct{ error }

// stream reads one connection's events and gives the seq of the last one taken.
func (c *Client) stream(ctx context.Context, filter EventFilter, f func(data []byte) error) (last string, err error) {
	q := url.Values{}
	for name, list := range map[string][]string{"type": filter.Types, "topic": filter.Topics} {
		if len(list) > 0 {
			q.Set(name, strings.Join(list, ","))
		}
	}
	header := http.Header{"Accept": {"text/event-stream"}}
	if filter.Since != "" {
		header["Last-Event-ID"] = []string{filter.Since}
	}
	resp, err := c.open(ctx, request{method: http.MethodGet, path: v1.Prefix + "/events/stream", query: q, header: header}, nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		answer, err := io.ReadAll(io.LimitReader(resp.Body, eventBytesMax))
		if err != nil {
			return "", errors.Join(ErrUnreachable, err)
		}
		return "", failure(resp, answer)
	}
	in := bufio.NewScanner(resp.Body)
	in.Buffer(nil, eventBytesMax)
	id, data := "", ""
	for in.Scan() {
		line := in.Text()
		if v, ok := strings.CutPrefix(line, "id: "); ok {
			id = v
		}
		if v, ok := strings.CutPrefix(line, "data: "); ok {
			data = v
		}
		if line != "" || data == "" {
			continue
		}
		if err := f([]byte(data)); err != nil {
			return last, &stopError{err}
		}
		if id != "" {
			last = id
		}
		id, data = "", ""
	}
	return last, ErrUnreachable
}
