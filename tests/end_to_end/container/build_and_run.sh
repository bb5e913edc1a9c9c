#!/usr/bin/env bash
# Builds the image `test` of the Dockerfile and runs the tests in it: all of them, or what pytest's arguments choose.
#
#   bash tests/end_to_end/container/build_and_run.sh
#   bash tests/end_to_end/container/build_and_run.sh tests/unit -q
#
#   ENGINE=docker|podman|buildah   default: the first of these that works here
#   BASE_IMAGE=...                 instead of the Dockerfile's; `debootstrap` makes one from Debian's packages, for a
#                                  machine without a registry (buildah and root only)
#   BUILD_OPTIONS="..."            more options of the engine's build, such as --no-cache, --build-arg BROWSER= or
#                                  --volume WHEELS:WHEELS:ro for a folder that pip's settings name
#   MEGATRON_DTRPO_SHARED=DIR      data too large for the repository; its tests are skipped without it
#   KEEP=1                         leave the images for the next call
#
# buildah keeps images as overlays where it can; STORAGE_DRIVER=vfs copies every layer whole and works anywhere.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
image=localhost/dtrpo-test
base=${BASE_IMAGE:-}
container=

works() {
    case $1 in
        docker) docker info >/dev/null 2>&1 ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

for candidate in ${ENGINE:-docker podman buildah}; do
    if works "$candidate"; then
        engine=$candidate
        break
    fi
done
[ -n "${engine:-}" ] || { echo "error: none of ${ENGINE:-docker, podman, buildah} works here" >&2; exit 1; }

# Inside another container there are no namespaces to be had; a chroot always works.
if [ "$engine" = buildah ] && [ "$(id -u)" = 0 ]; then
    export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}
fi

clean_up() {
    [ -z "$container" ] || buildah rm "$container" >/dev/null
    [ -z "$engine" ] || [ -n "${KEEP:-}" ] || "$engine" rmi "$image" >/dev/null 2>&1 || true
    [ "${BASE_IMAGE:-}" != debootstrap ] || [ -n "${KEEP:-}" ] || buildah rmi --prune --force >/dev/null 2>&1 || true
}
trap clean_up EXIT

read -ra options <<<"${BUILD_OPTIONS:-}"
if [ "$base" = debootstrap ]; then
    [ "$engine" = buildah ] || { echo "error: BASE_IMAGE=debootstrap needs ENGINE=buildah" >&2; exit 1; }
    base=localhost/dtrpo-base
    buildah inspect --type image "$base" >/dev/null 2>&1 || bash "$here/make_base.sh" "$base"
fi
[ -z "$base" ] || options+=(--build-arg "BASE_IMAGE=$base")

build=("$engine" build)
[ "$engine" != buildah ] || build=(buildah bud --layers)
"${build[@]}" --target test --tag "$image" "${options[@]}" --file "$root/Dockerfile" "$root"

mounts=()
if [ -n "${MEGATRON_DTRPO_SHARED:-}" ]; then
    mounts=(--volume "$MEGATRON_DTRPO_SHARED:/shared:ro" --env MEGATRON_DTRPO_SHARED=/shared)
fi
if [ "$engine" = buildah ]; then
    container=$(buildah from "$image")
    # torchrun's processes find each other by the machine's name; buildah, unlike docker, gives it no address.
    buildah run --hostname localhost "${mounts[@]}" "$container" -- bash tests/run.sh "$@"
else
    "$engine" run --rm --shm-size 2g "${mounts[@]}" "$image" bash tests/run.sh "$@"
fi
