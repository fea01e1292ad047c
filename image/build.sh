#!/bin/bash
# build.sh: makes the appliance's image in build/image from Debian packages; no hypervisor, no loop devices, no network beyond
# the Debian mirror. Run by `make image`, as root (mmdebstrap installs packages in a chroot).
#
#	rootfs    mmdebstrap: packages, varve's own package, image/root, the initrd      -> root.squashfs (what an update writes)
#	esp       shim and GRUB as Debian signed them, grub.cfg, the boot counter        -> esp.img
#	disk      GPT: BIOS boot | ESP | slot a | slot b (empty) | state (ext4)          -> varve.raw
#	outputs   OVA with our own VMDK, qcow2, raw.zst, SBOM, import scripts, SHA256SUMS
#
# The same sources and the same packages give the same bytes: every time is SOURCE_DATE_EPOCH, every id is fixed, nothing is
# named after this machine. Which packages went in is in the SBOM; MIRROR may name a day of snapshot.debian.org to get them again.
#
#	MIRROR    http://deb.debian.org/debian          VERSION   as varve version says it
#	UPDATE_KEYS  file with the public keys that updates may be signed with (default: the keys in image/root/etc/varve)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
top=$(dirname "$here")
out=${OUT:-$top/build/image}
: "${VERSION:?}" "${MIRROR:=http://deb.debian.org/debian}"
: "${SECURITY:=http://deb.debian.org/debian-security}"
: "${SOURCE_DATE_EPOCH:=$(git -C "$top" log -1 --format=%ct)}"
export SOURCE_DATE_EPOCH VERSION TZ=UTC LC_ALL=C.UTF-8 PATH=$PATH:/usr/sbin:/sbin
umask 022

MIB=$((1 << 20))
# First MiB and size in MiB of each partition; the disk ends a MiB after the last, for the second GPT.
BIOS=(1 1) ESP=(2 256) SLOT_A=(258 1536) SLOT_B=(1794 1536) STATE=(3330 4861)
DISK_MIB=8192
uuid() { printf '56415256-0000-4000-8000-%012d' "$1"; } # the same in every image: a VM has one system disk

say() { printf '== %s\n' "$*"; }

rootfs() {
	rm -rf "$out/rootfs" "$out/efi"
	mkdir -p "$out/efi"
	local packages; packages=$(sed 's/#.*//' "$here/packages" | tr -s '\n' ,)
	local exclude=() d
	while read -r d; do exclude+=("--dpkgopt=path-exclude=$d"); done < <(sed 's/#.*//; /^ *$/d' "$here/leave-out")
	mmdebstrap --mode=root --variant=essential --architectures=amd64 --format=directory --include="$packages" "${exclude[@]}" \
		--aptopt='Acquire::Retries "3"' --aptopt='APT::Install-Recommends "false"' \
		--setup-hook="$here/hooks/before \"\$1\"" \
		--customize-hook="$here/hooks/after \"\$1\" '$out'" \
		bookworm "$out/rootfs" \
		"deb $MIRROR bookworm main" "deb $MIRROR bookworm-updates main" "deb $SECURITY bookworm-security main"
	"$here/hooks/clean" "$out/rootfs"
}

# Another varve in a system that is there already, for trials: STEPS="program squash disk" of a tree whose packages and files are unchanged.
program() {
	install -m755 "$out/varve" "$out/rootfs/usr/bin/varve"
	cp --no-preserve=mode,ownership "$top"/systemd/varve*.{service,socket,slice} "$top"/systemd/appliance/* "$out/rootfs/usr/lib/systemd/system/"
	echo "$VERSION" >"$out/rootfs/usr/lib/varve/version"
}

squash() {
	# Nothing is compressed here: the OVA and the other files compress all of it, and every start of a program is spared the work.
	# Of the format's variants it is one that GRUB reads, which takes kernel and initrd from here.
	rm -f "$out/root.squashfs"
	env -u SOURCE_DATE_EPOCH mksquashfs "$out/rootfs" "$out/root.squashfs" -noappend -no-progress -quiet -comp gzip -noI -noId -noD -noF -noX \
		-b 128K -xattrs -mkfs-time "$SOURCE_DATE_EPOCH" -all-time "$SOURCE_DATE_EPOCH"
	local size; size=$(stat -c %s "$out/root.squashfs")
	((size <= SLOT_A[1] * MIB)) || { echo "root.squashfs ($size bytes) is larger than a slot"; exit 1; }
}

# The boot loader's partition: EFI takes shim -> GRUB as Debian signed them; BIOS takes core.img, which reads the same files.
esp() {
	local e=$out/esp.img
	rm -f "$e"
	truncate -s $((ESP[1] * MIB)) "$e"
	mkfs.fat --invariant -F 32 -n VARVE-ESP -i 56415256 "$e" >/dev/null
	"$here/hooks/grubenv" >"$out/grubenv"
	echo 'configfile /grub/grub.cfg' >"$out/efi/debian.cfg"
	find "$out/efi" "$out/grubenv" -exec touch -hcd "@$SOURCE_DATE_EPOCH" {} +
	export MTOOLS_SKIP_CHECK=1
	mmd -i "$e" ::/EFI ::/EFI/BOOT ::/EFI/debian ::/grub
	mcopy -i "$e" "$out/efi/shimx64.efi" ::/EFI/BOOT/BOOTX64.EFI
	mcopy -i "$e" "$out/efi/grubx64.efi" ::/EFI/BOOT/grubx64.efi
	mcopy -i "$e" "$out/efi/debian.cfg" ::/EFI/debian/grub.cfg
	mcopy -i "$e" "$here/grub.cfg" ::/grub/grub.cfg
	mcopy -i "$e" "$out/grubenv" ::/grub/grubenv
}

little() { # VALUE BYTES: little endian
	local v=$1 i
	for ((i = 0; i < $2; i++)); do printf "\\x$(printf %02x $((v >> 8 * i & 255)))"; done
}

put() { dd of="$out/varve.raw" conv=notrunc,sparse oflag=seek_bytes iflag=fullblock bs=1M seek="$1" status=none; } # OFFSET

disk() {
	local raw=$out/varve.raw
	rm -f "$raw"
	truncate -s $((DISK_MIB * MIB)) "$raw"
	part() { # TYPE NAME N FIRST SIZE
		echo "start=$(($4 * 2048)), size=$(($5 * 2048)), type=$1, name=$2, uuid=$(uuid "$3")"
	}
	{
		echo 'label: gpt'
		echo "label-id: $(uuid 0)"
		part 21686148-6449-6E6F-744E-656564454649 varve-bios 1 "${BIOS[@]}"
		part C12A7328-F81F-11D2-BA4B-00A0C93EC93B varve-esp 2 "${ESP[@]}"
		part 0FC63DAF-8483-4772-8E79-3D69D8477DE4 varve-a 3 "${SLOT_A[@]}"
		part 0FC63DAF-8483-4772-8E79-3D69D8477DE4 varve-b 4 "${SLOT_B[@]}"
		part 0FC63DAF-8483-4772-8E79-3D69D8477DE4 varve-state 5 "${STATE[@]}"
	} | sfdisk --quiet --no-reread --no-tell-kernel "$raw"

	# boot.img starts core.img by its sector; core.img's first sector loads the rest, of which it holds the list of blocks.
	local grub=/usr/lib/grub/i386-pc core=$out/core.img first=$((BIOS[0] * 2048))
	grub-mkimage -O i386-pc -o "$core" -p '(,gpt2)/grub' biosdisk part_gpt fat squash4 gzio normal configfile loadenv test \
		regexp linux echo serial terminal sleep halt reboot
	(($(stat -c %s "$core") <= BIOS[1] * MIB)) || { echo "core.img does not fit"; exit 1; }
	head -c 440 $grub/boot.img | put 0
	little $first 8 | put $((0x5c))
	# A boot drive that the BIOS does not give correctly is taken as the first disk, as grub-bios-setup does it.
	printf '\x90\x90' | put $((0x66))
	put $((first * 512)) <"$core"
	little $((first + 1)) 8 | put $((first * 512 + 0x1f4))
	little $(((($(stat -c %s "$core") + 511) / 512) - 1)) 2 | put $((first * 512 + 0x1fc))

	put $((ESP[0] * MIB)) <"$out/esp.img"
	put $((SLOT_A[0] * MIB)) <"$out/root.squashfs"
	rm -f "$out/state.img"
	truncate -s $((STATE[1] * MIB)) "$out/state.img"
	E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH mkfs.ext4 -q -F -L varve-state -U "$(uuid 5)" -J size=32 -m 1 -N 65536 \
		-E "hash_seed=$(uuid 5),lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0" "$out/state.img"
	put $((STATE[0] * MIB)) <"$out/state.img"
	rm -f "$out/state.img" "$core"
}

outputs() {
	local name=varve-$VERSION
	(cd "$top" && CGO_ENABLED=0 "${GO:-go}" run ./image/pack -version "$VERSION" -epoch "$SOURCE_DATE_EPOCH" -raw "$out/varve.raw" \
		-dpkg "$out/rootfs/usr/share/varve/dpkg-status" -boot "$out/efi/packages" \
		-binary "$out/varve" -npm "$(git -C "$top" ls-files '*package-lock.json' | head -1)" -out "$out" -name "$name")
	rm -f "$out/$name".{qcow2,raw.zst}
	qemu-img convert -f raw -O qcow2 -c -o compression_type=zlib,compat=1.1 "$out/varve.raw" "$out/$name.qcow2"
	zstd -q -9 -T2 "$out/varve.raw" -o "$out/$name.raw.zst"
	cp "$out/root.squashfs" "$out/$name.root.squashfs"
	install -m755 "$here/import-proxmox.sh" "$here/import-libvirt.sh" "$out/"
	(cd "$out" && sha256sum "$name".{ova,qcow2,raw.zst,root.squashfs,spdx.json} import-*.sh >SHA256SUMS)
}

mkdir -p "$out"
for step in ${STEPS:-rootfs squash esp disk outputs}; do
	start=$SECONDS
	say "$step"
	"$step"
	say "$step took $((SECONDS - start)) s"
done
