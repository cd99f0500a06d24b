#!/bin/sh
# Installs what banger needs and lacks here: `setup.sh run` to use it, `setup.sh test` for its tests too.
# Says what it installs; a machine that has everything needs no root and no network. Safe to repeat.
set -eu

what=${1:-run}
need() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || packages="$packages $2"; }
say() { echo "setup: $*"; }

packages=
need cc gcc
need git git
need qemu-system-x86_64 qemu-system-x86
need pasta passt
need nft nftables
if [ "$what" = test ]; then
    need e2fsck e2fsprogs
    need ip iproute2
    need tcpdump tcpdump
    need ssh openssh-client
    need rsync rsync
    need openssl openssl
    need python3 python3
    need zstd zstd
    need busybox busybox-static
    need docker-registry docker-registry
    need skopeo skopeo
    need umoci umoci
    need buildah buildah
    need cpio cpio
    need mksquashfs squashfs-tools
    need mkfs.erofs erofs-utils
    need mmdebstrap mmdebstrap
    need emacs emacs-nox
fi
command -v cargo >/dev/null 2>&1 || {
    say "Rust is missing; install it with rustup (https://rustup.rs), then run this again" >&2
    exit 1
}

# How to become root, for what needs it. A terminal is asked first; without one, sudo must not ask either.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif [ -t 0 ]; then
        sudo "$@"
    else
        sudo -n "$@"
    fi
}
may_use_root() {
    [ "$(id -u)" != 0 ] && [ -t 0 ] || return 0
    printf 'setup: use sudo for this? [Y/n] '
    read -r answer
    case $answer in [nN]*) return 1 ;; esac
}

if [ -n "$packages" ]; then
    packages=$(echo "$packages" | tr ' ' '\n' | sort -u | tr '\n' ' ')
    command -v apt-get >/dev/null 2>&1 || {
        say "please install: $packages" >&2
        exit 1
    }
    say "installing $packages"
    may_use_root || {
        say "not installed; banger needs them" >&2
        exit 1
    }
    as_root apt-get update -qq
    install="env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends"
    # Where qemu-utils comes from a newer suite, QEMU itself can't be installed beside it; the suite's own one can.
    suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    # shellcheck disable=SC2086
    as_root $install $packages >/dev/null 2>&1 ||
        as_root $install --allow-downgrades "qemu-utils/$suite" $packages >/dev/null
fi

# A vm's network needs this device; distributions open it to everybody, some minimal systems don't.
if [ -e /dev/net/tun ] && { [ ! -r /dev/net/tun ] || [ ! -w /dev/net/tun ] || [ "$what" = test ]; }; then
    mode=$(stat -c %a /dev/net/tun)
    if [ "$mode" != 666 ]; then
        say "opening /dev/net/tun to all users (mode $mode to 666), which vms' networks need"
        if may_use_root; then
            as_root chmod 666 /dev/net/tun || say "could not; vms of other users than root will have no network"
        fi
    fi
fi

if [ "$what" = test ] && ! cargo deny --version >/dev/null 2>&1; then
    say "installing cargo-deny, which checks licences and sources of dependencies"
    cargo install --quiet --locked cargo-deny || say "could not; that check will be listed as skipped"
fi
