//go:build e2e

package e2e

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"varve/test/harness"
	"varve/test/nbdclient"
)

// dialFrom connects from one of the loopback's other addresses, so that limits per client count it apart.
func dialFrom(host int, addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: 2 * time.Second, LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+host))}}
	return d.Dial("tcp", addr)
}

// probe measures a well-behaved client: the median and longest of some durable writes.
func probe(t *testing.T, c *nbdclient.Client, count int) (median, longest time.Duration) {
	t.Helper()
	p := make([]byte, block)
	took := make([]time.Duration, count)
	for i := range took {
		took[i] = timed(func() { must(t, c.Do(nbdclient.Write, nbdclient.FUA, int64(i)*block, 0, p)) })
	}
	slices.Sort(took)
	return took[count/2], took[count-1]
}

// Clients that never finish what they began hold neither memory nor others up, and are sent away.
func TestRudeSlowClients(t *testing.T) {
	n := harness.StartNode(t, "--log-level", "error")
	n.CreateDisk(t, "good", "1GiB")
	good := dial(t, n.NBD("good"))
	quiet, _ := probe(t, good, 200)
	before := harness.RSS(n.PID())

	var held []net.Conn
	refused := 0
	for i := range 400 {
		addr, text := n.NBDAddr(), []byte{0, 0}
		if i%2 == 1 {
			addr, text = n.NFSAddr(), []byte{0x80, 0x10, 0} // a record of a megabyte that never comes
		}
		c, err := dialFrom(i%100, addr)
		if err != nil {
			refused++
			continue
		}
		c.Write(text)
		held = append(held, c)
		t.Cleanup(func() { c.Close() })
	}
	during, longest := probe(t, good, 200)
	grown := harness.RSS(n.PID()) - before
	// The handshake has a deadline.
	closed := 0
	deadline := time.Now().Add(25 * time.Second)
	for i, c := range held {
		if i%2 == 1 {
			continue // an NFS connection may be idle
		}
		c.SetReadDeadline(deadline)
		if _, err := io.Copy(io.Discard, c); err == nil || !isTimeout(err) {
			closed++
		}
	}
	harness.Show("rude clients: %d half-open NBD and NFS connections (%d refused): +%.0f MiB, durable 4K write %.2f ms (%.2f ms without them, longest %.0f ms); %d of the NBD ones sent away",
		len(held), refused, megabytes(grown), ms(during), ms(quiet), ms(longest), closed)
	if grown > 128*mib {
		t.Errorf("%.0f MiB for clients that said nothing", megabytes(grown))
	}
	if closed < len(held)/2-5 {
		t.Errorf("only %d of %d unfinished handshakes were ended", closed, len(held)/2)
	}
}

func ms(d time.Duration) float64 { return d.Seconds() * 1000 }

func isTimeout(err error) bool {
	e, ok := err.(net.Error)
	return ok && e.Timeout()
}

// A client that asks for gigabytes and reads nothing holds nobody up.
func TestRudeReaderThatDoesNotRead(t *testing.T) {
	n := harness.StartNode(t, "--log-level", "error")
	n.CreateDisk(t, "good", "1GiB")
	n.CreateDisk(t, "greedy", "1GiB")
	good := dial(t, n.NBD("good"))
	greedy := dial(t, n.NBD("greedy"))
	scatter(t, greedy, 12, 64*mib, 8*mib)
	quiet, _ := probe(t, good, 200)
	before := harness.RSS(n.PID())
	// After GO, 4,000 reads of 1 MiB, and then silence.
	for i := range 4 {
		raw, err := rawExport(n.NBDAddr(), i, "default/greedy")
		must(t, err)
		t.Cleanup(func() { raw.Close() })
		raw.SetWriteDeadline(time.Now().Add(time.Second))
		for k := range 1000 {
			var head [28]byte
			be := binary.BigEndian
			be.PutUint32(head[:], 0x25609513)
			be.PutUint64(head[8:], uint64(k))
			be.PutUint64(head[16:], uint64(k%1000)<<20)
			be.PutUint32(head[24:], 1<<20)
			if _, err := raw.Write(head[:]); err != nil {
				break // it has stopped reading us: right
			}
		}
	}
	during, longest := probe(t, good, 300)
	grown := harness.RSS(n.PID()) - before
	harness.Show("rude clients: 4 that asked for 4 GB and read nothing: +%.0f MiB, another's durable 4K write %.2f ms (%.2f ms without them, longest %.0f ms)",
		megabytes(grown), ms(during), ms(quiet), ms(longest))
	if grown > 400*mib {
		t.Errorf("%.0f MiB held for clients that do not read", megabytes(grown))
	}
	if longest > 2*time.Second {
		t.Errorf("a well-behaved client waited %s", longest)
	}
}

// rawExport negotiates by EXPORT_NAME and leaves the connection to the caller.
func rawExport(addr string, host int, name string) (net.Conn, error) {
	c, err := dialFrom(host, addr)
	if err != nil {
		return nil, err
	}
	be := binary.BigEndian
	msg := be.AppendUint32(nil, 3)
	msg = be.AppendUint64(msg, 0x49484156454f5054)
	msg = be.AppendUint32(msg, 1)
	msg = be.AppendUint32(msg, uint32(len(name)))
	msg = append(msg, name...)
	if _, err := c.Write(msg); err != nil {
		return nil, err
	}
	_, err = io.ReadFull(c, make([]byte, 18+10))
	return c, err
}

// Noise on every port, with true headers before some of it, leaves the node serving and no larger.
func TestRudeNoise(t *testing.T) {
	n := harness.StartNode(t, "--log-level", "error")
	n.CreateDisk(t, "good", "1GiB")
	good := dial(t, n.NBD("good"))
	before := harness.RSS(n.PID())
	noise := make([]byte, 4096)
	be := binary.BigEndian
	heads := [][]byte{
		nil,
		be.AppendUint32(be.AppendUint32(be.AppendUint64(be.AppendUint32(nil, 3), 0x49484156454f5054), 7), 0xffffffff), // an option of 4 GiB
		be.AppendUint32(be.AppendUint32(be.AppendUint64(be.AppendUint32(nil, 1), 0x49484156454f5054), 6), 64),
		be.AppendUint32(nil, 0xffffffff), // a record of 2 GiB
		append(be.AppendUint32(nil, 0x80000200), be.AppendUint32(be.AppendUint32(be.AppendUint32(be.AppendUint32(be.AppendUint32(nil, 7), 0), 2), 100003), 3)...),
		[]byte("GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"),
		{0x16, 0x03, 0x01, 0xff, 0xff, 0x01},
	}
	sent := 0
	for i := range 600 {
		addr := []string{n.NBDAddr(), n.NFSAddr(), fmt.Sprintf("127.0.0.1:%d", n.HTTPSPort)}[i%3]
		c, err := dialFrom(i%100, addr)
		if err != nil {
			continue
		}
		rand.Read(noise)
		c.SetDeadline(time.Now().Add(time.Second))
		c.Write(heads[(i/3)%len(heads)])
		c.Write(noise[:i*7%len(noise)])
		c.Close()
		sent++
	}
	_, longest := probe(t, good, 100)
	grown := harness.RSS(n.PID()) - before
	harness.Show("rude clients: %d connections of noise on the NBD, NFS and HTTPS ports: it serves on, +%.0f MiB, longest durable write %.0f ms", sent, megabytes(grown), ms(longest))
	if n.Ended() {
		t.Fatal("the node ended")
	}
	if grown > 128*mib {
		t.Errorf("%.0f MiB more", megabytes(grown))
	}
}
