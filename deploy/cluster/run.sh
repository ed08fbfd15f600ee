#!/usr/bin/env bash
# run.sh IMAGES COMMAND...: makes a Kubernetes cluster of two nodes that have the images (OCI archives, *.tar in IMAGES),
# runs the command in it, and leaves nothing behind: all of it lives in namespaces that end with the command.
# The command finds KUBECONFIG, CLUSTER_FOLDER (logs/, volumes/, names/, NODE/pid) and the addresses of services and pods.
set -euo pipefail
source "$(dirname "$0")/settings.sh"
here=$(cd "$(dirname "$0")" && pwd)

if ((EUID != 0)); then
  echo "a cluster needs root: namespaces, mounts and network interfaces of its own" >&2
  exit 1
fi
if [[ ! -e $DAEMONS/complete || ! -e $KUBERNETES/complete ]]; then
  echo "run packages.sh and build-kubernetes.sh first" >&2
  exit 1
fi

folder=$(mktemp --directory --tmpdir="${TMPDIR:-/var/tmp}" loraplex-cluster.XXXXXX)
chmod 755 "$folder" # pods of other users go through it to their volumes
inside=

# shellcheck disable=SC2317  # the trap calls it
clean_up() {
  trap '' INT TERM
  # Its children are killed with it, down to the last container: they are in its process namespace.
  if [[ $inside ]]; then kill -KILL "$inside" 2>/dev/null || true; fi
  wait
  "$here/cgroups.sh" remove "$(basename "$folder")" || echo "some cgroups are left" >&2
  rm -rf --one-file-system "$folder"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

"$here/cgroups.sh" make "$(basename "$folder")"
# Whatever ends this script ends unshare, and that its child.
setpriv --pdeathsig KILL unshare --mount --net --pid --uts --ipc --fork --kill-child --mount-proc \
  "$here/inside.sh" "$folder" "/$(basename "$folder")" "$@" <&0 &
inside=$!
status=0
wait "$inside" || status=$?
inside=
exit "$status"
