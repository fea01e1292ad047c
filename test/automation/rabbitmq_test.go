//go:build e2e

package automation

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	amqp "github.com/rabbitmq/amqp091-go"

	"varve/control/events"
	"varve/control/raft"
	"varve/control/state"
	"varve/test/harness"
)

const rabbitServer = "/usr/lib/rabbitmq/bin/rabbitmq-server"

// rabbit is Debian's RabbitMQ on loopback, in a directory of the test.
type rabbit struct {
	t    *testing.T
	env  []string
	addr string
	epmd *exec.Cmd
	cmd  *exec.Cmd

	ended chan struct{} // cmd's
	said  string        // the file with what it printed
}

func freePort(t *testing.T) string {
	t.Helper()
	port, err := harness.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	return strconv.Itoa(port)
}

func newRabbit(t *testing.T) *rabbit {
	t.Helper()
	if _, err := os.Stat(rabbitServer); err != nil {
		t.Skip("SKIPPED: rabbitmq-server is not installed")
	}
	dir := t.TempDir()
	port, dist, epmd := freePort(t), freePort(t), freePort(t)
	if err := os.WriteFile(filepath.Join(dir, "plugins"), []byte("[].\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := &rabbit{t: t, addr: "127.0.0.1:" + port, said: filepath.Join(dir, "said")}
	r.env = append(os.Environ(), "HOME="+dir, "RABBITMQ_NODENAME=varve"+port+"@localhost", "RABBITMQ_MNESIA_BASE="+dir+"/mnesia",
		"RABBITMQ_LOG_BASE="+dir+"/log", "RABBITMQ_NODE_IP_ADDRESS=127.0.0.1", "RABBITMQ_NODE_PORT="+port, "RABBITMQ_DIST_PORT="+dist,
		"ERL_EPMD_PORT="+epmd, "ERL_EPMD_ADDRESS=127.0.0.1", "RABBITMQ_ENABLED_PLUGINS_FILE="+dir+"/plugins", "RABBITMQ_CONFIG_FILE="+dir+"/none",
		"RABBITMQ_PID_FILE="+dir+"/pid", "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=+S 1:1 -kernel inet_dist_use_interface {127,0,0,1}")
	// Erlang's port mapper is the test's own; RabbitMQ would leave one behind.
	r.epmd = exec.Command("epmd", "-port", epmd, "-address", "127.0.0.1")
	if err := r.epmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.kill()
		_ = r.epmd.Process.Kill()
		_ = r.epmd.Wait()
	})
	return r
}

// start waits until the broker takes connections.
func (r *rabbit) start() {
	r.t.Helper()
	said, err := os.OpenFile(r.said, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600) // a pipe would be kept open by a child of its own group
	if err != nil {
		r.t.Fatal(err)
	}
	defer said.Close()
	r.cmd = exec.Command(rabbitServer)
	r.cmd.Env, r.cmd.Stdout, r.cmd.Stderr = r.env, said, said
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	cmd, ended := r.cmd, make(chan struct{})
	r.ended = ended
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	for end := time.Now().Add(90 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if c, err := r.dial(); err == nil {
			c.Close()
			return
		}
		select {
		case <-ended:
			end = time.Time{}
		default:
		}
	}
	r.kill()
	text, _ := os.ReadFile(r.said)
	r.t.Fatalf("RabbitMQ does not start (%v); it says:\n%s", cmd.ProcessState, text)
}

// kill ends the broker's process group without a word.
func (r *rabbit) kill() {
	if r.cmd == nil {
		return
	}
	if err := syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		r.t.Error(err)
	}
	<-r.ended
	r.cmd = nil
}

func (r *rabbit) dial() (*amqp.Connection, error) {
	return amqp.DialConfig("amqp://"+r.addr+"/", amqp.Config{SASL: []amqp.Authentication{&amqp.PlainAuth{Username: "guest", Password: "guest"}},
		Heartbeat: 5 * time.Second, Dial: amqp.DefaultDial(5 * time.Second)})
}

// consumer is what a user would write: a durable queue bound to the exchange, messages acknowledged when they are kept, ids
// that were seen before ignored. It reconnects by itself.
type consumer struct {
	r *rabbit

	mu    sync.Mutex
	seen  map[string]bool
	ids   []string
	again int
}

func (c *consumer) run(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := c.consume(ctx); err != nil && ctx.Err() == nil {
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond):
			}
		}
	}
	return nil
}

func (c *consumer) consume(ctx context.Context) error {
	conn, err := c.r.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	if err := c.declare(ch); err != nil {
		return err
	}
	messages, err := ch.ConsumeWithContext(ctx, "test", "", false, false, false, false, nil)
	if err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case m, ok := <-messages:
			if !ok {
				return errors.New("connection lost")
			}
			c.take(m.MessageId)
			if err := m.Ack(false); err != nil {
				return err
			}
		}
	}
}

func (c *consumer) declare(ch *amqp.Channel) error {
	if err := ch.ExchangeDeclare(events.ExchangeDefault, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
		return err
	}
	if _, err := ch.QueueDeclare("test", true, false, false, false, nil); err != nil {
		return err
	}
	return ch.QueueBind("test", "volume.#", events.ExchangeDefault, false, nil)
}

func (c *consumer) take(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seen[id] {
		c.again++
		return
	}
	c.seen[id] = true
	c.ids = append(c.ids, id)
}

func (c *consumer) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.ids)
}

// vault keeps the sink's password in memory.
type vault struct {
	mu sync.Mutex
	m  map[string][]byte
}

func (v *vault) Set(_ context.Context, name string, plain []byte) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.m[name] = plain
	return nil
}

func (v *vault) Get(name string) ([]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if s, ok := v.m[name]; ok {
		return s, nil
	}
	return nil, state.ErrNotFound
}

func (v *vault) Delete(_ context.Context, name string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.m, name)
	return nil
}

func running(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = f(ctx) })
	return sync.OnceFunc(func() { cancel(); wg.Wait() })
}

func eventually(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("%s did not come within %s", what, limit)
}

// A consumer of a real RabbitMQ gets each event once by id and in order, though the broker is killed while events are sent, is
// away for a while, and another node takes the lead.
func TestRabbitMQ(t *testing.T) {
	ctx := t.Context()
	r := newRabbit(t)
	r.start()
	node, err := raft.Open(raft.Config{Dir: t.TempDir(), Log: silence})
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	if err := node.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	store := node.State()
	pub := events.NewPublisher(node, node.ID(), silence)
	defer running(pub.Run)()
	v := &vault{m: make(map[string][]byte)}
	newSinks := func() *events.Sinks { return events.NewSinks(node, store, v, pub, silence) }
	sinks := newSinks()
	id, _, err := sinks.Set(ctx, uuid.Nil, 0, state.SinkSpec{Name: "rabbit", Kind: state.SinkAMQP, URL: "amqp://" + r.addr + "/", Local: true,
		Topics: []string{events.TopicVolume}}, []byte("guest:guest"))
	if err != nil {
		t.Fatal(err)
	}
	stop := running(sinks.Run)
	c := &consumer{r: r, seen: make(map[string]bool)}
	defer running(c.run)()
	// Until a queue is bound RabbitMQ throws messages away, which is the user's affair.
	eventually(t, "the consumer's queue", 30*time.Second, func() bool {
		conn, err := r.dial()
		if err != nil {
			return false
		}
		defer conn.Close()
		ch, err := conn.Channel()
		return err == nil && c.declare(ch) == nil
	})
	const count = 3000
	sent := 0
	emit := func(to int) {
		for ; sent < to; sent++ {
			pub.Emit(events.VolumeResize, events.TopicVolume, strconv.Itoa(sent), map[string]int{"size": sent})
			pub.Emit(events.UpAndRunning, events.TopicNode, "not asked for", nil)
		}
	}
	emit(1000)
	eventually(t, "the first events", 30*time.Second, func() bool { return c.count() >= 100 })
	began := time.Now()
	r.kill()
	emit(2000)
	eventually(t, "the outage", 30*time.Second, func() bool { return !sinks.Status(id).Failing.IsZero() })
	stop() // the lead goes to another node
	sinks = newSinks()
	stop = running(sinks.Run)
	r.start()
	outage := time.Since(began)
	emit(count)
	eventually(t, "all events", 120*time.Second, func() bool { return c.count() == count })
	stop()
	var want []string
	for sub := events.Subscribe(store, events.Filter{Topics: []string{events.TopicVolume}}, 0); len(want) < count; {
		batch, err := sub.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range batch {
			want = append(want, e.ID.String())
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Equal(c.ids, want) {
		for i := range want {
			if i >= len(c.ids) || c.ids[i] != want[i] {
				t.Fatalf("event %d of %d is not the one that was published then", i, len(want))
			}
		}
	}
	if strings.Contains(fmt.Sprint(sinks.Status(id)), "guest:guest") {
		t.Error("the password is in the status")
	}
	harness.Show("events: %d to a real RabbitMQ that was killed and away for %s, with a change of leaders: each once by id, in order; %d came again",
		count, outage.Round(time.Second), c.again)
}
