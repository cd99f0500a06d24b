#!/bin/sh
# Configures the unpacked packages of a Debian image. Runs once, as root, inside a vm whose root is that image itself,
# writable; what it leaves there is the result. Running it again after an interruption finishes the work.
#
# It is written for a machine that starts programs slowly (software emulation: ten to twenty times): programs whose work
# is useless here, or was done when the image was unpacked, are replaced by stubs for the duration of this script.
set -eu
umask 022
export LC_ALL=C HOME=/root DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true
real_path=/usr/sbin:/usr/bin:/sbin:/bin
export PATH="$real_path"
work=/var/tmp/banger-configure
units=$work/units
mkdir -p "$work/bin"

leave() {
    umount -q /usr/share/debconf/confmodule || :
    umount -q /var/lib/dpkg/updates || :
}
trap leave EXIT
leave

# 1. The accounts that everything else refers to. The package's preinst has them; unpacking ran none.
sh /var/lib/dpkg/info/base-passwd.preinst install
[ -e /etc/shadow ] || pwconv
[ -e /etc/gshadow ] || grpconv

# 2. Stubs. Services are not started, initial ram disks and hardware databases not built, ssh keys not made (each vm makes
# its own), certificates were linked when the image was unpacked, and nothing has an older version to clean up after.
stub() {
    for name in "$@"; do
        printf '#!/bin/sh\nexit 0\n' >"$work/bin/$name"
    done
}
stub update-ca-certificates ssh-keygen systemd-hwdb update-initramfs invoke-rc.d update-rc.d deb-systemd-invoke \
    systemd-tmpfiles journalctl dpkg-maintscript-helper policy-rc.d sync

# Enabling units is noted and done in one go at the end: the real helper is a perl program.
cat >"$work/bin/deb-systemd-helper" <<'EOF'
#!/bin/sh
[ "$1" != --quiet ] || shift
case $1 in
enable) shift; for unit in "$@"; do echo "$unit" >>/var/tmp/banger-configure/units; done ;;
debian-installed) exit 1 ;;
esac
exit 0
EOF

# System accounts without perl.
cat >"$work/bin/addgroup" <<'EOF'
#!/bin/sh
for name in "$@"; do :; done
getent group "$name" >/dev/null || exec groupadd --system "$name"
EOF
cat >"$work/bin/adduser" <<'EOF'
#!/bin/sh
home=/nonexistent shell=/usr/sbin/nologin group='--gid nogroup' name=
while [ $# -gt 0 ]; do
    case $1 in
    --home) home=$2; shift ;;
    --shell) shell=$2; shift ;;
    --gecos | --comment) shift ;;
    --group) group=--user-group ;;
    --*) ;;
    *) name=$1 ;;
    esac
    shift
done
getent passwd "$name" >/dev/null || exec useradd --system --no-create-home --home-dir "$home" --shell "$shell" $group "$name"
EOF
chmod 755 "$work"/bin/*

# Every question gets its default, without starting the debconf frontend for each package.
cat >"$work/confmodule" <<'EOF'
RET=
_banger_nothing() { RET=; return 0; }
for _banger_command in version capb set reset title settitle input beginblock endblock go stop subst fget fset metaget \
    register unregister purge clear progress data info x_loadtemplatefile; do
    eval "db_$_banger_command() { _banger_nothing; }"
done
db_get() {
    case $1 in
    openssh-server/* | libraries/restart-without-asking) RET=true ;;
    tzdata/Areas) RET=Etc ;;
    tzdata/Zones/*) RET=UTC ;;
    ca-certificates/trust_new_crts) RET=yes ;;
    *) RET= ;;
    esac
    return 0
}
EOF
mount --bind "$work/confmodule" /usr/share/debconf/confmodule
# dpkg syncs its journal several times for each package; nobody needs that before this script has ended.
mount -t tmpfs -o size=16m,mode=755 tmpfs /var/lib/dpkg/updates

# 3. Configure. The first two go ahead of their dependencies, as in every bootstrap.
export PATH="$work/bin:$real_path"
dpkg --force-depends --configure base-passwd base-files 2>&1
dpkg --configure --pending 2>&1
export PATH="$real_path"
leave

# 4. What the stubs left out.
if [ -s "$units" ]; then
    # Word splitting is meant: one unit a line.
    DPKG_MAINTSCRIPT_PACKAGE=banger deb-systemd-helper enable $(sort -u "$units") >/dev/null
fi
# Docker starts when somebody uses it; timers of a machine that lives for weeks only disturb.
for unit in docker.service containerd.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    fstrim.timer e2scrub_all.timer e2scrub_reap.service man-db.timer systemd-pstore.service; do
    for link in /etc/systemd/system/*.wants/"$unit"; do
        [ ! -L "$link" ] || rm "$link"
    done
done
if [ -d /etc/ssl/certs ] && [ -x /usr/bin/openssl ]; then
    openssl rehash /etc/ssl/certs
fi
ldconfig

# 5. Nothing of this run, and no identity, stays in the image.
rm -rf "$work" /var/lib/dbus/machine-id /var/lib/systemd/random-seed /etc/ssh/ssh_host_* /var/cache/ldconfig/aux-cache \
    /var/lib/dpkg/*-old /var/cache/debconf/*-old /var/log/*.log /var/log/apt/* /var/backups/* /etc/*- \
    /var/cache/apt/*.bin /etc/.pwd.lock
: >/etc/machine-id
# The services that run "after an update of /usr" have nothing to do on the first boot.
touch -r /usr /etc/.updated /var/.updated

audit=$(dpkg --audit)
if [ -n "$audit" ]; then
    printf '%s\n' "$audit" >&2
    exit 1
fi
