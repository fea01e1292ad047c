package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"varve/test/harness"
)

// nbd-server knows two ways to run: in the foreground, where it serves one connection and ends, and as a daemon that leaves
// its starter. The second is what people use. So that it goes away with the benchmark whatever happens, it runs in a PID
// namespace whose first process is a child of ours: when that one is killed, the kernel ends all the others in it.

// startNBDServer starts nbd-server for an image that exists, on a port and, where socket is not empty, on that too. URIs
// name the socket if there is one.
func startNBDServer(image, socket string) (*server, func(), error) {
	port, err := harness.FreePort()
	if err != nil {
		return nil, nil, err
	}
	generic, uri := "", fmt.Sprintf("nbd://127.0.0.1:%d/bench", port)
	config := image + ".conf"
	if socket != "" {
		config = socket + ".conf"
		generic, uri = "unixsock = "+socket+"\n", unixURI("bench", socket)
	}
	text := fmt.Sprintf("[generic]\nlistenaddr = 127.0.0.1\nport = %d\n%s"+
		"[bench]\nexportname = %s\nflush = true\nfua = true\ntrim = true\n", port, generic, image)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, nil, err
	}
	p, err := harness.Start("unshare", "--pid", "--fork", "--kill-child", "sh", "-c",
		`nbd-server -C "$1" -p "$1.pid" && exec sleep infinity`, "sh", config)
	if err != nil {
		return nil, nil, err
	}
	s := &server{name: nbdSrv, uris: []string{uri}, image: image}
	err = harness.Poll(10*time.Second, func() error {
		if err := answers(p, uri); err != nil {
			return err
		}
		// Its listener; what serves a connection is a child of that, and counted with it.
		s.pids = find(p.PID(), "nbd-server", 4)
		if len(s.pids) == 0 {
			return fmt.Errorf("no process named nbd-server below %d", p.PID())
		}
		return nil
	})
	if err != nil {
		p.Kill()
		return nil, nil, fmt.Errorf("start nbd-server: %w", err)
	}
	return s, p.Kill, nil
}

func unixURI(export, socket string) string {
	return fmt.Sprintf("nbd+unix:///%s?socket=%s", export, socket)
}

// answers asks a server that was started for its export.
func answers(p *harness.Process, uri string) error {
	if p.Ended() {
		return fmt.Errorf("it ended: %s", p.Log())
	}
	_, err := harness.Run(5*time.Second, "nbdinfo", "--size", uri)
	return err
}

// twin starts a second process for what a peer exports, on a unix socket.
func twin(s *server, socket string) (*server, func(), error) {
	var args []string
	switch s.name {
	case nbdSrv:
		return startNBDServer(s.image, socket)
	case qemuWB:
		args = []string{"qemu-nbd", "-f", "raw", "--cache=writeback", "--discard=unmap", "-t", "-e", "16", "-k", socket, s.image}
	case qemuNone:
		args = []string{"qemu-nbd", "-f", "raw", "--cache=none", "--aio=native", "--discard=unmap", "-t", "-e", "16", "-k", socket, s.image}
	case kitFile:
		args = []string{"nbdkit", "-f", "-U", socket, "file", s.image}
	case kitMem:
		args = []string{"nbdkit", "-f", "-U", socket, "memory", strconv.Itoa(areaBytes)}
	default:
		return nil, nil, fmt.Errorf("no twin of %s", s.name)
	}
	p, err := harness.Start(args[0], args[1:]...)
	if err != nil {
		return nil, nil, err
	}
	t := &server{name: s.name, pids: []int{p.PID()}, uris: []string{unixURI("", socket)}, image: s.image}
	if err := harness.Poll(10*time.Second, func() error { return answers(p, t.uris[0]) }); err != nil {
		p.Kill()
		return nil, nil, fmt.Errorf("start %s on %s: %w", s.name, socket, err)
	}
	return t, p.Kill, nil
}

// find gives the topmost descendants of a process that have a name, at most levels below it.
func find(pid int, name string, levels int) []int {
	if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil && strings.TrimSpace(string(comm)) == name {
		return []int{pid}
	}
	if levels == 0 {
		return nil
	}
	var found []int
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range tasks {
		text, _ := os.ReadFile(f) // a process that has ended has no children
		for _, c := range strings.Fields(string(text)) {
			if child, err := strconv.Atoi(c); err == nil {
				found = append(found, find(child, name, levels-1)...)
			}
		}
	}
	return found
}
