#!/usr/bin/env bash
# build.sh TAG [BUILDAH ARGUMENT...]: build deploy/Dockerfile with buildah, with the sources of packages that this machine's
# pip is told of, and write the SBOM beside the image: build/sbom-TAG.cdx.json. Arguments such as
# `--build-arg VARIANT=cuda` or `--build-arg BASE=...` go to buildah.
# Needs buildah, and Python with pip as $PYTHON. No daemon, and no privileges but those of `buildah bud` itself.
set -euo pipefail

tag=$1
shift
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Secrets and volumes of a build are no part of the image.
mounts=()
while IFS= read -r path; do
    mounts+=(--volume "$path:$path:ro")
done < <("$python" deploy/image/pip_settings.py "$scratch/pip.conf")

revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

# `docker` is the format that keeps a health check.
buildah bud --isolation "${BUILDAH_ISOLATION:-chroot}" --format docker --file deploy/Dockerfile --tag "$tag" \
    --timestamp "$epoch" --build-arg "SOURCE_DATE_EPOCH=$epoch" \
    --build-arg "VERSION=$version" --build-arg "REVISION=$revision" \
    --secret "id=pip.conf,src=$scratch/pip.conf" "${mounts[@]}" "$@" .

container=$(buildah from --pull-never "$tag")
mkdir -p build
cp "$(buildah mount "$container")/usr/share/loraplex/sbom.cdx.json" "build/sbom-${tag//[^A-Za-z0-9.]/-}.cdx.json"
buildah umount "$container" >/dev/null
buildah rm "$container" >/dev/null
