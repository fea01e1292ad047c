#!/bin/bash
# setup.sh go:       installs Go if there is none, or one older than 1.21 (root).
# setup.sh node:     makes .cache/node if there is no Node.js that the console can be built with (root only for Debian's npm).
# setup.sh packages: installs the Debian 12 packages that the tests and benchmarks use and that are missing (root).
# setup.sh image:    installs what building and booting the appliance's image takes (root).
# setup.sh bench:    builds what only the benchmarks use (JuiceFS); bench-packages installs it (s3backer; root).
# setup.sh cache:    fills .cache/ with what is made or fetched: the guest's kernel, fio with the nfs engine, an S3 server, promtool.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=$PWD/.cache
mkdir -p "$cache"

PACKAGES="make gcc libc6-dev patch dpkg-dev xz-utils
	qemu-system-x86 qemu-utils qemu-block-extra seabios ipxe-qemu
	nbdkit nbd-server nbd-client libnbd-bin fio
	libnfs-utils libnfs-dev libnbd-dev libaio-dev zlib1g-dev pkg-config curl jq
	rabbitmq-server memcached libvirt-daemon libvirt-clients
	nfs-common nfs-ganesha nfs-ganesha-vfs rpcbind iproute2 util-linux
	chromium
	busybox-static kmod systemd e2fsprogs dosfstools mtools syslinux syslinux-common xfsprogs fdisk"

IMAGE_PACKAGES="mmdebstrap squashfs-tools fdisk dosfstools mtools grub-common grub-pc-bin zstd qemu-utils dpkg-dev xz-utils
	systemd ovmf xorriso"

packages() {
	local missing=() p
	for p in ${*:-$PACKAGES}; do
		dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q ' installed$' || missing+=("$p")
	done
	[ ${#missing[@]} = 0 ] && return
	echo "installing ${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	# A service that starts by itself would take ports and leave processes behind.
	local policy=/usr/sbin/policy-rc.d mine=
	[ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; mine=1; }
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$cache/apt.log" 2>&1 || { tail -20 "$cache/apt.log"; exit 1; }
	[ -z "$mine" ] || rm -f $policy
}

# The cloud flavour is small (27 MB), boots fast and has nbd, nfs and virtio.
kernel() {
	[ -s "$cache/guest/vmlinuz" ] && [ -d "$cache/guest/modules" ] && return
	local work; work=$(mktemp -d)
	local name; name=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ {print $2; exit}')
	if [ -z "$name" ]; then
		echo "no linux-image-cloud-amd64 in the package lists: run apt-get update"; exit 1
	fi
	echo "fetching the guest's kernel $name"
	(cd "$work" && apt-get -o APT::Sandbox::User=root download -qq "$name" && dpkg-deb -x "$name"_*.deb root)
	mkdir -p "$cache/guest"
	rm -rf "$cache/guest/modules" "$cache/guest/vmlinuz"
	local version; version=$(ls "$work/root/lib/modules")
	depmod -b "$work/root" "$version"
	mv "$work/root/lib/modules/$version" "$cache/guest/modules"
	echo "$version" >"$cache/guest/version"
	cp "$work/root/boot/vmlinuz-$version" "$cache/guest/vmlinuz"
	rm -rf "$work"
}

# Debian's fio is built without libnfs; its source package has the engine, which lacks COMMIT: the patch adds it.
fio_nfs() {
	local patch=$PWD/test/fio-nfs.patch
	[ -x "$cache/fio-nfs" ] && [ "$cache/fio-nfs" -nt "$patch" ] && return
	echo "building fio with the nfs engine"
	local work; work=$(mktemp -d)
	local version; version=$(dpkg-query -W -f '${source:Version}' fio)
	local mirror; mirror=$(apt-cache policy fio | grep -oE 'https?://[^ ]+' | head -1)
	mkdir -p "$work/lists/partial"
	echo "deb-src ${mirror:-http://deb.debian.org/debian} bookworm main" >"$work/sources.list"
	local apt=(-qq -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
		-o "Dir::State::Lists=$work/lists" -o APT::Sandbox::User=root -o Acquire::Languages=none)
	(
		cd "$work"
		apt-get "${apt[@]}" update
		apt-get "${apt[@]}" --download-only source "fio=$version" >/dev/null
		dpkg-source -x fio_*.dsc src >/dev/null
		cd src
		patch -s -p1 <"$patch"
		./configure --enable-libnfs --disable-native >configure.log 2>&1
		make -j"$(nproc)" >make.log 2>&1 || { tail -20 make.log; exit 1; }
		./fio --enghelp | grep -qw nfs
		install -m 755 fio "$cache/fio-nfs.new" && mv "$cache/fio-nfs.new" "$cache/fio-nfs"
	)
	rm -rf "$work"
}

# What checks the alert rules: one program of Debian's prometheus, whose service nobody here wants.
promtool() {
	[ -x "$cache/promtool" ] && return
	echo "fetching promtool"
	local work; work=$(mktemp -d)
	(cd "$work" && apt-get -o APT::Sandbox::User=root download -qq prometheus && dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool)
	install -m 755 "$work/usr/bin/promtool" "$cache/promtool.new" && mv "$cache/promtool.new" "$cache/promtool"
	rm -rf "$work"
}

# A real S3 server, for the S3 backend's tests.
versitygw() {
	[ -x "$cache/versitygw" ] && return
	echo "building versitygw"
	local work; work=$(mktemp -d)
	GOFLAGS= CGO_ENABLED=0 GOBIN="$work" go install github.com/versity/versitygw/cmd/versitygw@v1.8.0
	install -m 755 "$work/versitygw" "$cache/versitygw.new" && mv "$cache/versitygw.new" "$cache/versitygw"
	rm -rf "$work"
}

# Beside what ours is measured on S3. It takes some minutes to build, and nothing but the benchmarks uses it.
juicefs() {
	[ -x "$cache/juicefs" ] && return
	echo "building JuiceFS"
	local work; work=$(mktemp -d)
	local dir; dir=$(cd "$work" && GOFLAGS= go mod download -json github.com/juicedata/juicefs@v1.2.0 | sed -n 's/^[[:space:]]*"Dir": "\(.*\)",$/\1/p')
	cp -r "$dir" "$work/src"
	chmod -R u+w "$work/src"
	local tags="nogateway nowebdav nocos nobos nohdfs noibmcos noobs nooss noqingstor noscs nosftp noswift noupyun noazure nogs noufile nob2 nonfs
		nodragonfly nomysql nopg notikv noetcd nosqlite"
	(
		cd "$work/src"
		GOFLAGS= go get github.com/grafana/pyroscope-go/godeltaprof@v0.1.8 # what it names does not build with today's Go
		GOFLAGS= go build -mod=mod -trimpath -buildvcs=false -tags "$(echo $tags)" -ldflags '-s -w' -o "$cache/juicefs.new" .
	)
	mv "$cache/juicefs.new" "$cache/juicefs"
	rm -rf "$work"
}

# Go from Debian's backports: bookworm's own is too old to fetch the toolchain that go.mod names.
golang() {
	local have; have=$(go env GOVERSION 2>/dev/null | sed -n 's/^go1\.\([0-9]*\).*/\1/p')
	[ "${have:-0}" -ge 21 ] && return
	echo "installing Go from bookworm-backports"
	export DEBIAN_FRONTEND=noninteractive
	printf 'Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm-backports\nComponents: main\nSigned-By: %s\n' \
		/usr/share/keyrings/debian-archive-keyring.gpg >/etc/apt/sources.list.d/varve-backports.sources
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends -t bookworm-backports golang-go ca-certificates git >"$cache/apt-go.log" 2>&1 ||
		{ tail -20 "$cache/apt-go.log"; exit 1; }
}

# Node.js for the console. Debian's own is older than the console's tools take; its npm fetches one that is not.
node() {
	local dir=$cache/node version
	for n in "$dir/bin/node" /usr/bin/node /usr/local/bin/node; do
		[ -x "$n" ] || continue
		version=$("$n" -p 'const [a, b] = process.versions.node.split(".").map(Number); (a == 20 && b >= 19) || (a == 22 && b >= 12) || a > 22')
		[ "$version" = true ] && command -v npm >/dev/null && return
	done
	if ! command -v npm >/dev/null; then
		echo "installing npm"
		local sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
		$sudo apt-get update -qq
		$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends npm >"$cache/apt-npm.log" 2>&1 || { tail -20 "$cache/apt-npm.log"; exit 1; }
	fi
	echo "fetching Node.js"
	local arch=x64; [ "$(uname -m)" = aarch64 ] && arch=arm64
	mkdir -p "$dir/bin"
	npm install --prefix "$dir" --no-audit --no-fund --loglevel=error "node-linux-$arch@22.23.3" npm@11.19.1 >"$cache/npm-node.log" 2>&1 || { tail -20 "$cache/npm-node.log"; exit 1; }
	ln -sf "../node_modules/node-linux-$arch/bin/node" "$dir/bin/node"
	ln -sf ../node_modules/npm/bin/npm-cli.js "$dir/bin/npm"
	"$dir/bin/node" -v
}

case ${1:-} in
go) golang ;;
node) node ;;
packages) packages ;;
image) packages $IMAGE_PACKAGES ;;
bench-packages) packages s3backer fuse ;;
bench) juicefs ;;
cache) kernel; fio_nfs; versitygw; promtool ;;
*) sed -n '2,7s/^# //p' "$0"; exit 2 ;;
esac
