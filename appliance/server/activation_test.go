package server

import (
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// A process is handed sockets from descriptor 3 on; so this test runs itself again as that process.
func TestHandedOverSockets(t *testing.T) {
	if os.Getenv("VARVE_HANDED_OVER") != "" {
		os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
		streams, datagrams, err := handedOver()
		if err != nil {
			t.Fatal(err)
		}
		if len(streams[portmapSocket]) != 1 || len(datagrams[portmapSocket]) != 1 || len(streams["nbd"]) != 1 || len(streams) != 2 {
			t.Fatalf("streams %v, datagrams %v", streams, datagrams)
		}
		if os.Getenv("LISTEN_FDS") != "" {
			t.Error("children would take the sockets for theirs")
		}
		return
	}
	listen := func() *os.File {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		f, err := ln.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	datagram, err := pc.(*net.UDPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer datagram.Close()
	child := exec.Command(os.Args[0], "-test.run", "^TestHandedOverSockets$", "-test.v")
	child.ExtraFiles = []*os.File{listen(), datagram, listen()}
	child.Env = append(os.Environ(), "VARVE_HANDED_OVER=1", "LISTEN_FDS=3", "LISTEN_FDNAMES=portmap:portmap:nbd")
	out, err := child.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Fatalf("%v\n%s", err, out)
	}
}
