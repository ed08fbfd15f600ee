#!/usr/bin/env bash
# pause-image.sh ARCHIVE: the image that keeps a pod's namespaces open, as an OCI archive, from Kubernetes' own source.
set -euo pipefail
source "$(dirname "$0")/settings.sh"
archive=$1
storage=$(mktemp --directory --tmpdir="${TMPDIR:-/var/tmp}" loraplex-pause.XXXXXX)
trap 'rm -rf "$storage"' EXIT
in_storage=(buildah --root "$storage/root" --runroot "$storage/run" --storage-driver vfs)
container=$("${in_storage[@]}" from scratch)
"${in_storage[@]}" copy --quiet "$container" "$KUBERNETES/bin/pause" /pause >/dev/null
"${in_storage[@]}" config --user 65535:65535 --entrypoint '["/pause"]' "$container"
rm -f "$archive"
"${in_storage[@]}" commit --quiet "$container" "oci-archive:$archive:$PAUSE_IMAGE" >/dev/null
