package nbd

import (
	"github.com/prometheus/client_golang/prometheus"
)

// commandNames are the label values of commands, by number.
var commandNames = [cmdCount]string{"read", "write", "disconnect", "flush", "trim", "cache", "write_zeroes", "block_status"}

// metrics are the server's counters. Connections add to those of the hot path once per burst.
type metrics struct {
	requests        [cmdCount]prometheus.Counter
	errors          [cmdCount]prometheus.Counter
	unknown         prometheus.Counter
	readBytes       prometheus.Counter
	writtenBytes    prometheus.Counter
	busy            prometheus.Counter
	attached        prometheus.Counter
	handshakeErrors prometheus.Counter
	shed            prometheus.Counter
	refused         *prometheus.CounterVec
}

func newMetrics(s *Server, reg prometheus.Registerer) *metrics {
	opts := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: "varve", Subsystem: "nbd", Name: name, Help: help}
	}
	counter := func(name, help string) prometheus.Counter { return prometheus.NewCounter(opts(name, help)) }
	vec := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(opts(name, help), []string{label})
	}
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "varve", Subsystem: "nbd", Name: name, Help: help}, f)
	}
	requests := vec("requests_total", "Requests by command.", "command")
	errs := vec("request_errors_total", "Requests answered with an error, by command.", "command")
	m := &metrics{
		unknown:         counter("unknown_commands_total", "Requests with a command that does not exist."),
		readBytes:       counter("read_bytes_total", "Bytes asked for by reads."),
		writtenBytes:    counter("written_bytes_total", "Bytes sent by writes."),
		busy:            counter("requests_waited_total", "Requests that could not be served at once."),
		attached:        counter("attached_total", "Connections that reached transmission."),
		handshakeErrors: counter("handshake_errors_total", "Handshakes that ended without an export attached."),
		shed:            counter("shed_total", "Connections ended because their client stood still while others waited for memory."),
		refused:         vec("refused_total", "Connections refused for a limit.", "limit"),
	}
	for i, name := range commandNames {
		m.requests[i] = requests.WithLabelValues(name)
		m.errors[i] = errs.WithLabelValues(name)
	}
	if reg == nil {
		return m
	}
	all := func(*conn) bool { return true }
	reg.MustRegister(requests, errs, m.unknown, m.readBytes, m.writtenBytes, m.busy,
		m.attached, m.handshakeErrors, m.shed, m.refused,
		gauge("connections", "Connections in transmission.", func() float64 { return float64(len(s.connections(all))) }),
		gauge("handshakes", "Connections in handshake.", func() float64 { return float64(s.admit.waiting()) }),
		gauge("in_flight", "Requests accepted and not yet answered.", func() float64 {
			n := 0
			for _, c := range s.connections(all) {
				n += int(c.flying.Load())
			}
			return float64(n)
		}),
		gauge("payload_bytes", "Payload memory in use outside the connections' own buffers.", func() float64 {
			n := int64(0)
			for _, c := range s.connections(all) {
				n += c.held.Load()
			}
			return float64(n)
		}),
	)
	return m
}

// tally is what a connection counts by itself until its burst ends.
type tally struct {
	requests           [cmdCount]uint32
	unknown            uint32
	readBytes, written uint64
	any                bool
}

// add hands t to the counters and clears it.
func (m *metrics) add(t *tally) {
	if !t.any {
		return
	}
	for i, n := range t.requests {
		if n > 0 {
			m.requests[i].Add(float64(n))
		}
	}
	if t.unknown > 0 {
		m.unknown.Add(float64(t.unknown))
	}
	if t.readBytes > 0 {
		m.readBytes.Add(float64(t.readBytes))
	}
	if t.written > 0 {
		m.writtenBytes.Add(float64(t.written))
	}
	*t = tally{}
}
