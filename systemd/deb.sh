#!/bin/bash
# deb.sh VERSION OUT.deb: packs bin/varve (or BIN) and the units of a bare host into a Debian package, byte for byte the same from the
# same binary. SOURCE_DATE_EPOCH sets every time in it; without one it is the last commit's.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
version=$1 out=$2 bin=${BIN:-$here/../bin/varve}
: "${SOURCE_DATE_EPOCH:=$(git -C "$here" log -1 --format=%ct)}"
export SOURCE_DATE_EPOCH
tree=$(mktemp -d); trap 'rm -rf "$tree"' EXIT
chmod 755 "$tree"

install -Dm755 "$bin" "$tree/usr/bin/varve"
for unit in "$here"/varve-*.service "$here"/varve-*.socket "$here"/varve.slice; do
	install -Dm644 "$unit" "$tree/lib/systemd/system/${unit##*/}"
done
install -Dm644 "$here/varve.sysusers" "$tree/usr/lib/sysusers.d/varve.conf"
install -Dm644 "$here/varve.env" "$tree/etc/varve/varve.env"
install -Dm644 "$here/../LICENSE" "$tree/usr/share/doc/varve/copyright"
mkdir -p "$tree/DEBIAN"
cp "$here"/debian/{postinst,prerm,postrm} "$tree/DEBIAN/"
chmod 755 "$tree"/DEBIAN/*
echo /etc/varve/varve.env >"$tree/DEBIAN/conffiles"
cat >"$tree/DEBIAN/control" <<END
Package: varve
Version: $version
Architecture: amd64
Maintainer: Varve maintainers <maintainers@varve.invalid>
Section: admin
Priority: optional
Depends: systemd (>= 252), adduser | systemd-sysusers
Recommends: qemu-utils
Installed-Size: $(du -sk --apparent-size "$tree" | cut -f1)
Description: virtual storage appliance: vDisks over NBD and NFS on a log-structured volume driver
 One appliance serves a hypervisor's virtual disks from a directory or an S3 bucket; several form a cluster.
 This package is for a bare KVM host. Its data lies in /var/lib/varve.
END
(cd "$tree" && find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | LC_ALL=C sort -z | xargs -0 md5sum >DEBIAN/md5sums)
find "$tree" -exec touch -hcd "@$SOURCE_DATE_EPOCH" {} +
mkdir -p "$(dirname "$out")"
dpkg-deb --root-owner-group -Zxz -b "$tree" "$out" >/dev/null
