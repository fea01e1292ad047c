package events

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"varve/control/state"
)

// ExchangeDefault is the exchange of an AMQP sink that names none: durable, of type topic.
const ExchangeDefault = "varve"

const (
	amqpHeartbeat   = 10 * time.Second
	confirmTimeout  = 30 * time.Second
	amqpFrameBytes  = 128 << 10
	amqpWindow      = 64
	contentTypeJSON = "application/json"
)

// amqpSender publishes persistent messages with confirms over one connection: routing key "<topic>.<type>", message id the
// event's. A batch counts as sent up to the first message that the broker has not confirmed.
type amqpSender struct {
	conn     *amqp.Connection
	channel  *amqp.Channel
	exchange string
}

func newAMQP(ctx context.Context, s state.Sink, secret []byte) (_ *amqpSender, err error) {
	u, err := url.Parse(s.URL)
	if err != nil {
		return nil, fmt.Errorf("sink %s: URL: %w", s.Name, err)
	}
	user, password, _ := strings.Cut(string(secret), ":")
	roots, err := rootsOf(s)
	if err != nil {
		return nil, err
	}
	dial := dialer(s.Local)
	conf := amqp.Config{Heartbeat: amqpHeartbeat, FrameSize: amqpFrameBytes, Locale: "en_US",
		SASL:       []amqp.Authentication{&amqp.PlainAuth{Username: user, Password: password}},
		Properties: amqp.Table{"product": "varve"},
		Dial: func(network, address string) (net.Conn, error) {
			c, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			// The library leaves the handshake without a limit; it clears this deadline when it is done.
			if err := c.SetDeadline(time.Now().Add(dialTimeout)); err != nil {
				return nil, errors.Join(err, c.Close())
			}
			return c, nil
		}}
	if u.Scheme == "amqps" {
		conf.TLSClientConfig = &tls.Config{RootCAs: roots, ServerName: u.Hostname(), MinVersion: tls.VersionTLS12}
	}
	a := &amqpSender{exchange: s.Exchange}
	if a.exchange == "" {
		a.exchange = ExchangeDefault
	}
	if a.conn, err = amqp.DialConfig(u.String(), conf); err != nil {
		return nil, fmt.Errorf("connect to AMQP broker of sink %s: %w", s.Name, err)
	}
	defer func() {
		if err != nil {
			a.close()
		}
	}()
	if a.channel, err = a.conn.Channel(); err != nil {
		return nil, fmt.Errorf("open AMQP channel of sink %s: %w", s.Name, err)
	}
	if err := a.channel.ExchangeDeclare(a.exchange, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
		return nil, fmt.Errorf("declare exchange %s of sink %s: %w", a.exchange, s.Name, err)
	}
	if err := a.channel.Confirm(false); err != nil {
		return nil, fmt.Errorf("ask for confirms of sink %s: %w", s.Name, err)
	}
	return a, nil
}

func (a *amqpSender) send(ctx context.Context, batch []state.Event, done func(state.Event)) error {
	for len(batch) > 0 {
		n := min(len(batch), amqpWindow)
		if err := a.window(ctx, batch[:n], done); err != nil {
			return err
		}
		batch = batch[n:]
	}
	return nil
}

// window publishes some events and waits for their confirms, in order.
func (a *amqpSender) window(ctx context.Context, events []state.Event, done func(state.Event)) error {
	ctx, cancel := context.WithTimeout(ctx, confirmTimeout)
	defer cancel()
	confirms := make([]*amqp.DeferredConfirmation, 0, len(events))
	var failed error
	for _, e := range events {
		body, err := message(e)
		if err != nil {
			return err
		}
		c, err := a.channel.PublishWithDeferredConfirmWithContext(ctx, a.exchange, e.Topic+"."+e.Type, false, false, amqp.Publishing{
			ContentType: contentTypeJSON, DeliveryMode: amqp.Persistent, MessageId: e.ID.String(), Type: e.Type, AppId: "varve",
			Timestamp: time.Unix(0, int64(e.At)).UTC(), Headers: amqp.Table{"seq": int64(e.Seq)}, Body: body})
		if err != nil {
			failed = fmt.Errorf("publish event %s: %w", e.ID, err)
			break
		}
		confirms = append(confirms, c)
	}
	for i, c := range confirms {
		ok, err := c.WaitContext(ctx)
		if err != nil {
			return errors.Join(failed, fmt.Errorf("event %s is not confirmed: %w", events[i].ID, err))
		}
		if !ok {
			return errors.Join(failed, fmt.Errorf("event %s is refused by the broker or its connection was lost", events[i].ID))
		}
		done(events[i])
	}
	return failed
}

func (a *amqpSender) close() {
	// What matters is confirmed already; a broker that does not answer the goodbye must not hold this up.
	if a.conn != nil {
		_ = a.conn.CloseDeadline(time.Now().Add(time.Second))
	}
}
