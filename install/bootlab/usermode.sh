#!/bin/sh
# usermode.sh [DIR]: unpacks Debian's user-mode Linux for the boot lab; nothing is installed.
set -eu
dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/meshupd-lab/usermode}
[ -e "$dir/usr/bin/linux.uml" ] && exit 0
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
(cd "$tmp" && apt-get download -qq user-mode-linux && dpkg-deb -x ./*.deb kernel)
mkdir -p "$(dirname "$dir")"
rm -rf "$dir"
mv "$tmp/kernel" "$dir"
