package api

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	v1 "varve/control/api/customer"
)

// LogQuery asks for log lines; see the operation queryLogs.
type LogQuery struct {
	Node             string
	Since, Until     time.Time
	Level            slog.Level
	Component, Match string
	Limit            int
}

const (
	logLines    = 500
	logLinesMax = 5000
)

// QueryLogs implements v1.StrictServerInterface.
func (a customerAPI) QueryLogs(ctx context.Context, r v1.QueryLogsRequestObject) (v1.QueryLogsResponseObject, error) {
	of, err := a.appliance()
	if err != nil {
		return nil, err
	}
	p := r.Params
	q := LogQuery{Node: p.Node, Until: time.Now(), Component: p.Component, Match: p.Match, Limit: p.Limit}
	if p.Level != "" {
		if err := q.Level.UnmarshalText([]byte(p.Level)); err != nil {
			return nil, badQuery("level", "is none of debug, info, warn, error")
		}
	}
	if p.Until != 0 {
		q.Until = time.Unix(p.Until, 0)
	}
	q.Since = q.Until.Add(-time.Hour)
	if p.Since != 0 {
		q.Since = time.Unix(p.Since, 0)
	}
	if q.Limit == 0 {
		q.Limit = logLines
	}
	if q.Limit < 0 || q.Limit > logLinesMax {
		return nil, badQuery("limit", fmt.Sprintf("is not a number from 1 to %d", logLinesMax))
	}
	if q.Node != "" {
		if _, err := a.cfg.Nodes.Get(q.Node); err != nil {
			return nil, err
		}
	}
	lines, err := of.Logs(ctx, q)
	return v1.QueryLogs200JSONResponse(lines), err
}
