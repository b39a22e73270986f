#!/usr/bin/env bash
# build.sh [-o DIR] [-v VERSION] ARCH...: Debian packages for these architectures of the Makefile (amd64 arm64 arm.7
# riscv64), named and made from binaries that `make` has put into bin/. The same commit gives the same bytes.
set -euo pipefail
cd "$(dirname "$0")/../.."
umask 022
out=dist version=
while getopts o:v: opt; do
  case $opt in
    o) out=$OPTARG ;;
    v) version=$OPTARG ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)} TZ=UTC LC_ALL=C.UTF-8
if [ -z "$version" ]; then
  # A tag v1.2.0 is version 1.2.0; what comes after it sorts behind it, and what comes before any tag before all.
  version=$(git describe --tags --match 'v[0-9]*' 2>/dev/null | sed 's/^v//; s/-\([0-9]*\)-g/+\1.g/; s/-/~/g') ||
    version=
  [ -n "$version" ] || version=0~$(date -ud "@$SOURCE_DATE_EPOCH" +%Y%m%d%H%M%S).$(git log -1 --format=%h)
fi

STAGE=$(mktemp -d)
trap 'rm -rf "$STAGE"' EXIT
mkdir -p "$out" "$STAGE/man" "$STAGE/completion"
bin/meshupd help --json | "${GO:-go}" run ./packaging/man -out "$STAGE/man"
gzip -9n "$STAGE"/man/*.1
bin/meshupd completion bash >"$STAGE/completion/meshupd.bash"
bin/meshupd completion zsh >"$STAGE/completion/_meshupd"
bin/meshupd completion fish >"$STAGE/completion/meshupd.fish"
cat >"$STAGE/changelog" <<END
meshupd ($version) unstable; urgency=medium

  * Built from commit $(git log -1 --format=%H).

 -- meshupd maintainers <maintainers@meshupd.invalid>  $(date -ud "@$SOURCE_DATE_EPOCH" -R)
END
gzip -9n "$STAGE/changelog"

for arch in "$@"; do
  BINARY=bin/meshupd-linux-$arch
  # Not the same for all: some parts are for one processor only.
  "${GO:-go}" run ./packaging/licences "$BINARY" | gzip -9n >"$STAGE/licences.gz"
  export STAGE BINARY VERSION=$version ARCH=${arch/./}
  "${GO:-go}" tool -modfile=packaging/deb/go.mod nfpm package -f packaging/deb/nfpm.yaml -p deb -t "$out/" >"$STAGE/log" ||
    { cat "$STAGE/log" >&2; exit 1; }
  tail -n 1 "$STAGE/log"
done
