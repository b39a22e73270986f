#!/bin/sh
# kernel.sh [DIR]: unpacks Debian's cloud kernel for the boot lab; nothing is installed. NVMe, GPT, ext4 and DMI are built
# into it, so that it starts without an initramfs.
set -eu
dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/meshupd-lab/kernel}
set -- "$dir"/boot/vmlinuz-*
[ -e "$1" ] && exit 0
find_package() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)/\1/p' | head -n 1; }
package=$(find_package)
[ -n "$package" ] || { apt-get update -qq; package=$(find_package); }
[ -n "$package" ] || { echo "kernel.sh: apt knows no linux-image-cloud-amd64" >&2; exit 1; }
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
(cd "$tmp" && apt-get download -qq "$package" && dpkg-deb -x ./*.deb kernel)
mkdir -p "$(dirname "$dir")"
rm -rf "$dir"
mv "$tmp/kernel" "$dir"
