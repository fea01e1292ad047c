package image

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"time"
)

// Exec runs a shell script in the machine, as root, through its QEMU guest agent, and gives what it printed. A machine that is
// starting is waited for.
func (m *Machine) Exec(limit time.Duration, script string) (string, error) {
	deadline := time.Now().Add(limit)
	for {
		a, err := dialAgent(m.agent(), time.Now().Add(min(10*time.Second, time.Until(deadline))))
		if err == nil {
			out, err := a.run(script, deadline)
			return out, errors.Join(err, a.Close())
		}
		if time.Now().After(deadline) || m.process.Ended() {
			return "", fmt.Errorf("the guest agent does not answer: %w", err)
		}
		time.Sleep(250 * time.Millisecond)
	}
}

// agent is a connection to a guest agent (docs/interop/qemu-ga): a JSON document a line, either way.
type agent struct {
	net.Conn
	lines *bufio.Reader
}

const agentLineBytesMax = 64 << 20

func dialAgent(path string, deadline time.Time) (*agent, error) {
	c, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	a := &agent{c, bufio.NewReader(io.LimitReader(c, agentLineBytesMax))}
	if err := a.SetDeadline(deadline); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	// What an earlier connection was answered too late comes first.
	id := rand.Int32()
	if err := a.send("guest-sync", map[string]any{"id": id}); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	for {
		var got int32
		if err := a.receive(&got); err == nil && got == id {
			return a, nil
		} else if errors.Is(err, errConnection) {
			return nil, errors.Join(err, c.Close())
		}
	}
}

func (a *agent) send(command string, arguments any) error {
	b, err := json.Marshal(map[string]any{"execute": command, "arguments": arguments})
	if err != nil {
		return err
	}
	_, err = a.Write(append(b, '\n'))
	return err
}

var errConnection = errors.New("no answer from the guest agent")

func (a *agent) receive(into any) error {
	line, err := a.lines.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("%w: %w", errConnection, err)
	}
	var answer struct {
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Desc string `json:"desc"`
		} `json:"error"`
	}
	if err := json.Unmarshal(line, &answer); err != nil {
		return err
	}
	if answer.Error != nil {
		return errors.New("guest agent: " + answer.Error.Desc)
	}
	return json.Unmarshal(answer.Return, into)
}

func (a *agent) run(script string, deadline time.Time) (string, error) {
	if err := a.SetDeadline(deadline); err != nil {
		return "", err
	}
	err := a.send("guest-exec", map[string]any{"path": "/bin/sh", "arg": []string{"-c", script}, "capture-output": true,
		"env": []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "VARVE_DATA=/var/lib/varve"}})
	if err != nil {
		return "", err
	}
	var started struct {
		PID int `json:"pid"`
	}
	if err := a.receive(&started); err != nil {
		return "", err
	}
	for {
		if err := a.send("guest-exec-status", map[string]any{"pid": started.PID}); err != nil {
			return "", err
		}
		var st struct {
			Exited bool   `json:"exited"`
			Code   int    `json:"exitcode"`
			Signal int    `json:"signal"`
			Out    []byte `json:"out-data"`
			Err    []byte `json:"err-data"`
		}
		if err := a.receive(&st); err != nil {
			return "", err
		}
		switch {
		case !st.Exited:
			time.Sleep(200 * time.Millisecond)
		case st.Code != 0 || st.Signal != 0:
			return string(st.Out), fmt.Errorf("%s: exit status %d, signal %d: %s", script, st.Code, st.Signal, strings.TrimSpace(string(st.Err)))
		default:
			return string(st.Out), nil
		}
	}
}
