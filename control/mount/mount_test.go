package mount

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"varve/control/state"
)

func export() Export {
	return Export{VPool: "default", Address: "10.0.0.7", Port: 2049, NBDPort: 10809, Portmap: true, Clients: []string{"10.0.0.0/8"}}
}

// What decides whether a mount works is in the commands.
func TestCommands(t *testing.T) {
	for target, want := range map[string][]string{
		"esxi":    {"esxcli storage nfs add --host=10.0.0.7 --share=/default --volume-name=default"},
		"vcenter": {"varve mount apply default --pmachine vc1 --address 10.0.0.7", "New-Datastore -Nfs", "govc datastore.create -type nfs"},
		"pve":     {"pvesm add nfs default --server 10.0.0.7 --export /default --content images --options vers=3,hard", "showmount --no-headers --exports 10.0.0.7"},
		"libvirt": {"<pool type='netfs'>", "<host name='10.0.0.7'/>", "<dir path='/default'/>", "<protocol ver='3'/>", "virsh pool-autostart default"},
		"xcp":     {"device-config:server=10.0.0.7", "device-config:serverpath=/default", "options=hard"},
		"qemu":    {"server.host=10.0.0.7,server.port=10809,export=default/DISK", "reconnect-delay"},
		"linux":   {"mount -t nfs -o vers=3,hard,proto=tcp,nolock,nconnect=4,noatime 10.0.0.7:/default /mnt/default"},
		"k8s":     {"server: 10.0.0.7", "share: /default", "  - nfsvers=3", "  - hard"},
	} {
		h, err := Commands(target, export())
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range want {
			if !strings.Contains(h.Script(), w) {
				t.Errorf("%s lacks %s:\n%s", target, w, h.Script())
			}
		}
		if len(h.Problems) != 0 {
			t.Errorf("%s: %v", target, h.Problems)
		}
		if text, err := exec.CommandContext(t.Context(), "bash", "-n", "-c", h.Script()).CombinedOutput(); err != nil && target != "qemu" {
			t.Errorf("%s is no script: %s\n%s", target, text, h.Script())
		}
	}
}

// A port that a hypervisor cannot be told is said, not left out.
func TestProblems(t *testing.T) {
	e := export()
	e.Port, e.Portmap = 12049, false
	for _, target := range Targets() {
		h, err := Commands(target, e)
		if err != nil {
			t.Fatal(err)
		}
		cannot := target == "esxi" || target == "vcenter" || target == "xcp" || target == "pve"
		if (len(h.Problems) > 0) != cannot {
			t.Errorf("%s: %v", target, h.Problems)
		}
		if (target == "linux" || target == "libvirt") && !strings.Contains(h.Script(), "port=12049,mountport=12049,mountproto=tcp") {
			t.Errorf("%s:\n%s", target, h.Script())
		}
		if target == "k8s" && !strings.Contains(h.Script(), "  - mountport=12049") {
			t.Errorf("%s:\n%s", target, h.Script())
		}
	}
	e = export()
	e.Address, e.Clients = "127.0.0.1", nil
	if h, err := Commands("esxi", e); err != nil || len(h.Problems) != 2 {
		t.Errorf("%v %v", h.Problems, err)
	}
	e.Address = "fd00::7"
	if h, err := Commands("linux", e); err != nil || !strings.Contains(h.Script(), "[fd00::7]:/default") {
		t.Errorf("%v\n%s", err, h.Script())
	}
}

// An address becomes part of a command that somebody pastes as root.
func TestAddresses(t *testing.T) {
	for i, bad := range []string{"", "a b", "$(reboot)", "a;b", "-o", "a'b", "a\nb", "a/b", strings.Repeat("a", 300), "1.2.3.4 "} {
		e := export()
		e.Address = bad
		if _, err := Commands("linux", e); !errors.Is(err, state.ErrInvalid) {
			t.Errorf("%d %q: %v", i, bad, err)
		}
	}
	if _, err := Commands("hyperv", export()); !errors.Is(err, state.ErrInvalid) {
		t.Error(fmt.Sprint(err))
	}
}
