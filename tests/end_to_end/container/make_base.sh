#!/usr/bin/env bash
# Makes a base image for the `test` target without a registry: Debian bookworm, whose Python is 3.11, from Debian's
# packages. What this machine needs to reach a package index (certificates, pip's settings) goes into that local image
# and thereby into nothing that is published.
#
#   bash tests/end_to_end/container/make_base.sh localhost/dtrpo-base      # as root; needs buildah and debootstrap
#
#   DEBIAN_MIRROR=...   where packages come from (default: http://deb.debian.org/debian)
set -euo pipefail

image=${1:?usage: make_base.sh IMAGE}
rootfs=$(mktemp -d)
trap 'rm -rf --one-file-system "$rootfs"' EXIT

# Directories of a machine are not readable by all where its umask says so; those of an image must be.
umask 022
chmod 755 "$rootfs"
debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates \
    bookworm "$rootfs" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$rootfs.log" 2>&1 ||
    { tail -n 20 "$rootfs.log" >&2; exit 1; }
rm -rf "$rootfs"/var/cache/apt/archives/*.deb "$rootfs"/var/lib/apt/lists/* "$rootfs.log"

bundle=/etc/ssl/certs/ca-certificates.crt
[ ! -f "$bundle" ] || install -m 644 "$bundle" "$rootfs$bundle"
# All of pip's settings, wherever this machine keeps them, as one file; what is set twice is set to the same.
python3 -m pip config list |
    sed -nE "s/^(global|:env:)\.([a-z-]+)='(.*)'$/\2 = \3/p" |
    awk -F ' = ' 'BEGIN { print "[global]" } !seen[$1]++' >"$rootfs/etc/pip.conf"

container=$(buildah from scratch)
buildah add --quiet "$container" "$rootfs" / >/dev/null
buildah config --cmd bash --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
buildah commit --quiet --rm "$container" "$image" >/dev/null
echo "made $image" >&2
