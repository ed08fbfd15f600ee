#!/usr/bin/env bash
# loraplex-image.sh ARCHIVE [REFERENCE]: the server's image as an OCI archive: the one of that name in buildah's storage, or
# one built from these sources on a Debian root, without a registry.
set -euo pipefail
source "$(dirname "$0")/settings.sh"
archive=$1 reference=${2:-}
root=$(cd "$(dirname "$0")/../.." && pwd)

if [[ -z $reference ]]; then
  reference=localhost/loraplex:cluster-test
  storage=$(mktemp --directory --tmpdir="${TMPDIR:-/var/tmp}" loraplex-build.XXXXXX)
  trap 'rm -rf --one-file-system "$storage"' EXIT
  cat >"$storage/storage.conf" <<END
[storage]
driver = "vfs"
graphroot = "$storage/root"
runroot = "$storage/run"
END
  export CONTAINERS_STORAGE_CONF=$storage/storage.conf TMPDIR=$storage
  bases=$CACHE/deploy-test # shared with make deploy-test
  "$root/deploy/image/debian_base.sh" "$bases"
  for name in base build-base; do
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$bases/$name.tar" / >/dev/null
    buildah commit --quiet --rm "$container" "localhost/debian-$name:bookworm" >/dev/null
  done
  PYTHON=$root/.venv/bin/python "$root/deploy/image/build.sh" "$reference" --quiet \
    --build-arg BASE=localhost/debian-base:bookworm --build-arg BUILD_BASE=localhost/debian-build-base:bookworm
fi
rm -f "$archive"
buildah push --quiet --format oci --disable-compression "$reference" "oci-archive:$archive:$SERVER_IMAGE"
