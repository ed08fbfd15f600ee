#!/usr/bin/env bash
# `make deploy-test`: build the image without a registry or a daemon, run it as a cluster would, and watch it with a real
# Prometheus. Root on Debian; what is missing is installed from Debian. Everything but the Debian root that the image is
# built upon (kept in the cache folder) lies in one temporary folder, and goes at the end, however that comes.
set -euo pipefail
cd "$(dirname "$0")/../../.."

say() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }
fail() { printf 'deploy-test: %s\n' "$1" >&2; exit 1; }

[ "$(id -u)" = 0 ] || fail "run it as root: debootstrap and containers without a daemon need it"
python=$PWD/.venv/bin/python
[ -x "$python" ] || fail "there is no .venv: use \`make deploy-test\`"

declare -A package_of=([buildah]=buildah [catatonit]=catatonit [podman]=podman [runc]=runc [debootstrap]=debootstrap [prometheus]=prometheus
    [promtool]=prometheus)
missing=()
for tool in "${!package_of[@]}"; do
    command -v "$tool" >/dev/null || missing+=("${package_of[$tool]}")
done
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || fail "missing: ${missing[*]}"
    say "install ${missing[*]}"
    # Packages may bring services, which nobody here wants to be started.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    [ -z "$(trap -p EXIT)" ] || rm -f $policy
    trap - EXIT
fi

cache=${XDG_CACHE_HOME:-$HOME/.cache}/loraplex/deploy-test
work=$(mktemp -d /var/tmp/loraplex-deploy.XXXXXX)

# shellcheck disable=SC2317
clean_up() {
    status=$?
    set +e
    trap - EXIT INT TERM
    podman pod rm --all --force --time 1 >/dev/null 2>&1
    podman rm --all --force --time 1 >/dev/null 2>&1
    buildah rm --all >/dev/null 2>&1
    podman umount --all >/dev/null 2>&1
    while read -r place; do umount --lazy "$place"; done < <(
        awk -v under="$work/" 'index($2, under) == 1 { print $2 }' /proc/self/mounts | sort --reverse)
    rm -rf --one-file-system "$work"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Images and containers of its own, apart from whatever else this machine holds; by overlays where the kernel can, since
# vfs copies all layers for each container.
mkdir "$work/lower" "$work/upper" "$work/overlay" "$work/merged"
driver=vfs
if mount -t overlay overlay -o "lowerdir=$work/lower,upperdir=$work/upper,workdir=$work/overlay" "$work/merged" 2>/dev/null; then
    umount "$work/merged"
    driver=overlay
fi
cat >"$work/storage.conf" <<CONF
[storage]
driver = "$driver"
graphroot = "$work/storage"
runroot = "$work/run"
CONF
cat >"$work/containers.conf" <<CONF
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
tmp_dir = "$work/tmp"
volume_path = "$work/volumes"
CONF
mkdir "$work/tmp" "$work/buildah"
export CONTAINERS_STORAGE_CONF=$work/storage.conf CONTAINERS_CONF=$work/containers.conf TMPDIR=$work/buildah

say "a Debian root to build upon"
deploy/image/debian_base.sh "$cache"
for name in base build-base; do
    podman import --quiet "$cache/$name.tar" "localhost/debian-$name:bookworm"
done

image=localhost/loraplex:deploy-test
say "build the image"
PYTHON=$python deploy/image/build.sh "$image" \
    --build-arg BASE=localhost/debian-base:bookworm --build-arg BUILD_BASE=localhost/debian-build-base:bookworm --quiet

say "run it"
LORAPLEX_LIVE_IMAGE=$image LORAPLEX_LIVE_FOLDER=$work "$python" -m pytest tests/deploy/live "$@"

# CI leaves this out while what is committed is what was proved here; see .ci/run.
if inputs=$(.ci/deploy-inputs); then
    echo "$inputs" >.ci/deploy-tested
    say "proved, and noted in .ci/deploy-tested"
else
    say "proved, but not noted: there are changes that are not committed"
fi
