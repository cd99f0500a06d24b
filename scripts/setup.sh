#!/bin/sh
# Installs what banger needs and lacks here: `setup.sh run` to use it, `setup.sh test` for its tests too.
# Says what it installs; a machine that has everything needs no root and no network.
set -eu

need() { command -v "$1" >/dev/null 2>&1 || packages="$packages $2"; }

packages=
need cc gcc
need git git
need qemu-system-x86_64 qemu-system-x86
need pasta passt
need nft nftables
if [ "${1:-run}" = test ]; then
    need e2fsck e2fsprogs
    need debugfs e2fsprogs
fi
command -v cargo >/dev/null 2>&1 || {
    echo "setup: Rust is missing; install it with rustup (https://rustup.rs), then run this again" >&2
    exit 1
}
# The static musl target makes a smaller agent; without it the ordinary target links statically.
rustup target add x86_64-unknown-linux-musl >/dev/null 2>&1 || true
[ -n "$packages" ] || exit 0

command -v apt-get >/dev/null 2>&1 || {
    echo "setup: please install:$packages" >&2
    exit 1
}
if [ "$(id -u)" = 0 ]; then as_root=; else
    as_root=sudo
    [ -t 0 ] || as_root='sudo -n'
    echo "setup: root is needed to install:$packages"
fi
echo "setup: installing$packages"
$as_root apt-get update -qq
install="$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends"
# A qemu-utils from a newer suite keeps QEMU itself from being installed; the suite's own one goes with it.
suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
# shellcheck disable=SC2086
$install $packages >/dev/null || $install --allow-downgrades "qemu-utils/$suite" $packages >/dev/null
