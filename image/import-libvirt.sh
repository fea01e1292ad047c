#!/bin/sh
# import-libvirt.sh VARVE.qcow2 [NAME [BRIDGE-OR-NETWORK [STORAGE-NETWORK [DATA-GB [DIR]]]]]
# Makes the appliance's VM with virt-install: the image is copied into DIR (/var/lib/libvirt/images), a data disk is made beside it.
# A network is a libvirt network's name, or bridge:NAME.
set -eu
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "$0"; exit 2; }
image=$1 name=${2:-varve} net=${3:-default} storage=${4:-} data=${5:-64} dir=${6:-/var/lib/libvirt/images}
case $net in bridge:*) net=bridge=${net#bridge:} ;; *) net=network=$net ;; esac
case $storage in '') storage=$net ;; bridge:*) storage=bridge=${storage#bridge:} ;; *) storage=network=$storage ;; esac
for f in "$dir/$name.qcow2" "$dir/$name-data.raw"; do
	[ ! -e "$f" ] || { echo "$f exists already; the data disk of an earlier appliance is attached with virsh attach-disk"; exit 1; }
done
cp --sparse=always "$image" "$dir/$name.qcow2"
truncate -s "${data}G" "$dir/$name-data.raw"
virt-install --name "$name" --import --osinfo debian12 --vcpus 4 --memory 8192 --cpu host-passthrough --autostart --noautoconsole \
	--disk "path=$dir/$name.qcow2,bus=virtio,cache=none,discard=unmap" --disk "path=$dir/$name-data.raw,format=raw,bus=virtio,cache=none,discard=unmap" \
	--network "$net,model=virtio" --network "$storage,model=virtio" --serial pty --graphics vnc --channel unix,target.type=virtio,target.name=org.qemu.guest_agent.0
echo "virsh console $name shows the appliance's address and its set-up code."
