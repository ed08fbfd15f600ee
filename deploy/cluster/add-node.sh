#!/usr/bin/env bash
# add-node.sh FOLDER INDEX CGROUP: starts a node that has a network, mounts, processes and a cgroup of its own, and returns
# once it is starting. Its first process is in FOLDER/NODE/pid: killing that is a loss of power.
set -euo pipefail
source "$(dirname "$0")/settings.sh"
folder=$1 index=$2 cgroup=$3
node=${NODES[$index]}
mkdir -p "$folder/$node" "$folder/logs"

ip netns add "$node"
ip link add "to-$node" type veth peer name eth0 netns "$node"
ip link set "to-$node" master nodes0 up
ip -netns "$node" link set lo up
ip -netns "$node" address add "$(node_address "$index")/24" dev eth0
ip -netns "$node" link set eth0 up
ip -netns "$node" route add default via "$BRIDGE_ADDRESS"
ip route add "$(node_pods "$index")" via "$(node_address "$index")"

nsenter --net="/run/netns/$node" unshare --mount --pid --uts --ipc --fork --kill-child --mount-proc \
  "$(dirname "$0")/node.sh" "$folder/$node" "$index" "$cgroup" >"$folder/logs/$node.log" 2>&1 &
echo $! >"$folder/$node/pid"
