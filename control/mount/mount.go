// Package mount says how a hypervisor mounts a vPool: the commands that an administrator pastes, with this cluster's addresses and
// the options that are right for that hypervisor, and what would keep it from working.
//
//	help, err := mount.Commands("esxi", mount.Export{VPool: "default", Address: "10.0.0.7", Port: 2049, …})
//
// The rules that hold for all: server and share must be spelled the same on every host, or they count as two datastores; NFS
// version 3 over TCP; hard, so that a failover is a pause and not an I/O error in guests; no squash of root. ESXi, vCenter and
// XenServer ask the portmapper on port 111 and know no other way to a server on another port.
package mount

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"varve/control/hypervisor"
	"varve/control/state"
)

// Export is a vPool as others reach it.
type Export struct {
	VPool string
	// Address is the appliance's, Port NFS's and NBDPort NBD's.
	Address       string
	Port, NBDPort int
	// Portmap says that the portmapper answers on port 111.
	Portmap bool
	// Clients are the networks that may mount it.
	Clients []string
}

// Step is one thing to do.
type Step struct{ Title, Where, Command string }

// Help is all that there is to do, to mind, and in the way.
type Help struct {
	Steps    []Step
	Notes    []string
	Problems []string
}

// Script is the commands as one script.
func (h Help) Script() string {
	var b strings.Builder
	for _, s := range h.Steps {
		fmt.Fprintf(&b, "# %s", s.Title)
		if s.Where != "" {
			fmt.Fprintf(&b, " (%s)", s.Where)
		}
		fmt.Fprintf(&b, "\n%s\n\n", strings.TrimRight(s.Command, "\n"))
	}
	return strings.TrimRight(b.String(), "\n") + "\n"
}

// Targets are what Commands knows.
func Targets() []string {
	return []string{"esxi", "vcenter", "pve", "libvirt", "xcp", "qemu", "linux", "k8s"}
}

const (
	nfsPort     = 2049
	portmapPort = 111
)

var hostName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,253}[A-Za-z0-9])?$`)

// CheckAddress refuses what is neither an address nor a host's name: it becomes part of commands.
func CheckAddress(address string) error {
	if _, err := netip.ParseAddr(address); err == nil {
		return nil
	}
	if !hostName.MatchString(address) {
		return &state.Error{Err: state.ErrInvalid, Object: fmt.Sprintf("address %.80q", address), Detail: "neither an IP address nor the name of a host",
			Remedy: "give the address of the appliance as the hypervisor reaches it"}
	}
	return nil
}

// Commands says how a target mounts an export.
func Commands(target string, e Export) (Help, error) {
	if err := CheckAddress(e.Address); err != nil {
		return Help{}, err
	}
	f, ok := map[string]func(Export) Help{"esxi": esxi, "vcenter": vcenter, "pve": pve, "libvirt": libvirt, "xcp": xcp, "qemu": qemu,
		"linux": linux, "k8s": k8s}[target]
	if !ok {
		return Help{}, &state.Error{Err: state.ErrInvalid, Object: fmt.Sprintf("hypervisor %.40q", target), Detail: "is not known",
			Remedy: "use one of " + strings.Join(Targets(), ", ")}
	}
	h := f(e)
	h.Problems = append(h.Problems, e.problems(target)...)
	return h, nil
}

// problems are what would keep the commands from working.
func (e Export) problems(target string) []string {
	var out []string
	if a, err := netip.ParseAddr(e.Address); err == nil && a.IsLoopback() && target != "linux" && target != "libvirt" && target != "qemu" {
		out = append(out, e.Address+" is the appliance itself: give the address that the hypervisor reaches it by with --address")
	}
	needsPortmap := slices.Contains([]string{"esxi", "vcenter", "xcp", "pve"}, target)
	if needsPortmap && e.Port != nfsPort {
		out = append(out, fmt.Sprintf("NFS is on port %d, and this hypervisor knows only %d: start the appliance with --nfs :%d", e.Port, nfsPort, nfsPort))
	}
	if needsPortmap && !e.Portmap {
		out = append(out, fmt.Sprintf("nobody answers on port %d: start the appliance with --portmap :%d, this hypervisor finds NFS by it", portmapPort, portmapPort))
	}
	if len(e.Clients) == 0 {
		out = append(out, "nobody may mount this vPool: varve vpool set "+e.VPool+" --client NETWORK")
	}
	return out
}

// local is a name as shells and files take it; vPools' names need no quotes.
func (e Export) share() string { return "/" + e.VPool }

// host is the address where a colon follows: IPv6 in brackets.
func (e Export) host() string {
	if a, err := netip.ParseAddr(e.Address); err == nil && a.Is6() {
		return "[" + e.Address + "]"
	}
	return e.Address
}

// ports are the mount options for NFS on another port than everybody's, or without a portmapper.
func (e Export) ports() string {
	if e.Port == nfsPort && e.Portmap {
		return ""
	}
	p := strconv.Itoa(e.Port)
	return ",port=" + p + ",mountport=" + p + ",mountproto=tcp"
}

const (
	noteSame   = "Spell server and share the same on every host: another spelling is another datastore, and VMs cannot move between the two."
	noteRoot   = "Root is not squashed; who may mount is the vPool's list of networks: varve vpool show, varve vpool set --client."
	noteSelf   = "The appliance's own VM must lie on the host's local storage, never on a datastore that it serves, and start before VMs that do."
	noteProof  = "Afterwards: varve mount test %s --host ADDRESS-OF-THE-HOST waits until that host has mounted and written."
	noteLocks  = "Locks stay on the host (nolock): two hosts must not open one disk at a time unless something else keeps them apart."
	noteHard   = "hard: while the appliance restarts or fails over, guests wait; with soft they would get I/O errors."
	noteVAAI   = "Clones made by the hypervisor copy through the host; varve vmachine clone and vdisk clone do not copy."
	noteKernel = "nconnect needs Linux 5.3."
)

func proof(e Export) string { return fmt.Sprintf(noteProof, e.VPool) }

func esxi(e Export) Help {
	return Help{Steps: []Step{
		{"Let the host speak NFS", "ESXi shell or SSH, each host", "esxcli network firewall ruleset set --ruleset-id=nfsClient --enabled=true"},
		{"Reach the appliance by the storage network", "ESXi shell", "vmkping " + e.Address},
		{"Mount the datastore", "ESXi shell, each host", fmt.Sprintf("esxcli storage nfs add --host=%s --share=%s --volume-name=%s", e.Address, e.share(), e.VPool)},
		{"Look at it", "ESXi shell", "esxcli storage nfs list"},
		{"To remove it again", "ESXi shell", "# esxcli storage nfs remove --volume-name=" + e.VPool},
	}, Notes: []string{noteSame, "In the Host Client: Storage > Datastores > New datastore > Mount NFS datastore; name " + e.VPool + ", server " + e.Address +
		", share " + e.share() + ", NFS 3. Never mount the same share as NFS 4.1 too.", "A VMkernel port has to be on the storage network; by default a host mounts 8 NFS datastores (NFS.MaxVolumes).",
		noteSelf, noteRoot, noteVAAI, proof(e)}}
}

func vcenter(e Export) Help {
	return Help{Steps: []Step{
		{"By the appliance itself, once the vCenter is known to it", "any shell with varve", "varve pmachine add vc1 --kind vsphere --address https://VCENTER --user administrator@vsphere.local\n" +
			fmt.Sprintf("varve mount apply %s --pmachine vc1 --address %s", e.VPool, e.Address)},
		{"Or by govc, all hosts of a cluster", "any shell with govc", fmt.Sprintf("# govc datastore.create -type nfs -name %s -remote-host %s -remote-path %s CLUSTER", e.VPool, e.Address, e.share())},
		{"Or by PowerCLI", "PowerShell", fmt.Sprintf("# Get-Cluster CLUSTER | Get-VMHost | New-Datastore -Nfs -Name %s -NfsHost %s -Path %s", e.VPool, e.Address, e.share())},
	}, Notes: []string{noteSame, noteSelf, "Keep the appliances out of DRS and HA: each belongs to its host.", noteRoot, noteVAAI, proof(e)}}
}

func pve(e Export) Help {
	return Help{Steps: []Step{
		{"See that the export is visible", "shell of a Proxmox node", "showmount --no-headers --exports " + e.Address},
		{"Add the storage, for the whole Proxmox cluster", "shell of a Proxmox node",
			fmt.Sprintf("pvesm add nfs %s --server %s --export %s --content images --options vers=3,hard,proto=tcp,nolock", e.VPool, e.Address, e.share())},
		{"Look at it", "shell of a Proxmox node", "pvesm status --storage " + e.VPool},
		{"To remove it again", "shell of a Proxmox node", "# pvesm remove " + e.VPool},
	}, Notes: []string{"Use the raw format for disks: a .raw file is a vDisk, with snapshots and clones of its own. A qcow2 file is only a file.",
		"Proxmox checks the storage with showmount, which needs the portmapper.", noteHard, noteLocks, noteRoot, proof(e)}}
}

func libvirt(e Export) Help {
	pool := hypervisor.PoolXML(hypervisor.Mount{Name: e.VPool, Server: e.Address, Export: e.share(), Path: hypervisor.PoolPath(e.VPool)})
	steps := []Step{
		{"Define the storage pool", "shell of the host, as root", "cat > /tmp/" + e.VPool + "-pool.xml <<'END'\n" + pool + "END\nvirsh pool-define /tmp/" + e.VPool + "-pool.xml"},
		{"Mount it, now and at each start", "shell of the host", fmt.Sprintf("virsh pool-build %s\nvirsh pool-start %s\nvirsh pool-autostart %s", e.VPool, e.VPool, e.VPool)},
		{"Attach a vDisk to a VM", "shell of the host", fmt.Sprintf("# virsh attach-disk VM %s/DISK.raw vdb --driver qemu --subdriver raw --cache none --io native --persistent",
			hypervisor.PoolPath(e.VPool))},
		{"To remove it again", "shell of the host", fmt.Sprintf("# virsh pool-destroy %s\n# virsh pool-undefine %s", e.VPool, e.VPool)},
	}
	notes := []string{"Give disks cache=none and format raw: the appliance caches, and a .raw file is a vDisk.",
		"A domain's XML beside its disks on the vPool, or varve pmachine add --kind libvirt, makes it a VM that varve vmachine list shows.",
		"By NBD instead of a mount: varve mount command " + e.VPool + " --for qemu.", noteRoot, proof(e)}
	if e.ports() != "" {
		steps[1] = Step{"Mount it: a pool of type netfs takes no port, so a plain mount and a pool of type dir", "shell of the host, as root", fmt.Sprintf(
			"mkdir -p %s\nmount -t nfs -o vers=3,hard,proto=tcp,nolock,noatime%s %s:%s %s\nvirsh pool-define-as %s dir --target %s\nvirsh pool-start %s",
			hypervisor.PoolPath(e.VPool), e.ports(), e.host(), e.share(), hypervisor.PoolPath(e.VPool), e.VPool, hypervisor.PoolPath(e.VPool), e.VPool)}
		steps = steps[1:]
	}
	return Help{Steps: steps, Notes: notes}
}

func xcp(e Export) Help {
	return Help{Steps: []Step{
		{"Make the storage repository, for the whole pool", "console of the pool's master", fmt.Sprintf("xe sr-create type=nfs shared=true content-type=user name-label=%s "+
			"device-config:server=%s device-config:serverpath=%s device-config:nfsversion=3 device-config:options=hard,nolock", e.VPool, e.Address, e.share())},
		{"Look at it", "console of the pool's master", "xe sr-list name-label=" + e.VPool},
	}, Notes: []string{"Without options=hard the mount is soft, and a failover turns guests' file systems read-only (xcp-ng issue 334).",
		"The repository keeps VHD files in a directory of its own: snapshots and clones of vDisks are not those of its VMs. Chains of VHDs end at 30.", noteRoot, proof(e)}}
}

func qemu(e Export) Help {
	addr := fmt.Sprintf("server.type=inet,server.host=%s,server.port=%d", e.Address, e.NBDPort)
	return Help{Steps: []Step{
		{"Make a vDisk", "any shell with varve", fmt.Sprintf("varve vdisk create %s/DISK --size 20GiB", e.VPool)},
		{"Attach it to a new VM by NBD", "shell of the host", fmt.Sprintf("qemu-system-x86_64 … \\\n  -blockdev driver=nbd,node-name=d0,%s,export=%s/DISK,reconnect-delay=60,cache.direct=on \\\n"+
			"  -device virtio-blk-pci,drive=d0", addr, e.VPool)},
		{"Or to a running one", "its monitor", fmt.Sprintf("# drive_add 0 if=none,id=d0,format=raw,file=nbd://%s:%d/%s/DISK\n# device_add virtio-blk-pci,drive=d0", e.host(), e.NBDPort, e.VPool)},
		{"Look at it", "shell of the host", fmt.Sprintf("qemu-img info nbd://%s:%d/%s/DISK", e.host(), e.NBDPort, e.VPool)},
	}, Notes: []string{"reconnect-delay keeps a guest waiting, not failing, while the appliance restarts.", "One vDisk is for one VM at a time.",
		"NBD is not encrypted unless the appliance runs with --nbd-tls."}}
}

func linux(e Export) Help {
	options := "vers=3,hard,proto=tcp,nolock,nconnect=4,noatime" + e.ports()
	return Help{Steps: []Step{
		{"Mount it", "shell of the host, as root", fmt.Sprintf("mkdir -p /mnt/%s\nmount -t nfs -o %s %s:%s /mnt/%s", e.VPool, options, e.host(), e.share(), e.VPool)},
		{"And at each start", "/etc/fstab", fmt.Sprintf("# %s:%s /mnt/%s nfs %s,_netdev 0 0", e.host(), e.share(), e.VPool, options)},
		{"A file called *.raw is a vDisk", "shell of the host", fmt.Sprintf("# truncate -s 20G /mnt/%s/DISK.raw", e.VPool)},
		{"To unmount it", "shell of the host", "# umount /mnt/" + e.VPool},
	}, Notes: []string{noteHard, noteLocks, noteKernel, noteRoot, "Hyper-V keeps no disks on NFS: attach vDisks to its guests by NBD inside them.", proof(e)}}
}

func k8s(e Export) Help {
	options := []string{"nfsvers=3", "hard", "nolock", "noatime"}
	if p := strings.TrimPrefix(e.ports(), ","); p != "" {
		options = append(options, strings.Split(p, ",")...)
	}
	var list strings.Builder
	for _, o := range options {
		fmt.Fprintf(&list, "  - %s\n", o)
	}
	return Help{Steps: []Step{
		{"The NFS driver, if the cluster has none", "kubectl", "# helm repo add csi-driver-nfs https://raw.githubusercontent.com/kubernetes-csi/csi-driver-nfs/master/charts\n" +
			"# helm install csi-driver-nfs csi-driver-nfs/csi-driver-nfs --namespace kube-system"},
		{"A storage class", "kubectl", fmt.Sprintf("kubectl apply -f - <<'END'\napiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata:\n  name: varve-%s\n"+
			"provisioner: nfs.csi.k8s.io\nparameters:\n  server: %s\n  share: %s\nreclaimPolicy: Delete\nvolumeBindingMode: Immediate\nmountOptions:\n%sEND",
			e.VPool, e.Address, e.share(), list.String())},
	}, Notes: []string{"A volume is a directory of the vPool; its files are not vDisks and have no snapshots of their own.", noteHard, noteLocks, noteRoot}}
}

// Check is one thing that a test of a mount found.
type Check struct {
	Name   string
	OK     bool
	Detail string
	Took   time.Duration
	Remedy string
}
