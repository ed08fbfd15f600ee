#!/usr/bin/env bash
# inside.sh FOLDER CGROUP IMAGES COMMAND...: the first process in the cluster's namespaces; run.sh makes these.
set -euo pipefail
source "$(dirname "$0")/settings.sh"
folder=$1 cgroup=$2 images=$3
shift 3
here=$(cd "$(dirname "$0")" && pwd)

hostname control-plane
mount -t tmpfs tmpfs /run
mkdir -p "$folder/volumes"
ln -s "$(realpath "$images")" "$folder/images"
"$here/certificates.sh" "$folder/keys"
export KUBECONFIG=$folder/keys/admin.kubeconfig CLUSTER_FOLDER=$folder

began=$SECONDS
"$here/control-plane.sh" "$folder"
echo "API server ready after $((SECONDS - began)) s"
for index in "${!NODES[@]}"; do "$here/add-node.sh" "$folder" "$index" "$cgroup/${NODES[$index]}"; done
for node in "${NODES[@]}"; do
  wait_for 180 kubectl wait --for condition=Ready --timeout 5s "node/$node" || {
    tail -n 20 "$folder/logs/$node"*.log >&2
    exit 1
  }
done
echo "nodes ready after $((SECONDS - began)) s"
status=0
"$@" || status=$?
exit "$status"
