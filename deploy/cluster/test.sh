#!/usr/bin/env bash
# test.sh [REFERENCE]: `make cluster-test`. Builds what is not built yet, and proves chart and image on a cluster.
# REFERENCE is of an image in buildah's storage; without it, the image is built from these sources.
set -euo pipefail
source "$(dirname "$0")/settings.sh"
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..

"$here/packages.sh"
"$here/build-kubernetes.sh"
images=$(mktemp --directory --tmpdir="${TMPDIR:-/var/tmp}" loraplex-images.XXXXXX)
trap 'rm -rf "$images"' EXIT
"$here/pause-image.sh" "$images/pause.tar"
"$here/loraplex-image.sh" "$images/loraplex.tar" "$@"
"$here/run.sh" "$images" "$root/.venv/bin/python" "$root/tests/deploy/cluster/prove.py" "$SERVER_IMAGE"
