package server

import (
	"context"
	"path/filepath"

	"github.com/google/uuid"

	"varve/appliance/logbook"
	"varve/control/api"
	v1 "varve/control/api/customer"
	"varve/control/peer"
)

const (
	callLogs = "logs"
	logsName = "logs"
)

// LogDir is where an appliance's units keep their log lines.
func LogDir(data string) string { return filepath.Join(data, logsName) }

// answerLogs answers the other nodes' questions for log lines.
func (e estate) answerLogs() {
	peer.Handle1(e.peers, callLogs, smallCall, func(_ context.Context, q logbook.Query) (any, error) { return logbook.Read(LogDir(e.cfg.Data), q) })
}

// Logs implements api.Appliance.
func (e estate) Logs(ctx context.Context, q api.LogQuery) (v1.LogLines, error) {
	nodes := e.all()
	if q.Node != "" {
		n, err := e.nodes.Get(q.Node)
		if err != nil {
			return v1.LogLines{}, err
		}
		nodes = []uuid.UUID{n.ID}
	}
	out := v1.LogLines{Items: []v1.LogLine{}, Unreachable: []string{}}
	ask := logbook.Query{Since: q.Since, Until: q.Until, Level: q.Level, Component: q.Component, Match: q.Match, Limit: q.Limit}
	var lines []logbook.Line
	for _, a := range peer.Each[[]logbook.Line](ctx, e.peers, nodes, callLogs, ask) {
		name := e.nodeName(a.Node)
		if a.Err != nil {
			out.Unreachable = append(out.Unreachable, name)
			continue
		}
		for i := range a.Value {
			a.Value[i].Node = name
		}
		lines = append(lines, a.Value...)
	}
	for _, l := range logbook.Merge(q.Limit, lines) {
		out.Items = append(out.Items, v1.LogLine{Node: l.Node, Unit: l.Unit, Seq: l.Seq, At: l.At, Level: l.Level, Component: l.Component,
			Message: l.Message, Attrs: l.Attrs})
	}
	return out, nil
}
