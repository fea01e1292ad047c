package portmap

import (
	"bytes"
	"testing"

	"varve/gateway/nfs/rpc"
	"varve/gateway/nfs/xdr"
)

func words(v ...uint32) (b []byte) {
	for _, w := range v {
		b = xdr.AppendUint32(b, w)
	}
	return b
}

func TestAnswer(t *testing.T) {
	served := []Mapping{{100003, 3, TCP, 2049}, {100005, 3, TCP, 2050}}
	for _, x := range []struct {
		what             string
		prog, vers, proc uint32
		args             []byte
		want             []byte
	}{
		{"null", program, 2, 0, nil, words(0)},
		{"getport", program, 2, 3, words(100003, 3, TCP, 0), words(0, 2049)},
		{"getport of another version", program, 2, 3, words(100005, 1, TCP, 0), words(0, 2050)},
		{"getport over udp", program, 2, 3, words(100003, 3, UDP, 0), words(0, 0)},
		{"getport of what is not served", program, 2, 3, words(100021, 4, TCP, 0), words(0, 0)},
		{"getport cut short", program, 2, 3, words(100021, 4, TCP), words(4)},
		{"set", program, 2, 1, words(100003, 3, TCP, 1), words(0, 0)},
		{"unset", program, 2, 2, words(100003, 3, TCP, 1), words(0, 0)},
		{"dump", program, 2, 4, nil, words(0, 1, 100003, 3, TCP, 2049, 1, 100005, 3, TCP, 2050, 0)},
		{"callit", program, 2, 5, words(100003, 3, 0, 0), words(3)},
		{"version 4", program, 4, 3, nil, words(2, 2, 2)},
		{"another program", 100003, 3, 0, nil, words(1)},
	} {
		got := Answer(append(rpc.AppendCall(nil, 9, x.prog, x.vers, x.proc, rpc.Credentials{}), x.args...), served)
		if want := append(words(9, 1, 0, 0, 0), x.want...); !bytes.Equal(got, want) {
			t.Errorf("%s: % x, want % x", x.what, got, want)
		}
	}
	for n := range 40 {
		if got := Answer(rpc.AppendCall(nil, 9, program, 2, 0, rpc.Credentials{})[:n], served); got != nil {
			t.Errorf("%d bytes of a call got % x", n, got)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add(rpc.AppendCall(nil, 9, program, 2, 3, rpc.Credentials{}))
	f.Add(append(rpc.AppendCall(nil, 9, program, 2, 3, rpc.Credentials{Flavour: 1}), words(100003, 3, TCP, 0)...))
	f.Fuzz(func(t *testing.T, message []byte) {
		reply := Answer(message, []Mapping{{100003, 3, TCP, 2049}})
		if reply != nil && !bytes.Equal(reply[:4], message[:4]) {
			t.Fatal("reply to another xid")
		}
	})
}
