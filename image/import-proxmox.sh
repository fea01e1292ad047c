#!/bin/sh
# import-proxmox.sh VARVE.qcow2 VMID [STORAGE [BRIDGE [STORAGE-BRIDGE [DATA-GB]]]]
# Makes the appliance's VM on this Proxmox VE host, with what importing the OVA leaves out: the data disk, the serial console and the
# second network. Run it on the host itself, as root.
set -eu
[ $# -ge 2 ] || { sed -n '2,4s/^# //p' "$0"; exit 2; }
image=$1 id=$2 storage=${3:-local-lvm} bridge=${4:-vmbr0} storage_bridge=${5:-${4:-vmbr0}} data=${6:-64}
[ -r "$image" ] || { echo "$image cannot be read"; exit 1; }
! qm status "$id" >/dev/null 2>&1 || { echo "there is a VM $id already"; exit 1; }
qm create "$id" --name varve --ostype l26 --cpu host --cores 4 --memory 8192 --balloon 0 --scsihw virtio-scsi-single --agent enabled=1 \
	--net0 "virtio,bridge=$bridge" --net1 "virtio,bridge=$storage_bridge" --serial0 socket --vga std --onboot 1 --startup order=1
qm set "$id" --scsi0 "$storage:0,import-from=$(readlink -f "$image"),iothread=1,discard=on" --boot order=scsi0
qm set "$id" --scsi1 "$storage:$data,iothread=1,discard=on"
echo "VM $id is made. qm start $id; qm terminal $id shows the appliance's address and its set-up code."
